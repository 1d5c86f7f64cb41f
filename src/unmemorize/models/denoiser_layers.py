"""The layers around a denoiser's sites: which ones make a neuron, which one reads it, and which one runs again.

    makers -> neuron -> reader        feed-forward: net.0.proj -> hidden neuron -> net.2
    hidden neurons                    rows of the makers (both halves of a gated unit), columns of the reader
    heads                             rows of queries, keys and values, columns of what reads them
    values                            rows of the value projection, columns of what reads them and nothing else

With activation checkpointing diffusers runs parts of a denoiser again during backward: each `Transformer2DModel` of a
UNet does so for its blocks, a transformer for all of its own. A site's `layer` is the nearest module around it that
does.

`resized` changes the width of feed-forward blocks and the number of heads of cross-attention. diffusers' configs do
not describe single blocks, so that a denoiser with other widths than its config's (`plain_widths`) cannot be saved as
an ordinary folder; nothing here saves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError, ModelNotSupported
from unmemorize.gates import is_plain_linear, module_at, require_closed, site_width
from unmemorize.models.denoising import Pipeline, denoiser_of
from unmemorize.models.diffusion import DenoiserRow, Kind, find_sites, row_for
from unmemorize.neurons import Site


@dataclass(frozen=True, slots=True)
class DenoiserSite:
    """One site of a denoiser with the layers around it.

    Attributes:
        site: the neurons.
        linear: the layer whose side they are.
        layer: nearest module around it that is run again under activation checkpointing.
        makers: layers whose rows make hidden neurons; empty for values, and where the table row names none.
        reader: layer whose columns read the values, if it reads nothing else; None for hidden neurons.
        attention: the module whose values they are; None for hidden neurons.
    """

    site: Site
    linear: nn.Module
    layer: nn.Module
    makers: tuple[nn.Module, ...]
    reader: nn.Module | None
    attention: nn.Module | None

    @property
    def head_size(self) -> int:
        """Neurons that must be resized together: those of a head for values, else 1."""
        heads = 0 if self.attention is None else int(getattr(self.attention, "heads", 0))
        return self.site.width // heads if heads else 1

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each half of a maker: one, or two where it makes what is multiplied by a gate as well."""
        is_fused = bool(self.makers) and site_width(self.makers[0], "out") == 2 * self.site.width
        return (0, self.site.width) if is_fused else (0,)


def find_places(
    pipe: Pipeline,
    kinds: Sequence[Kind] = ("hidden",),
    *,
    blocks: Sequence[str] | None = None,
    row: DenoiserRow | None = None,
) -> tuple[DenoiserSite, ...]:
    """Resolve sites with the layers around them, kind by kind, in the order in which they run.

    Args:
        pipe: the pipeline, or its denoiser.
        kinds: which sites.
        blocks: groups of blocks of the table row; all by default.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        ModelNotSupported, SitesNotFound: as `find_sites`.
        ConfigError: if a kind is unknown, or there is none.
    """
    if not kinds or not set(kinds) <= {"hidden", "values"} or len(set(kinds)) != len(kinds):
        raise ConfigError(f"kinds are {list(kinds)}, expected hidden, values, or both")
    row = row or row_for(pipe)
    denoiser = denoiser_of(pipe)
    chosen = [name for name, _ in row.blocks] if blocks is None else blocks
    return tuple(
        _place(denoiser, site, row)
        for kind in kinds
        for site in find_sites(pipe, kind, blocks=chosen, row=row)
    )


def _place(denoiser: nn.Module, site: Site, row: DenoiserRow) -> DenoiserSite:
    ends, others = (row.hidden, row.makers) if site.side == "in" else (row.values, row.readers)
    end = next(end for end in ends if site.path.endswith(f".{end}"))
    other = others[ends.index(end)] if others else ""
    beside = module_at(denoiser, site.path.removesuffix(end) + other) if other else None
    is_hidden = site.side == "in"
    return DenoiserSite(
        site,
        module_at(denoiser, site.path),
        _runs_again(denoiser, site.path),
        (beside,) if is_hidden and beside is not None else (),
        None if is_hidden else beside,
        None if is_hidden else module_at(denoiser, site.path.rpartition(".")[0]),
    )


def _runs_again(denoiser: nn.Module, path: str) -> nn.Module:
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = module_at(denoiser, ".".join(parts[:length]))
        if hasattr(module, "gradient_checkpointing") or hasattr(module, "_checkpoint_wrapped_module"):
            return module
    return denoiser


def pool_parameters(
    place: DenoiserSite, pool: slice, *, num_plain: int | None = None
) -> list[tuple[nn.Parameter, int, slice]]:
    """List the parts of parameters that belong to some neurons of a site and to no others.

    Args:
        place: the site.
        pool: first and last neuron of the site.
        num_plain: neurons before growing, if there were fewer: queries and keys of grown heads belong to the pool.

    Returns:
        (parameter, axis, slice) triples; what reads the neurons is last. Values that the picture contributes too (joint
        attention) own their rows only.

    Raises:
        ModelNotSupported: if the table row does not say what makes the hidden neurons.
    """
    start = place.site.start
    own = slice(start + pool.start, start + pool.stop)
    if place.site.side == "out":
        parts = _rows(place.linear, own)
        if num_plain is not None and pool.stop > num_plain:
            grown = slice(max(pool.start, num_plain), pool.stop)
            parts += [part for maker in _queries_and_keys(place) for part in _rows(maker, grown)]
        if place.reader is not None:
            parts.append((_weight(place.reader), 1, own))
        return parts
    if not place.makers:
        raise ModelNotSupported(
            f"the table row does not name what makes the neurons of {place.site.path}; pass row=DenoiserRow(..., "
            "makers=('ff.net.0.proj',)) with the name it uses"
        )
    parts = [
        part
        for maker in place.makers
        for half in place.starts
        for part in _rows(maker, slice(half + pool.start, half + pool.stop))
    ]
    return [*parts, (_weight(place.linear), 1, own)]


def _queries_and_keys(place: DenoiserSite) -> tuple[nn.Module, nn.Module]:
    attention = place.attention
    if place.reader is None or attention is None or place.head_size == 1:
        raise ModelNotSupported(
            f"the heads of {place.site.path} cannot grow, because what reads its values reads others too; grow hidden "
            "neurons, or carve values with share_frac"
        )
    if getattr(attention, "norm_q", None) is not None:
        raise ModelNotSupported(
            f"the heads of {place.site.path} cannot grow, because its queries are normalized; grow hidden neurons"
        )
    return cast("tuple[nn.Module, nn.Module]", (attention.to_q, attention.to_k))


def _rows(linear: nn.Module, rows: slice) -> list[tuple[nn.Parameter, int, slice]]:
    bias = getattr(linear, "bias", None)
    return [(_weight(linear), 0, rows), *([(bias, 0, rows)] if isinstance(bias, nn.Parameter) else [])]


def _weight(linear: nn.Module) -> nn.Parameter:
    weight = linear.weight
    assert isinstance(weight, nn.Parameter)
    return weight


@torch.no_grad()
def resized(pipe: Pipeline, selections: Mapping[Site, Tensor], row: DenoiserRow | None = None) -> nn.Module:
    """Return a copy of a denoiser in which blocks consist of chosen neurons; everything else is equal.

    Args:
        pipe: the pipeline, or its denoiser; left untouched.
        selections: site -> int64 tensor of shape (new width,): the old neuron that each new one copies, or -1 for a
            neuron of zeros. Values are chosen by whole heads.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        ConfigError: if a block of sinks or gates is open on the denoiser, or values are not chosen by whole heads.
        ModelNotSupported: if a layer has an adapter or is quantized, the table row does not name the makers, or heads
            share what reads them.
    """
    require_closed(denoiser_of(pipe))
    copied = copy.deepcopy(denoiser_of(pipe))
    for place in find_places(copied, ("values", "hidden"), row=row):
        if place.site not in selections:
            continue
        chosen, start = selections[place.site], place.site.start
        rows, columns = _layers_to_resize(place)
        for linear in (*rows, columns):
            if not is_plain_linear(linear):
                raise ModelNotSupported(
                    f"cannot resize {place.site.path}: a {type(linear).__name__} is more than a weight; merge its "
                    "adapter or dequantize it first"
                )
        for linear in rows:
            _select(linear, torch.cat([_shifted(chosen, half) for half in place.starts]), 0)
        _select(columns, torch.cat([torch.arange(start), _shifted(chosen, start)]), 1)
        if place.attention is not None:
            _set_heads(place, chosen)
    return copied


def _layers_to_resize(place: DenoiserSite) -> tuple[tuple[nn.Module, ...], nn.Module]:
    """Return the layers of a site whose rows change, and the one whose columns do."""
    if place.site.side == "out":
        queries_and_keys = _queries_and_keys(place)
        assert place.reader is not None
        return (place.linear, *queries_and_keys), place.reader
    pool_parameters(place, slice(0, place.site.width))  # raises if the makers are unknown
    return place.makers, place.linear


def _set_heads(place: DenoiserSite, chosen: Tensor) -> None:
    attention, size = cast("Any", place.attention), place.head_size
    heads = chosen.reshape(-1, size) if len(chosen) % size == 0 else chosen.new_zeros(0, size)
    within = torch.arange(size)
    is_whole = (heads == -1).all(1) | (
        (heads % size == within).all(1) & (heads // size == heads[:, :1] // size).all(1)
    )
    if not len(heads) or not bool(is_whole.all()):
        raise ConfigError(
            f"{place.site.path} has heads of {size} values, and {len(chosen)} of them were chosen; choose whole heads"
        )
    attention.heads = len(heads)
    for name, value in (
        ("inner_dim", len(chosen)),
        ("inner_kv_dim", len(chosen)),
        ("sliceable_head_dim", len(heads)),
    ):
        if hasattr(attention, name):
            setattr(attention, name, value)


def _shifted(chosen: Tensor, start: int) -> Tensor:
    return torch.where(chosen < 0, -1, chosen + start)


def _select(linear: nn.Module, chosen: Tensor, axis: int) -> None:
    """Replace a layer's rows (axis 0, with the bias) or columns (axis 1) by chosen ones; -1 is zeros."""
    names = ("weight", "bias") if axis == 0 and linear.bias is not None else ("weight",)
    for name in names:
        old = getattr(linear, name)
        chosen = chosen.to(old.device)
        new = old.index_select(axis, chosen.clamp(min=0))
        new.movedim(axis, 0)[chosen < 0] = 0
        setattr(linear, name, nn.Parameter(new, requires_grad=old.requires_grad))
    setattr(linear, "out_features" if axis == 0 else "in_features", len(chosen))


def require_no_adapters(pipe: Pipeline) -> None:
    """Raise `ModelNotSupported` if a layer of a denoiser has an adapter, so that no ordinary folder describes it."""
    wrapped = adapted(denoiser_of(pipe))
    if wrapped:
        raise ModelNotSupported(
            f"{wrapped[0]} and {len(wrapped) - 1} other layers have adapters, whose names no ordinary folder has; save "
            "them on their own and take them off first (save_lora_adapter, unload_lora), or merge them"
        )


def adapted(module: nn.Module) -> list[str]:
    """List the layers that wrap another one as `base_layer`, as adapters of peft do; "" is the module itself."""
    return [name for name, layer in module.named_modules() if hasattr(layer, "base_layer")]


def plain_widths(pipe: Pipeline, row: DenoiserRow | None = None) -> dict[str, int]:
    """Return how many neurons a denoiser's config gives each site: path -> width.

    Raises:
        ModelNotSupported: if the denoiser has no config of diffusers.
    """
    denoiser: Any = denoiser_of(pipe)
    if not hasattr(denoiser, "from_config"):
        raise ModelNotSupported(
            f"{type(denoiser).__name__} has no config of diffusers, which would tell its plain widths; pass a model of "
            "diffusers"
        )
    with torch.device("meta"):
        plain = type(denoiser).from_config(denoiser.config)
    places = find_places(plain, ("values", "hidden"), row=row or row_for(pipe))
    return {place.site.path: place.site.width for place in places}


def has_plain_widths(pipe: Pipeline, row: DenoiserRow | None = None) -> bool:
    """Tell whether a denoiser has the widths that its config says, so that an ordinary folder describes it."""
    widths = plain_widths(pipe, row)
    places = find_places(pipe, ("values", "hidden"), row=row)
    return all(place.site.width == widths[place.site.path] for place in places)
