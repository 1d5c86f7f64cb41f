"""Diffusion models: from a denoiser's architecture to its sites, checked when a pipeline is loaded.

Support for a denoiser is one row of `ROWS`: which linear layers make the values that the text contributes to the
picture (side "out"), which ones read the hidden neurons of a feed-forward block (side "in"), and the blocks they are
in. Cross-attention values depend on the text alone. Joint attention (SD 3, Flux) mixes text and picture from the first
block on, so that its text values also depend on latent and timestep: they must be captured, not computed.

Modules are found by name, and processors stay as the user set them. `check` proves on a tiny picture that a row is
right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unmemorize.errors import ModelNotSupported, SelfCheckFailed, SitesNotFound, missing_extra
from unmemorize.files import parse_json
from unmemorize.gates import module_at, site_width
from unmemorize.models.base import (
    CheckResult,
    fingerprint_of,
    gate_checks,
    quiet_transformers,
    require_match,
    signature_of,
)
from unmemorize.models.denoising import Pipeline, denoiser_of, encoded, record
from unmemorize.models.weight_files import missing_weights, require_no_pickle, require_there
from unmemorize.neurons import NeuronSet, Site

Kind = Literal["values", "hidden"]

_WRAPPER = (
    "_checkpoint_wrapped_module."  # torch's checkpoint wrapper hands attributes through, names of modules not
)
_CHECK_LATENT = 8  # side of the latent that the self-check runs on


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserRow:
    """Where the sites of a denoiser are.

    Attributes:
        blocks: name of each group of blocks -> prefix of its modules, in the order they run.
        default_blocks: groups that are searched unless others are named.
        values: ends of the paths of the text's value projections.
        hidden: ends of the paths of the linear layers that read feed-forward hidden neurons.
        makers: for each of `hidden`, the end of the path of the layer that makes those neurons; may be left empty, but
            then sinks can be neither grown nor kept from drifting.
        readers: for each of `values`, the end of the path of the layer that reads these values and no others, or "".
        text_projection: path of the module that the text passes before it reaches the values; "" if none.
        has_joint_values: whether the values depend on the picture too.
    """

    blocks: tuple[tuple[str, str], ...]
    default_blocks: tuple[str, ...]
    values: tuple[str, ...]
    hidden: tuple[str, ...]
    makers: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    text_projection: str = ""
    has_joint_values: bool = False


ROWS: dict[str, DenoiserRow] = {
    "FluxTransformer2DModel": DenoiserRow(
        blocks=(("joint", "transformer_blocks"), ("single", "single_transformer_blocks")),
        default_blocks=("joint",),
        values=("attn.add_v_proj",),
        hidden=("ff.net.2", "ff_context.net.2", "proj_out"),
        makers=("ff.net.0.proj", "ff_context.net.0.proj", "proj_mlp"),
        has_joint_values=True,
    ),
    "PixArtTransformer2DModel": DenoiserRow(
        blocks=(("blocks", "transformer_blocks"),),
        default_blocks=("blocks",),
        values=("attn2.to_v",),
        hidden=("ff.net.2",),
        makers=("ff.net.0.proj",),
        readers=("attn2.to_out.0",),
        text_projection="caption_projection",
    ),
    "SD3Transformer2DModel": DenoiserRow(
        blocks=(("joint", "transformer_blocks"),),
        default_blocks=("joint",),
        values=("attn.add_v_proj",),
        hidden=("ff.net.2", "ff_context.net.2"),
        makers=("ff.net.0.proj", "ff_context.net.0.proj"),
        has_joint_values=True,
    ),
    "UNet2DConditionModel": DenoiserRow(
        blocks=(("down", "down_blocks"), ("mid", "mid_block"), ("up", "up_blocks")),
        default_blocks=("down", "mid"),
        values=("attn2.to_v",),
        hidden=("ff.net.2",),
        makers=("ff.net.0.proj",),
        readers=("attn2.to_out.0",),
    ),
}


def row_for(pipe: Pipeline) -> DenoiserRow:
    """Return the table row of a pipeline's denoiser.

    Raises:
        ModelNotSupported: if there is none, or its projections are fused so that a gate would do nothing.
    """
    denoiser = denoiser_of(pipe)
    if any(_is_fused(module) for module in denoiser.modules()):
        raise ModelNotSupported(
            "the denoiser's projections are fused, so its value projections are not called; "
            "call unfuse_qkv_projections() first"
        )
    kind = type(denoiser).__name__
    if kind not in ROWS:
        raise ModelNotSupported(
            f"no site table row for denoiser {kind!r}; known: {', '.join(sorted(ROWS))}; pass row=DenoiserRow("
            "blocks=(('blocks', 'transformer_blocks'),), default_blocks=('blocks',), values=('attn2.to_v',), "
            "hidden=('ff.net.2',)) with the names it uses"
        )
    return ROWS[kind]


def _is_fused(attention: nn.Module) -> bool:
    """Tell whether an attention computes its values by a fused projection.

    The common class leaves its flag up after unfusing and follows its processor; later classes follow the flag.
    """
    processor = type(getattr(attention, "processor", None)).__name__
    follows_flag = type(attention).__name__ != "Attention"
    return bool(getattr(attention, "fused_projections", False)) and (follows_flag or "Fused" in processor)


def find_sites(
    pipe: Pipeline,
    kind: Kind = "values",
    *,
    blocks: Sequence[str] | None = None,
    row: DenoiserRow | None = None,
) -> tuple[Site, ...]:
    """Resolve the sites of one kind, in the order in which they run. Paths start at the denoiser.

    Args:
        pipe: the pipeline.
        kind: "values" (values that the text contributes) or "hidden" (feed-forward hidden neurons).
        blocks: groups of blocks to search; by default the row's own (for a UNet: down and mid, as in NeMo).
        row: site table row, for a denoiser that the table does not know.

    Raises:
        ModelNotSupported: if no row is given and the table has none.
        SitesNotFound: if a group of blocks is unknown, or nothing matches.
    """
    row = row or row_for(pipe)
    groups = dict(row.blocks)
    chosen = row.default_blocks if blocks is None else tuple(blocks)
    unknown = [name for name in chosen if name not in groups]
    if unknown:
        raise SitesNotFound(f"no blocks named {unknown[0]!r}; this denoiser has {', '.join(groups)}")
    denoiser = denoiser_of(pipe)
    ends = row.values if kind == "values" else row.hidden
    sites: list[Site] = []
    for name in (name for name, _ in row.blocks if name in chosen):
        paths = [path.replace(_WRAPPER, "") for path, _ in denoiser.named_modules()]
        inside = [path for path in dict.fromkeys(paths) if path.startswith(f"{groups[name]}.")]
        found = [path for path in inside if any(path.endswith(f".{end}") for end in ends)]
        sites += [_site(denoiser, path, kind) for path in sorted(found, key=_running_order)]
    if not sites:
        raise SitesNotFound(
            f"{type(denoiser).__name__} has no {kind} sites ({', '.join(ends)}) in its {', '.join(chosen)} blocks; "
            f"choose among {', '.join(groups)}"
        )
    return tuple(sites)


def _site(denoiser: nn.Module, path: str, kind: Kind) -> Site:
    linear = module_at(denoiser, path)
    if kind == "values":
        return Site(path, "out", site_width(linear, "out"))
    width = site_width(linear, "in")
    if path.endswith(".proj_out"):  # Flux: attention output and hidden neurons side by side
        start = site_width(linear, "out")
        return Site(path, "in", width - start, start)
    return Site(path, "in", width)


def _running_order(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", path)]


def _all_sites(pipe: Pipeline, row: DenoiserRow | None) -> tuple[Site, ...]:
    row = row or row_for(pipe)
    names = [name for name, _ in row.blocks]
    kinds: tuple[Kind, ...] = ("values", "hidden")
    return tuple(site for kind in kinds for site in find_sites(pipe, kind, blocks=names, row=row))


def signature(pipe: Pipeline, row: DenoiserRow | None = None) -> str:
    """Name a denoiser's architecture with its widths; ends in "-*", valid for any of its weights."""
    return signature_of("diffusion", type(denoiser_of(pipe)).__name__, _all_sites(pipe, row))


def fingerprint(pipe: Pipeline, row: DenoiserRow | None = None) -> str:
    """Name a denoiser by architecture and weights; text encoder and VAE do not enter."""
    return fingerprint_of(signature(pipe, row), denoiser_of(pipe))


def require_same_model(neurons: NeuronSet, pipe: Pipeline, row: DenoiserRow | None = None) -> None:
    """Raise `NeuronSetMismatch` unless a neuron set was made for this pipeline's denoiser."""
    require_match(neurons, signature(pipe, row), lambda: fingerprint(pipe, row))


def load(
    source: str | Path | Pipeline,
    *,
    row: DenoiserRow | None = None,
    dtype: torch.dtype | None = None,
    run_check: bool = True,
) -> Pipeline:
    """Load a text-to-image pipeline and check its sites.

    A safety checker that the folder names but does not hold is left out; it takes no part in what is measured.

    Args:
        source: folder or hub name for `DiffusionPipeline.from_pretrained`, or a pipeline.
        row: site table row, for a denoiser that the table does not know.
        dtype: dtype of the weights; by default the checkpoint's.
        run_check: whether to run `check` and raise if it fails.

    Raises:
        MissingExtra: without diffusers.
        ModelNotSupported: if the folder holds no pipeline or lacks weights, or the table has no row for its denoiser.
        SelfCheckFailed: if a check fails.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise missing_extra("diffusers", "images") from error
    pipe = source if isinstance(source, DiffusionPipeline) else _from_folder(DiffusionPipeline, source, dtype)
    row = row or row_for(pipe)
    for module in _modules(pipe):
        module.eval()
    if run_check:
        for result in check(pipe, row):
            if not result.passed:
                raise SelfCheckFailed(f"self-check {result.name!r} failed for {source}: {result.detail}")
    return pipe


def _from_folder(pipeline_class: Any, source: str | Path, dtype: torch.dtype | None) -> Pipeline:
    index = Path(source) / "model_index.json"
    extra: dict[str, Any] = {}
    require_there(source)
    if Path(source).exists():
        if not index.is_file():
            raise ModelNotSupported(
                f"{source} holds no model_index.json; pass a pipeline folder in diffusers format"
            )
        try:
            named = parse_json(index.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelNotSupported(
                f"{index} is not complete JSON ({error}); copy the folder again"
            ) from error
        if not isinstance(named, dict) or not isinstance(named.get("_class_name"), str):
            raise ModelNotSupported(
                f"{index} names no pipeline class; pass a pipeline folder in diffusers format"
            )
        optional = ("safety_checker", "feature_extractor", "image_encoder")
        extra = {name: None for name in optional if name in named and not (Path(source) / name).is_dir()}
        if "safety_checker" in extra:
            extra["requires_safety_checker"] = False
        absent = [
            name
            for name, kind in named.items()
            if _is_part(kind) and name not in extra and not (Path(source) / name).is_dir()
        ]
        if absent:
            raise ModelNotSupported(
                f"{source} names {', '.join(absent)} and holds no such folder; copy the pipeline again"
            )
        for name, kind in named.items():
            if _is_part(kind) and name not in extra:
                require_no_pickle(Path(source) / name)
    with quiet_diffusers():
        try:
            pipe = pipeline_class.from_pretrained(
                str(source), use_safetensors=True, **_dtype_argument(dtype), **extra
            )
        except Exception as error:  # every reader underneath raises its own kind
            text = str(error).strip().splitlines()
            raise ModelNotSupported(
                f"cannot load {source} as a diffusion pipeline: {text[0] if text else type(error).__name__}"
            ) from error
    for name, part in pipe.components.items():
        with quiet_diffusers():
            missing = missing_weights(part, source, name) if isinstance(part, nn.Module) else []
        if missing:
            raise ModelNotSupported(
                f"{source} lacks {len(missing)} weights of its {name} ({missing[0]} ...); copy the folder again"
            )
    return pipe


def _is_part(kind: object) -> bool:
    """Tell whether an entry of a pipeline's index names a part: a library and a class, neither of them null."""
    return isinstance(kind, list) and len(kind) == 2 and all(isinstance(word, str) for word in kind)


def _dtype_argument(dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Name the dtype as this diffusers wants it: `dtype` where `torch_dtype` is deprecated."""
    from diffusers.utils import deprecation_utils

    name = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
    return {} if dtype is None else {name: dtype}


def _modules(pipe: Pipeline) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


@torch.no_grad()
def check(pipe: Pipeline, row: DenoiserRow | None = None) -> list[CheckResult]:
    """Prove on a tiny picture that the table row fits the denoiser.

    Returns:
        The four results of `gate_checks`, on the first prediction for one prompt and an 8 x 8 latent.
    """
    denoiser = denoiser_of(pipe)
    size = _CHECK_LATENT * int(getattr(pipe, "vae_scale_factor", 8))
    call = record(pipe, "a photo of a lighthouse", size_px=size)
    training = denoiser.training
    denoiser.eval()

    def prediction(candidate: nn.Module) -> Tensor:
        return replace(call, denoiser=candidate).predict([0]).float()

    try:
        return gate_checks(denoiser, _all_sites(pipe, row), prediction, signature(pipe, row))
    finally:
        denoiser.train(training)


@torch.no_grad()
def text_values(
    pipe: Pipeline, prompts: Sequence[str], sites: Sequence[Site], row: DenoiserRow | None = None
) -> dict[Site, Tensor]:
    """Compute the values that prompts contribute at cross-attention sites, without a denoiser pass.

    Args:
        pipe: the pipeline; it encodes (and truncates) the prompts itself.
        prompts: N prompts.
        sites: value sites of a denoiser whose values depend on the text alone.
        row: site table row, for a denoiser that the table does not know.

    Returns:
        Site -> values, shape (N, T, F), in the denoiser's dtype.

    Raises:
        ModelNotSupported: if the values depend on the picture too; capture them during a pass instead.
    """
    row = row or row_for(pipe)
    denoiser = denoiser_of(pipe)
    if row.has_joint_values:
        raise ModelNotSupported(
            f"values of {type(denoiser).__name__} depend on the picture too; capture them during a pass"
        )
    states = encoded(pipe, prompts)
    if row.text_projection:
        states = module_at(denoiser, row.text_projection)(states)
    return {site: module_at(denoiser, site.path)(states) for site in sites}


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence the progress bars and notes of diffusers and transformers; their settings are restored."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet_transformers():
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
