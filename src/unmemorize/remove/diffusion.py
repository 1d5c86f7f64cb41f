"""Removal from diffusion models: switch neurons off for a while, or fold that into the weights and export the pipeline.

A gate on a value projection closes a row of it, bias included, for every position, step and half of a guided batch, so
that folding it gives the same latents bit for bit. Text encoder, VAE and scheduler are shared with the original.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from unmemorize.gates import closed, folded, gated
from unmemorize.models.denoising import Pipeline, denoiser_of, with_denoiser
from unmemorize.models.diffusion import DenoiserRow, fingerprint, quiet_diffusers, require_same_model
from unmemorize.neurons import NeuronSet
from unmemorize.remove.folders import in_plain_process, whole_folder, write_manifest


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


def export(
    pipe: Pipeline,
    folder: str | Path,
    *,
    manifest: dict[str, Any],
    row: DenoiserRow | None = None,
) -> Path:
    """Write a pipeline as a plain folder that `DiffusionPipeline.from_pretrained` loads; complete or not at all.

    Args:
        pipe: the pipeline after removal.
        folder: destination; must not exist, or be empty.
        manifest: what was done; stored as `unmemorize.json` with format, version and the denoiser's fingerprint.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        RunFolderError: if the destination holds something, or cannot be written.
    """
    with whole_folder(folder) as partial:
        with quiet_diffusers():
            pipe.save_pretrained(partial)
        write_manifest(partial, manifest, fingerprint(pipe, row))
    return Path(folder)


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
