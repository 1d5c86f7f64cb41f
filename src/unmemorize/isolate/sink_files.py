"""Pipelines with sinks on disk: an ordinary pipeline folder without the grown pool, and the pool beside it.

    folder/
        model_index.json, unet/ ...   the plain widths: loads with DiffusionPipeline.from_pretrained
        sinks.safetensors             grown neurons: <path>.maker<half>.weight, .bias (rows), <path>.reader.weight
        sinks.json                    the plan

diffusers' configs do not describe grown widths, so that the two parts are kept apart; `load_with_sinks` puts them
together again, bit for bit. A carved pool stays inside the ordinary folder, and sinks.safetensors is empty. Not a
removal: neurons that the plan carves are still in the plain part (see `remove.diffusion`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, FileFormatError, NeuronSetMismatch
from unmemorize.files import whole_folder
from unmemorize.isolate.plan import SinkPlan, load_plan
from unmemorize.models.denoiser_layers import (
    DenoiserSite,
    find_places,
    plain_widths,
    pool_parameters,
    require_no_adapters,
    resized,
)
from unmemorize.models.denoising import Pipeline, denoiser_of, with_denoiser
from unmemorize.models.diffusion import DenoiserRow, Kind, load, quiet_diffusers, signature

_KINDS: tuple[Kind, ...] = ("values", "hidden")
PLAN_FILE, POOL_FILE = "sinks.json", "sinks.safetensors"


def save_with_sinks(
    pipe: Pipeline, plan: SinkPlan, folder: str | Path, *, row: DenoiserRow | None = None
) -> Path:
    """Write a pipeline with its sinks; the folder appears complete or not at all.

    Args:
        pipe: the pipeline, its denoiser grown or not.
        plan: its plan.
        folder: destination; must not exist, or be empty.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        NeuronSetMismatch: if the plan was made for another architecture.
        ModelNotSupported: if the denoiser has adapters.
        RunFolderError: if the destination holds something, or cannot be written.
    """
    from safetensors.torch import save_file

    ours = signature(pipe, row)
    if plan.model_id != ours:
        raise NeuronSetMismatch(
            f"the plan was made for {plan.model_id}, this model is {ours}; save the plan the model was trained with"
        )
    require_no_adapters(pipe)
    widths = plain_widths(pipe, row)
    grown = [p for p in find_places(pipe, _KINDS, row=row) if p.site.width != widths[p.site.path]]
    tensors = {name: part.contiguous() for name, part in _grown_parts(grown, widths)}
    kept = {place.site: torch.arange(widths[place.site.path]) for place in grown}
    plain = with_denoiser(pipe, resized(pipe, kept, row)) if grown else pipe
    with whole_folder(folder) as partial:
        with quiet_diffusers():
            plain.save_pretrained(partial)
        plan.save(partial / PLAN_FILE)
        save_file(tensors, partial / POOL_FILE)
    return Path(folder)


@torch.no_grad()
def load_with_sinks(
    folder: str | Path, *, row: DenoiserRow | None = None, dtype: torch.dtype | None = None
) -> tuple[Pipeline, SinkPlan]:
    """Load what `save_with_sinks` wrote.

    Args:
        folder: the folder.
        row: site table row, for a denoiser that the table does not know.
        dtype: dtype of the weights; by default the checkpoint's.

    Returns:
        The pipeline with its pool, and the plan.

    Raises:
        FileFormatError: if a file is missing, torn or changed, or the pool does not fit the pipeline.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    plan = load_plan(Path(folder) / PLAN_FILE)
    pool_file = Path(folder) / POOL_FILE
    try:
        pool = load_file(pool_file)
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"{pool_file} cannot be read: {error}; copy the folder again") from error
    pipe = load(folder, row=row, dtype=dtype, run_check=False)
    widths = plain_widths(pipe, row)
    wider = {}
    for place in find_places(pipe, _KINDS, row=row):
        reader = pool.get(f"{place.site.path}.reader.weight")
        if reader is not None:
            fresh = torch.full((reader.shape[1],), -1)
            wider[place.site] = torch.cat([torch.arange(place.site.width), fresh])
    if wider:
        pipe = with_denoiser(pipe, resized(pipe, wider, row))
        places = [p for p in find_places(pipe, _KINDS, row=row) if p.site.width != widths[p.site.path]]
        _fill(places, widths, pool, pool_file)
    if signature(pipe, row) != plan.model_id:
        raise FileFormatError(
            f"{folder} holds {signature(pipe, row)}, its plan was made for {plan.model_id}; use the files of one folder"
        )
    denoiser_of(pipe).eval()
    return pipe, plan


def _grown_parts(places: list[DenoiserSite], widths: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Yield every part of the weights that belongs to grown neurons, as a view with a name."""
    for place in places:
        first, width = widths[place.site.path], place.site.width
        if width < first:
            raise ConfigError(
                f"{place.site.path} has {width} neurons, fewer than the {first} of its config; expected a grown model"
            )
        parts = pool_parameters(place, slice(first, width), num_plain=first)
        half = -1
        for parameter, axis, pool in parts[:-1]:
            half += parameter.dim() == 2
            kind = "bias" if parameter.dim() == 1 else "weight"
            yield (
                f"{place.site.path}.maker{half}.{kind}",
                parameter.data.narrow(axis, pool.start, width - first),
            )
        parameter, axis, pool = parts[-1]
        yield f"{place.site.path}.reader.weight", parameter.data.narrow(axis, pool.start, width - first)


def _fill(places: list[DenoiserSite], widths: dict[str, int], pool: dict[str, Tensor], path: Path) -> None:
    parts = dict(_grown_parts(places, widths))
    wrong = sorted(parts.keys() ^ pool.keys()) or [n for n in parts if parts[n].shape != pool[n].shape]
    if wrong:
        raise FileFormatError(f"{path} does not fit its pipeline at {wrong[0]}; use the files of one folder")
    for name, part in parts.items():
        part.copy_(pool[name])
