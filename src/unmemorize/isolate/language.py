"""Sinks in language models: attach a plan to an unmodified Hugging Face model for training and for measuring.

    plan = plan_sinks(model, SinkSettings())
    with training_sinks(model, plan):
        loss = model(input_ids=tokens, labels=labels, sink_ids=ids).loss
        loss.backward()

Inside the block every call may carry `sink_ids`, one id a row or a token; the argument is taken out before the
model sees it. Nothing is copied or subclassed and no state-dict key changes. `sink_state` puts a model into one of
the states in which it is measured. The mathematics is in `plan.py` and `layers.py`; this file only wires it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError, IdsMissing, NeuronSetMismatch
from unmemorize.gates import Conditioning, changed_inputs, conditioned, is_transposed, replaced_forwards
from unmemorize.isolate.layers import (
    Gates,
    Rows,
    gathered_forwards,
    gathered_payload,
    masked,
    masked_payload,
    pool_gates,
)
from unmemorize.isolate.plan import SinkPlan, SinkSettings, make_plan
from unmemorize.isolate.states import Rescale, State, state_gates
from unmemorize.models.language import MlpRow, find_mlps, resized, signature

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Compute = Literal["masked", "gathered"]

KEY = "sink_ids"


def plan_sinks(model: nn.Module, settings: SinkSettings, *, row: MlpRow | None = None) -> SinkPlan:
    """Lay a plan over a language model's MLPs.

    Args:
        model: the model as it will train; if `settings.grown` is set, already widened by `grow`.
        settings: the layout.
        row: site table row, for an architecture that the table does not know.

    Raises:
        ConfigError: if a setting does not fit the model.
        ModelNotSupported: if no row fits.
    """
    sites = [mlp.site for mlp in find_mlps(model, row)]
    if settings.grown and settings.layers is not None:
        raise ConfigError("growing widens every layer; leave layers out, or carve the pool with share_frac")
    originals = [site.width - settings.grown for site in sites]
    if min(originals) < 1:
        raise ConfigError(
            f"the model has {min(s.width for s in sites)} neurons per layer, fewer than grown={settings.grown}; "
            "call grow(model, num_sinks) before plan_sinks"
        )
    return make_plan(sites, originals, signature(model, row), settings)


def grow(
    model: PreTrainedModel, num_sinks: int, *, seed: int = 0, row: MlpRow | None = None
) -> PreTrainedModel:
    """Return a copy of the model with fresh neurons appended to every MLP; its function is unchanged.

    The new rows of the first projections are random (normal, the model's own initializer range), the new columns of
    the last projection are 0, so that the copy computes what the model computed until the columns train.

    Args:
        model: left untouched.
        num_sinks: neurons to append per layer, at least 1.
        seed: seed of the new rows.
        row: site table row, for an architecture that the table does not know.

    Raises:
        ConfigError: if `num_sinks` is below 1, or the architecture's width is fixed.

    Source: ours.
    """
    if num_sinks < 1:
        raise ConfigError(f"cannot grow {num_sinks} sinks, expected 1 or more")
    widths = [mlp.site.width for mlp in find_mlps(model, row)]
    selections = [torch.cat([torch.arange(width), torch.full((num_sinks,), -1)]) for width in widths]
    wider = resized(model, selections, row)
    std = float(getattr(model.config.get_text_config(), "initializer_range", None) or 0.02)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mlp, width in zip(find_mlps(wider, row), widths, strict=True):
            for linear in mlp.up:
                weight = linear.weight
                assert isinstance(weight, Tensor)
                rows = weight.t() if is_transposed(linear) else weight
                for start in (0, mlp.site.width) if mlp.is_fused else (0,):
                    fresh = torch.randn(num_sinks, rows.shape[1], generator=generator) * std
                    rows[start + width : start + mlp.site.width].copy_(fresh)
    return wider


@contextmanager
def training_sinks(
    model: nn.Module,
    plan: SinkPlan,
    *,
    compute: Compute = "masked",
    row: MlpRow | None = None,
) -> Iterator[None]:
    """Open each token's own sinks, and no others, in every call that carries `sink_ids`.

    Run forward and backward inside the block. In training mode a call without `sink_ids` raises; in evaluation mode
    it runs with the pool off.

    Args:
        model: the model that `plan` was made for. It may be wrapped (DDP, compile) after the block is entered or
            before; pass the unwrapped model here.
        plan: the plan.
        compute: "masked" (every scheme, every architecture) or "gathered" (time independent of the pool's size).
        row: site table row, for an architecture that the table does not know.

    Raises:
        NeuronSetMismatch: if the plan was made for another architecture.
        IdsMissing: inside the block, if a training forward comes without ids.
        ConfigError: if `compute` does not fit the plan.
    """
    if compute not in ("masked", "gathered"):
        raise ConfigError(f"unknown compute {compute!r}; expected masked or gathered")
    if compute == "gathered" and not plan.has_exact_count:
        raise ConfigError("the published scheme has no fixed number of sinks per id; use compute='masked'")
    payload = masked_payload if compute == "masked" else gathered_payload
    off = Gates(pool_gates(plan, torch.zeros(1, dtype=torch.int64)), None)

    def encode(ids: Tensor | None, training: bool) -> Gates | Rows:
        if ids is not None:
            return payload(plan, ids)
        if training:
            raise IdsMissing(
                "a training forward came without sink_ids, so every neuron would train as shared; pass sink_ids= of "
                "shape (batch,) or (batch, tokens), and keep the column in the data (remove_unused_columns=False)"
            )
        return off

    with _attached(model, plan, encode, row, is_gathered=compute == "gathered"):
        yield


@contextmanager
def sink_state(
    model: nn.Module,
    plan: SinkPlan,
    state: State,
    *,
    ids: Tensor | None = None,
    exclude: Sequence[int] = (),
    candidates: Tensor | None = None,
    rescale: Rescale = "none",
    row: MlpRow | None = None,
) -> Iterator[None]:
    """Put a model into one of the states in which it is measured or generates.

    off: the pool is closed. own: each row's own sinks. foreign: the sinks of another id, the placebo of own.
    all: every sink at the share of ids that own it (its expected value in training).

    Args:
        model: the model that `plan` was made for, unwrapped.
        plan: the plan.
        state: off, own, foreign or all.
        ids: for own and foreign: shape (B,) or (B, T), int64, for calls that carry no `sink_ids` of their own (so that
            `generate` works).
        exclude: ids whose sinks are closed on top of the state, also where another id shares them.
        candidates: for foreign: ids to choose from, shape (M,); by default as `SinkPlan.foreign_ids`.
        rescale: multiply shared neurons to make up for closed sinks: "none", "published" ((g + p) / g, as the release
            does in state off) or "mass" ((g + (1 - g) p) / g). Report it whenever it is not "none".
        row: site table row, for an architecture that the table does not know.

    Raises:
        IdsMissing: inside the block, if own or foreign have no ids.
        NeuronSetMismatch: if the plan was made for another architecture.
    """
    encode = state_gates(plan, state, ids, tuple(exclude), candidates, rescale)
    with _attached(model, plan, encode, row, is_gathered=False):
        yield


def pool_slices(
    model: nn.Module, plan: SinkPlan, row: MlpRow | None = None
) -> list[tuple[nn.Parameter, int, slice]]:
    """List the parts of a model's parameters that belong to sinks.

    Returns:
        (parameter, axis, slice) triples: rows of the first projections with their biases, columns of the last.
    """
    parts: list[tuple[nn.Parameter, int, slice]] = []
    mlps = {mlp.site: mlp for mlp in find_mlps(model, row)}
    for place in plan.sites:
        mlp = mlps[place.site]
        width = place.site.width
        for linear in mlp.up:
            for start in (0, width) if mlp.is_fused else (0,):
                pool = slice(start + place.num_shared, start + width)
                parts.append((_parameter(linear, "weight"), 1 if is_transposed(linear) else 0, pool))
                if linear.bias is not None:
                    parts.append((_parameter(linear, "bias"), 0, pool))
        pool = slice(place.num_shared, width)
        parts.append((_parameter(mlp.down, "weight"), 0 if is_transposed(mlp.down) else 1, pool))
    return parts


@contextmanager
def _attached(
    model: nn.Module,
    plan: SinkPlan,
    encode: Callable[[Tensor | None, bool], Gates | Rows],
    row: MlpRow | None,
    *,
    is_gathered: bool,
) -> Iterator[None]:
    mlps = find_mlps(model, row)
    ours = signature(model, row)
    if plan.model_id != ours:
        raise NeuronSetMismatch(
            f"the plan was made for {plan.model_id}, this model is {ours}; use the plan saved beside the model"
        )
    layer_of = {mlp.site: number for number, mlp in enumerate(mlps)}
    # Recompiling for every new number of documents would cost more than the few index operations of a payload.
    encode = cast("Callable[[Tensor | None, bool], Gates | Rows]", torch.compiler.disable(encode))
    with conditioned(model, [mlp.layer for mlp in mlps], key=KEY, encode=encode) as conditioning:
        forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        inputs: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for number, place in enumerate(plan.sites):
            mlp = mlps[layer_of[place.site]]
            payload = _payload_of(conditioning, layer_of[place.site])
            if is_gathered:
                forwards.update(gathered_forwards(mlp, place.num_shared, number, payload))
            else:
                inputs[mlp.down] = masked(payload, number)
        with changed_inputs(inputs), replaced_forwards(forwards):
            yield


def _payload_of(conditioning: Conditioning, layer: int) -> Callable[[], Gates | Rows]:
    return lambda: conditioning.payload(layer)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    parameter = getattr(module, name)
    assert isinstance(parameter, nn.Parameter)
    return parameter
