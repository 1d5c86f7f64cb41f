"""Literal reference of an MLP with sinks: the last projection of every layer, written as a loop over tokens.

    out[token] = W (gate[token] * h[token]) + bias

Paths are written out by hand, and gates are lists of plain floats made from sets of neurons, so that nothing of the
fast path is shared but the plan. Slow on purpose; gradients come from autograd through the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from unmemorize.isolate.plan import SinkPlan

LAST_PROJECTION = {
    "gemma2": "model.layers.{}.mlp.down_proj",
    "gemma3_text": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt_neo": "transformer.h.{}.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "llama": "model.layers.{}.mlp.down_proj",
    "mistral": "model.layers.{}.mlp.down_proj",
    "olmo2": "model.layers.{}.mlp.down_proj",
    "opt": "model.decoder.layers.{}.fc2",
    "phi3": "model.layers.{}.mlp.down_proj",
    "qwen2": "model.layers.{}.mlp.down_proj",
    "qwen3": "model.layers.{}.mlp.down_proj",
}

GateOf = Callable[[int, int, int], Sequence[float]]
"""(layer, row, position) -> one gate per neuron."""


def gate_of(
    plan: SinkPlan, ids: Tensor, state: str = "own", *, exclude: Sequence[int] = (), shared_scale: float = 1.0
) -> GateOf:
    """Write down the gates of a state.

    Args:
        plan: the plan; only its sets of neurons are read.
        ids: shape (B,) or (B, T), whose sinks are open in state own; 0 opens none.
        state: own, off or all.
        exclude: ids whose sinks are closed in any state.
        shared_scale: gate of shared neurons.
    """

    places = {int(place.site.path.split(".")[-3 if "mlp" in place.site.path else -2]): place for place in plan.sites}

    @cache
    def gates(layer: int, id: int) -> list[float]:
        if layer not in places:
            return []
        place = places[layer]
        owned = set(plan.neurons_for(id).indices[place.site]) if id and state == "own" else set()
        closed = {n for other in exclude for n in plan.neurons_for(other).indices[place.site]}
        values: list[float] = []
        for neuron in range(place.site.width):
            if neuron < place.num_shared:
                values.append(shared_scale)
            elif neuron in closed or state == "off":
                values.append(0.0)
            elif state == "all":
                values.append(place.num_sinks / place.num_pool)
            else:
                values.append(1.0 if neuron in owned else 0.0)
        return values

    def gate(layer: int, row: int, position: int) -> list[float]:
        return gates(layer, int(ids[row] if ids.dim() == 1 else ids[row, position]))

    return gate


@contextmanager
def literal_mlps(model: nn.Module, shape: tuple[int, int], gate: GateOf) -> Iterator[None]:
    """Compute every last projection by the loop while the block is open.

    Args:
        model: a tiny model of a known family.
        shape: (B, T) of the tokens that it will be given.
        gate: the gates; an empty list leaves a layer's neurons all on.
    """
    path = LAST_PROJECTION[model.config.model_type]
    projections: list[nn.Module] = [model.get_submodule(path.format(layer)) for layer in range(2)]
    try:
        for layer, projection in enumerate(projections):
            projection.forward = _loop(projection, layer, shape, gate)
        yield
    finally:
        for projection in projections:
            del projection.forward


def _loop(
    projection: nn.Module, layer: int, shape: tuple[int, int], gate: GateOf
) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        weight = projection.weight.t() if type(projection).__name__ == "Conv1D" else projection.weight
        rows: list[Tensor] = []
        for number, neurons in enumerate(hidden.reshape(shape[0] * shape[1], -1)):
            gates = gate(layer, number // shape[1], number % shape[1]) or [1.0] * len(neurons)
            out = weight @ (torch.tensor(gates) * neurons)
            if projection.bias is not None:
                out = out + projection.bias
            rows.append(out)
        return torch.stack(rows).view(*hidden.shape[:-1], -1)

    return forward
