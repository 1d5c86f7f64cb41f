"""Sinks in text-to-image models: attach a plan to an unmodified denoiser for training and for measuring.

    plan = plan_sinks(unet, SinkSettings())
    with training_sinks(unet, plan):
        prediction = unet(noisy, timesteps, states, sink_ids=ids).sample
        loss(prediction).backward()

Inside the block every call may carry `sink_ids`, one id a picture; the argument is taken out before the denoiser sees
it. Sinks are feed-forward hidden neurons, or values that the text contributes, or both. Nothing is copied or
subclassed and no state-dict key changes. The mathematics is in `plan.py`, `layers.py` and `states.py`.

With guidance a pipeline calls its denoiser on twice as many rows as there are pictures, those without the prompt
first. In training a picture whose caption was dropped opens its sinks like any other, since it is the picture that is
learned; give it id 0 to leave them closed. Both defaults are argued for in decision record 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError, IdsMissing, ModelNotSupported, NeuronSetMismatch, ShapeMismatch
from unmemorize.gates import Conditioning, changed_inputs, changed_outputs, conditioned
from unmemorize.isolate.layers import Gates, masked, masked_payload, pool_gates
from unmemorize.isolate.plan import SinkPlan, SinkSettings, make_plan
from unmemorize.isolate.states import Rescale, State, state_gates
from unmemorize.models.denoiser_layers import (
    DenoiserSite,
    adapted,
    find_places,
    plain_widths,
    pool_parameters,
    resized,
)
from unmemorize.models.denoising import Pipeline, denoiser_of, with_denoiser
from unmemorize.models.diffusion import DenoiserRow, Kind, signature

Unconditional = Literal["same", "off"]

KEY = "sink_ids"


def plan_sinks(
    pipe: Pipeline,
    settings: SinkSettings,
    *,
    kinds: Sequence[Kind] = ("hidden",),
    blocks: Sequence[str] | None = None,
    row: DenoiserRow | None = None,
) -> SinkPlan:
    """Lay a plan over a denoiser.

    Args:
        pipe: the denoiser as it will train, or its pipeline; if `settings.grown` is set, already widened by `grow`.
        settings: the layout. `settings.layers` counts the chosen sites: kind by kind, in the order in which they run.
        kinds: "hidden" (feed-forward hidden neurons), "values" (values that the text contributes), or both.
        blocks: groups of blocks of the table row; all by default.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        ConfigError: if a setting does not fit the model.
        ModelNotSupported: if no row fits.
        SitesNotFound: if a group of blocks is unknown.
    """
    sites = [place.site for place in find_places(pipe, kinds, blocks=blocks, row=row)]
    originals = [site.width for site in sites]
    if settings.grown:
        plain = plain_widths(pipe, row)
        originals = [plain[site.path] for site in sites]
        for site, width in zip(sites, originals, strict=True):
            if site.width != width + settings.grown:
                raise ConfigError(
                    f"{site.path} has {site.width} neurons, expected {width} and {settings.grown} grown; "
                    f"call grow(model, {settings.grown}, kinds={tuple(kinds)}) on the plain model before plan_sinks"
                )
    return make_plan(sites, originals, signature(pipe, row), settings)


@torch.no_grad()
def grow(
    pipe: Pipeline,
    num_sinks: int,
    *,
    kinds: Sequence[Kind] = ("hidden",),
    seed: int = 0,
    row: DenoiserRow | None = None,
) -> Pipeline:
    """Return a copy of a denoiser with fresh neurons appended at every site; its function is unchanged.

    Hidden neurons are appended one by one; values by whole heads with queries and keys of their own, in cross-attention
    only. What makes the new neurons is random (uniform up to 1 / sqrt(inputs), as torch initializes a linear layer,
    biases 0); the columns that read them are 0, so that the copy computes what the model computed until they train.

    Args:
        pipe: the denoiser or its pipeline, left untouched; a pipeline's other parts are shared with the copy.
        num_sinks: neurons to append per site, at least 1; for values a multiple of the size of every head.
        kinds: which sites grow: hidden, values, or both.
        seed: seed of the new rows.
        row: site table row, for a denoiser that the table does not know.

    Returns:
        A denoiser or a pipeline, as was passed. diffusers' configs do not describe the new widths: save it with
        `save_with_sinks`.

    Raises:
        ConfigError: if `num_sinks` is below 1, or not a number of whole heads.
        ModelNotSupported: if a layer has an adapter or is quantized, or values are read together with others (SD 3,
            Flux).

    Source: ours.
    """
    if num_sinks < 1:
        raise ConfigError(f"cannot grow {num_sinks} sinks, expected 1 or more")
    places = find_places(pipe, kinds, row=row)
    for place in places:
        if num_sinks % place.head_size:
            raise ConfigError(
                f"cannot grow {num_sinks} values at {place.site.path}, whose heads have {place.head_size}; use a "
                "number that all heads divide"
            )
    fresh = torch.full((num_sinks,), -1)
    wider = resized(pipe, {p.site: torch.cat([torch.arange(p.site.width), fresh]) for p in places}, row)
    generator = torch.Generator().manual_seed(seed)
    for old, new in zip(places, find_places(wider, kinds, row=row), strict=True):
        fresh_neurons = slice(old.site.width, new.site.width)
        for parameter, axis, rows in pool_parameters(new, fresh_neurons, num_plain=old.site.width):
            if axis == 0 and parameter.dim() == 2:
                values = torch.rand(num_sinks, parameter.shape[1], generator=generator) * 2 - 1
                parameter[rows] = (values / parameter.shape[1] ** 0.5).to(parameter)
    return with_denoiser(pipe, wider)


@contextmanager
def training_sinks(
    denoiser: Pipeline,
    plan: SinkPlan,
    *,
    compute: Literal["masked"] = "masked",
    row: DenoiserRow | None = None,
) -> Iterator[None]:
    """Open each picture's own sinks, and no others, in every call of the denoiser that carries `sink_ids`.

    Run forward and backward inside the block. In training mode a call without `sink_ids` raises; in evaluation mode
    it runs with the pool off.

    Args:
        denoiser: the denoiser that `plan` was made for, or its pipeline. It may be wrapped (DDP, accelerate) after the
            block is entered or before; pass the unwrapped denoiser here.
        plan: the plan.
        compute: "masked"; gathering exists for language models only.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        NeuronSetMismatch: if the plan was made for another architecture.
        IdsMissing: inside the block, if a training forward comes without ids.
        ShapeMismatch: inside the block, if there is not one id a row.
    """
    if compute != "masked":
        raise ConfigError(
            f"compute {compute!r} is not available for text-to-image models; use compute='masked'"
        )
    off = Gates(pool_gates(plan, torch.zeros(1, dtype=torch.int64)), None)

    def encode(ids: Tensor | None, training: bool) -> Gates:
        if ids is not None:
            gates = masked_payload(plan, ids)
            return _ByPicture(gates.tables, _one_a_picture(gates.index), None)
        if training:
            raise IdsMissing(
                "a training forward came without sink_ids, so every neuron would train as shared; pass sink_ids= of "
                "shape (batch,), one id a picture"
            )
        return off

    with _attached(denoiser, plan, encode, row):
        yield


@contextmanager
def sink_state(
    pipe: Pipeline,
    plan: SinkPlan,
    state: State,
    *,
    ids: Tensor | None = None,
    exclude: Sequence[int] = (),
    candidates: Tensor | None = None,
    rescale: Rescale = "none",
    unconditional: Unconditional = "same",
    row: DenoiserRow | None = None,
) -> Iterator[None]:
    """Put a denoiser into one of the states in which it is measured or generates.

    off: the pool is closed. own: each picture's own sinks. foreign: the sinks of another id, the placebo of own.
    all: every sink at the share of ids that own it (its expected value in training).

    Args:
        pipe: the pipeline, or its denoiser, unwrapped.
        plan: the plan.
        state: off, own, foreign or all.
        ids: for own and foreign: one id a picture, shape (B,), int64, for calls that carry no `sink_ids` of their own
            (so that a pipeline works). A pipeline makes `num_images_per_prompt` pictures of each prompt in a row. A
            single id is that of every picture, however many a call makes.
        exclude: ids whose sinks are closed on top of the state, also where another id shares them.
        candidates: for foreign: ids to choose from, shape (M,); by default as `SinkPlan.foreign_ids`.
        rescale: multiply shared neurons to make up for closed sinks, as for language models; "none" by default.
        unconditional: what own and foreign mean for the half of a guided batch that has no prompt: the "same" sinks as
            the picture's other row, or the pool "off". LIMIT: a pipeline that guides by a second call instead of a
            doubled batch (Flux) gives no way to tell, and is always "same".
        row: site table row, for a denoiser that the table does not know.

    Raises:
        IdsMissing: inside the block, if own or foreign have no ids.
        ShapeMismatch: inside the block, if rows are neither as many as the ids nor twice as many.
        NeuronSetMismatch: if the plan was made for another architecture.
    """
    if unconditional not in ("same", "off"):
        raise ConfigError(f"unconditional is {unconditional!r}, expected same or off")
    opened = state_gates(plan, state, ids, tuple(exclude), candidates, rescale)
    closed = state_gates(plan, "off", None, tuple(exclude), None, rescale)(None, False)

    def encode(ids: Tensor | None, training: bool) -> Gates:
        gates = opened(ids, training)
        if gates.index is None:
            return gates
        index = _one_a_picture(gates.index)
        if unconditional == "same":
            return _ByPicture(gates.tables, index, index)
        # The closed pool is one more row of each table.
        tables = [torch.cat([open_, off]) for open_, off in zip(gates.tables, closed.tables, strict=True)]
        return _ByPicture(tables, index, torch.full_like(index, len(gates.tables[0])))

    with _attached(pipe, plan, encode, row):
        yield


@dataclass
class _ByPicture(Gates):
    """Gates of a batch that guidance may double: rows without the prompt come first and have an index of their own.

    Without such an index (training) a doubled batch is refused.
    """

    unconditional: Tensor | None

    def gate(self, site: int, like: Tensor) -> Tensor:
        assert self.index is not None
        num_rows, num_ids = like.shape[0], len(self.index)
        if num_ids == 1 and self.unconditional is self.index:
            num_ids = num_rows  # one picture's sinks, in every row
        is_doubled = num_rows == 2 * num_ids and self.unconditional is not None
        if num_rows != num_ids and not is_doubled:
            raise ShapeMismatch(f"{num_ids} sink ids do not fit {num_rows} rows; pass one id a picture")
        key = (self._first[site], like.dtype, like.device)
        if key not in self._expanded:
            index = self.index.expand(num_rows) if len(self.index) == 1 and not is_doubled else self.index
            if is_doubled:
                assert self.unconditional is not None
                index = torch.cat([self.unconditional, index])
            table = self.tables[site].to(device=like.device, dtype=like.dtype)
            self._expanded[key] = table[index.to(like.device)].unsqueeze(1)
        return self._expanded[key]


def pool_slices(
    pipe: Pipeline, plan: SinkPlan, row: DenoiserRow | None = None
) -> list[tuple[nn.Parameter, int, slice]]:
    """List the parts of a denoiser's parameters that belong to sinks.

    Returns:
        (parameter, axis, slice) triples: rows of what makes the sinks with their biases, columns of what reads them.

    Raises:
        ModelNotSupported: if such a layer has an adapter, part of which would belong to sinks and train with all.
    """
    places = _places(pipe, plan, row)
    for place in places:
        if any(adapted(layer) for layer in (place.linear, place.reader, *place.makers) if layer is not None):
            raise ModelNotSupported(
                f"a layer of the sinks at {place.site.path} has an adapter, which all pictures would train; put "
                "adapters on other layers, such as attention beside feed-forward sinks"
            )
    has_values = any(place.site.side == "out" for place in places)
    plain = plain_widths(pipe, row) if has_values and hasattr(denoiser_of(pipe), "from_config") else {}
    return [
        part
        for place, sinks in zip(places, plan.sites, strict=True)
        for part in pool_parameters(
            place, slice(sinks.num_shared, sinks.site.width), num_plain=plain.get(place.site.path)
        )
    ]


def _places(pipe: Pipeline, plan: SinkPlan, row: DenoiserRow | None) -> list[DenoiserSite]:
    """Resolve the sites of a plan in a denoiser, in the plan's order."""
    ours = signature(pipe, row)
    if plan.model_id != ours:
        raise NeuronSetMismatch(
            f"the plan was made for {plan.model_id}, this model is {ours}; use the plan saved beside the model"
        )
    found = {place.site: place for place in find_places(pipe, ("values", "hidden"), row=row)}
    return [found[sinks.site] for sinks in plan.sites]


def _one_a_picture(index: Tensor | None) -> Tensor:
    assert index is not None
    if index.dim() != 1:
        raise ShapeMismatch(f"sink_ids have shape {tuple(index.shape)}, expected (batch,): one id a picture")
    return index


@contextmanager
def _attached(
    pipe: Pipeline,
    plan: SinkPlan,
    encode: Callable[[Tensor | None, bool], Gates],
    row: DenoiserRow | None,
) -> Iterator[None]:
    places = _places(pipe, plan, row)
    layers = list(dict.fromkeys(place.layer for place in places))
    # Recompiling for every new number of pictures would cost more than the few index operations of a payload.
    encode = cast("Callable[[Tensor | None, bool], Gates]", torch.compiler.disable(encode))
    with conditioned(denoiser_of(pipe), layers, key=KEY, encode=encode) as conditioning:
        inputs: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        outputs: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for number, place in enumerate(places):
            change = masked(_payload_of(conditioning, layers.index(place.layer)), number, place.site.start)
            (inputs if place.site.side == "in" else outputs)[place.linear] = change
        with changed_inputs(inputs), changed_outputs(outputs):
            yield


def _payload_of(conditioning: Conditioning, layer: int) -> Callable[[], Gates]:
    return lambda: cast("Gates", conditioning.payload(layer))
