"""Removal from diffusion models: switch neurons off for a while, fold that into the weights, or cut them out.

A gate on a value projection closes a row of it, bias included, for every position, step and half of a guided batch, so
that folding it gives the same latents bit for bit. Excising cuts a grown pool out, back to the widths that the
denoiser's config says; where some ids are to keep their sinks, the other sinks become zeros instead. Text encoder, VAE
and scheduler are shared with the original.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmemorize.errors import CheckpointMismatch, ConfigError
from unmemorize.files import whole_folder
from unmemorize.gates import closed, folded, gated, require_closed
from unmemorize.isolate.plan import SinkPlan
from unmemorize.isolate.sink_files import save_with_sinks
from unmemorize.models.denoiser_layers import (
    find_places,
    has_plain_widths,
    plain_widths,
    pool_parameters,
    require_no_adapters,
    resized,
)
from unmemorize.models.denoising import Pipeline, denoiser_of, with_denoiser
from unmemorize.models.diffusion import DenoiserRow, fingerprint, load, quiet_diffusers, require_same_model
from unmemorize.neurons import NeuronSet, Site
from unmemorize.remove.changes import changed_values, put_back, read_undo, undo_path, write_undo
from unmemorize.remove.folders import in_plain_process, write_manifest


@contextmanager
def deactivated(
    pipe: Pipeline, neurons: NeuronSet, *, scale: float = 0.0, row: DenoiserRow | None = None
) -> Iterator[None]:
    """Multiply neurons by `scale` in everything the pipeline does while the block is open; nested blocks multiply.

    Args:
        pipe: the pipeline.
        neurons: the neurons to switch off.
        scale: their factor, unitless; 0 switches them off.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        NeuronSetMismatch: if the set was made for another model.
    """
    require_same_model(neurons, pipe, row)
    with gated(denoiser_of(pipe), closed(neurons, scale=scale)):
        yield


def fold(
    pipe: Pipeline, neurons: NeuronSet, *, scale: float = 0.0, row: DenoiserRow | None = None
) -> Pipeline:
    """Return a pipeline whose denoiser has the gate in its weights; the other parts are shared with the original.

    Raises:
        NeuronSetMismatch: if the set was made for another model.
    """
    require_same_model(neurons, pipe, row)
    return with_denoiser(pipe, folded(denoiser_of(pipe), closed(neurons, scale=scale)))


def excise(pipe: Pipeline, neurons: NeuronSet, *, row: DenoiserRow | None = None) -> Pipeline:
    """Return a pipeline without a set of neurons, its feed-forward blocks as wide as the denoiser's config says.

    Hidden neurons and grown heads are cut out; blocks that would become narrower than the config says are filled up
    with neurons of zeros. Values of heads that were not grown are folded.

    Args:
        pipe: the pipeline, or its denoiser; other parts are shared with the result.
        neurons: the neurons to remove; of a grown model, at least as many per site as were grown.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        NeuronSetMismatch: if the set was made for another model.
        ConfigError: if a block would stay wider than its config says, so that no ordinary folder describes it.
    """
    require_same_model(neurons, pipe, row)
    widths = plain_widths(pipe, row)
    chosen: dict[Site, Tensor] = {}
    values: dict[Site, tuple[int, ...]] = {}
    for place in find_places(pipe, ("values", "hidden"), row=row):
        site, plain = place.site, widths[place.site.path]
        gone = set(neurons.indices.get(site, ()))
        kept = [i for i in range(site.width) if i not in gone]
        # Heads are cut as a whole, so that of values the grown ones go, and others are zeroed where they are.
        stays = [i for i in kept if i >= plain] if site.side == "out" else kept[plain:]
        if stays:
            raise ConfigError(
                f"{site.path} would keep {plain + len(stays)} neurons, its config says {plain}; remove the whole grown "
                "pool (plan.pool()), or keep some ids' sinks with keep_sinks and export_with_sinks"
            )
        if site.side == "in" and gone:
            chosen[site] = torch.tensor(kept + [-1] * (plain - len(kept)), dtype=torch.int64)
        elif site.side == "out":
            if site.width > plain:
                chosen[site] = torch.arange(plain)
            values[replace(site, width=plain)] = tuple(sorted(i for i in gone if i < plain))
    smaller = resized(pipe, chosen, row)
    left = {site: indices for site, indices in values.items() if indices}
    return with_denoiser(pipe, folded(smaller, closed(NeuronSet(neurons.model_id, left))))


@torch.no_grad()
def keep_sinks(
    pipe: Pipeline, plan: SinkPlan, ids: Sequence[int], *, row: DenoiserRow | None = None
) -> Pipeline:
    """Return a pipeline whose sinks are zeros, those of some ids excepted; widths and plan stay as they are.

    What makes a removed sink goes as well as what reads it. Queries and keys of grown heads stay, since kept values
    are weighted by them. A sink that a kept and another id own is kept.

    Args:
        pipe: the pipeline with its sinks, left untouched; parts other than the denoiser are shared with the result.
        plan: its plan.
        ids: whose sinks stay, each in 1 .. 2**63 - 1.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        NeuronSetMismatch: if the plan was made for another architecture.
        IdError: if an id is out of range, or unknown to a disjoint plan.
        ConfigError: if a block of sinks or gates is open on the denoiser.
    """
    gone = plan.pool() - plan.neurons_for(list(ids))
    require_same_model(gone, pipe, row)
    require_closed(denoiser_of(pipe))
    copied = copy.deepcopy(denoiser_of(pipe))
    for place in find_places(copied, ("values", "hidden"), row=row):
        for neuron in gone.indices.get(place.site, ()):
            for parameter, axis, part in pool_parameters(place, slice(neuron, neuron + 1)):
                parameter.narrow(axis, part.start, part.stop - part.start).zero_()
    return with_denoiser(pipe, copied)


def export_with_sinks(
    pipe: Pipeline,
    plan: SinkPlan,
    folder: str | Path,
    *,
    manifest: dict[str, Any],
    row: DenoiserRow | None = None,
) -> Path:
    """Write a pipeline with the sinks that it has kept, and the manifest; complete or not at all.

    The folder loads with `DiffusionPipeline.from_pretrained` as the model without its grown pool. `load_with_sinks`
    gives the kept sinks too, to be opened by `sink_state`.

    Args:
        pipe: the pipeline, as `keep_sinks` returns it.
        plan: its plan.
        folder: destination; must not exist, or be empty.
        manifest: what was done; stored as `unmemorize.json` with format, version and the denoiser's fingerprint.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        NeuronSetMismatch: if the plan was made for another architecture.
        ModelNotSupported: if the denoiser has adapters.
        RunFolderError: if the destination holds something, or cannot be written.
    """
    with whole_folder(folder) as partial:
        save_with_sinks(pipe, plan, partial, row=row)
        write_manifest(partial, manifest, fingerprint(pipe, row))
    return Path(folder)


def export(
    pipe: Pipeline,
    folder: str | Path,
    *,
    manifest: dict[str, Any],
    original: Pipeline | None = None,
    row: DenoiserRow | None = None,
) -> Path:
    """Write a pipeline as a plain folder that `DiffusionPipeline.from_pretrained` loads; complete or not at all.

    With `original` the values of the denoiser that were changed are kept beside the folder (`changes.undo_path`), so
    that `undone` can put them back. Whoever has that file has the memory too: ship the folder, keep the file.

    Args:
        pipe: the pipeline after removal.
        folder: destination; must not exist, or be empty.
        manifest: what was done; stored as `unmemorize.json` with format, version and the denoiser's fingerprint.
        original: the pipeline before removal, for `undone`; its fingerprint is stored as `model`.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        CheckpointMismatch: if the original is of another architecture or dtype.
        RunFolderError: if the destination holds something, or cannot be written.
        ConfigError: if the denoiser has grown sinks, which no config describes.
        ModelNotSupported: if the denoiser has adapters.
    """
    require_no_adapters(pipe)
    if not has_plain_widths(pipe, row):
        raise ConfigError(
            "the denoiser has grown sinks, which its config does not describe, so that a folder would not load; excise "
            "the pool first, or keep it with save_with_sinks"
        )
    with whole_folder(folder) as partial:
        with quiet_diffusers():
            pipe.save_pretrained(partial)
        if original is not None:
            before = fingerprint(original, row)
            manifest = {**manifest, "model": before}
            undo = changed_values(denoiser_of(original), denoiser_of(pipe))
            write_undo(undo_path(folder), undo, original=before, result=fingerprint(pipe, row))
        write_manifest(partial, manifest, fingerprint(pipe, row))
    return Path(folder)


def undone(folder: str | Path, undo: str | Path | None = None, *, row: DenoiserRow | None = None) -> Pipeline:
    """Load an exported folder and put the original values of its denoiser back, bit for bit.

    All parts are loaded in the dtype that the denoiser had when it was exported. The folder is not changed.

    Args:
        folder: the exported folder.
        undo: its undo file; by default the one beside it.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        CheckpointMismatch: if the folder is not the one that the file was written with.
        FileFormatError: if there is no undo file, or it is torn.
    """
    values, original, result = read_undo(undo or undo_path(folder))
    dtype = next((value.dtype for value in values.values() if value.is_floating_point()), None)
    pipe = load(folder, row=row, dtype=dtype, run_check=False)
    ours = fingerprint(pipe, row)
    if ours != result:
        raise CheckpointMismatch(
            f"{folder} is {ours}, its undo data are for {result}; export the removal again"
        )
    put_back(denoiser_of(pipe), values)
    restored = fingerprint(pipe, row)
    if restored != original:
        raise CheckpointMismatch(f"undoing gave {restored}, not {original}; export the removal again")
    return pipe


_PLAIN_PROCESS = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
folder, options, out = sys.argv[1:]
options = json.loads(options)
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(folder)
generator = torch.Generator().manual_seed(options.pop("seed"))
latents = pipe(**options, generator=generator, output_type="latent").images
save_file({"latents": latents.float().contiguous()}, out)
"""


def prove_plain(folder: str | Path, prompt: str, *, seed: int = 0, **options: Any) -> Tensor:
    """Compute latents of an exported folder in a process in which `import unmemorize` fails.

    Args:
        folder: a pipeline folder.
        prompt: the prompt.
        seed: seed of the initial latents.
        options: further arguments of the pipeline's call that JSON can carry (`num_inference_steps`, `height`, …).

    Returns:
        Final latents, shape (1, …), float32.

    Raises:
        SelfCheckFailed: if the folder does not load without this library.
    """
    values = json.dumps({"prompt": prompt, "seed": seed, **options})
    return in_plain_process(_PLAIN_PROCESS, folder, [values])["latents"]
