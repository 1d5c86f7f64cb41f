"""Literal reference of a denoiser with sinks: every layer at a site computed row by row from sets of neurons.

    hidden neurons   out[row] = W (gate[row] * h[row]) + bias
    values           out[row] = gate[row] * (W x[row] + bias)

Paths are found by their names alone, and gates are lists of plain floats, so that nothing of the fast path is shared
but the plan. Slow on purpose; gradients come from autograd through the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unmemorize.isolate.plan import SinkPlan, SinkSite

GateOf = Callable[[SinkSite, int], Sequence[float]]
"""(place, row of the batch) -> one gate per neuron."""


def gates_of(
    plan: SinkPlan,
    ids: Sequence[int],
    state: str = "own",
    *,
    exclude: Sequence[int] = (),
    shared_scale: float = 1.0,
) -> GateOf:
    """Write down the gates of a state: row i opens the sinks of ids[i]; 0 opens none."""

    def gate(place: SinkSite, row: int) -> list[float]:
        id = ids[row]
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

    return gate


@contextmanager
def literal_sites(denoiser: nn.Module, plan: SinkPlan, gate: GateOf) -> Iterator[None]:
    """Compute every layer at a site of the plan by the loop while the block is open."""
    modules = dict(denoiser.named_modules())
    changed: list[nn.Module] = []
    try:
        for place in plan.sites:
            linear = modules[place.site.path]
            linear.forward = _loop(linear, place, gate)
            changed.append(linear)
        yield
    finally:
        for linear in changed:
            del linear.forward


def _loop(linear: nn.Module, place: SinkSite, gate: GateOf) -> Callable[[Tensor], Tensor]:
    site = place.site

    def forward(batch: Tensor) -> Tensor:
        rows: list[Tensor] = []
        for number, tokens in enumerate(batch):
            gates = torch.tensor(list(gate(place, number)))
            if site.side == "in":
                before = torch.ones(site.start)
                out = (torch.cat([before, gates]) * tokens) @ linear.weight.t()
                rows.append(out if linear.bias is None else out + linear.bias)
            else:
                out = tokens @ linear.weight.t()
                rows.append(gates * (out if linear.bias is None else out + linear.bias))
        return torch.stack(rows)

    return forward
