"""Removal: a folded pipeline gives the gate's latents, bit for bit, also in a process without the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_diffusion import KINDS, tiny_pipeline
from unmemorize.errors import NeuronSetMismatch, RunFolderError
from unmemorize.models.denoising import denoiser_of
from unmemorize.models.diffusion import find_sites, fingerprint, load
from unmemorize.neurons import NeuronSet
from unmemorize.remove.diffusion import deactivated, export, fold, prove_plain

PROMPT = "a photo of the red cat"
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}


def latents(pipe: Any, prompt: str = PROMPT) -> Tensor:
    options = {
        **OPTIONS,
        **({"use_resolution_binning": False} if type(pipe).__name__.startswith("PixArt") else {}),
    }
    found: Tensor = pipe(
        prompt, **options, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    return found


def some_neurons(pipe: Any) -> NeuronSet:
    return NeuronSet(fingerprint(pipe), {site: tuple(range(0, site.width, 2)) for site in find_sites(pipe)})


@pytest.mark.parametrize("kind", KINDS)
def test_fold_gives_the_latents_of_the_gate(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    plain = latents(pipe)
    neurons = some_neurons(pipe)
    with deactivated(pipe, neurons):
        off = latents(pipe)
    assert not torch.equal(off, plain)
    assert torch.equal(latents(pipe), plain)
    edited = fold(pipe, neurons)
    assert torch.equal(latents(edited), off)
    assert torch.equal(latents(pipe), plain)
    assert denoiser_of(edited) is not denoiser_of(pipe)


@pytest.mark.parametrize("kind", ["sd1", "pixart", "sd3"])
def test_export_loads_without_the_library(kind: str, tmp_path: Path) -> None:
    tiny_pipeline(kind).save_pretrained(tmp_path / "original")
    # Weights mapped from a file lie at other addresses than fresh ones, and kernels round by alignment: load both.
    pipe = load(tmp_path / "original", run_check=False)
    pipe.set_progress_bar_config(disable=True)
    neurons = some_neurons(pipe)
    with deactivated(pipe, neurons):
        off = latents(pipe)
    folder = export(
        fold(pipe, neurons), tmp_path / "mended", manifest={"method": "fold", "neurons": len(neurons)}
    )
    options = {**OPTIONS, **({"use_resolution_binning": False} if kind == "pixart" else {})}
    assert torch.equal(prove_plain(folder, PROMPT, **options), off.float())
    manifest = json.loads((folder / "unmemorize.json").read_text())
    assert manifest["neurons"] == len(neurons)
    assert manifest["result"] == fingerprint(fold(pipe, neurons))
    assert {path.name for path in tmp_path.iterdir()} == {"mended", "original"}
    with pytest.raises(RunFolderError, match="already holds something"):
        export(pipe, folder, manifest={})


def test_nested_blocks_multiply_and_errors_restore() -> None:
    pipe = tiny_pipeline("sd1")
    plain = latents(pipe)
    neurons = some_neurons(pipe)
    with deactivated(pipe, neurons, scale=0.25):
        quarter = latents(pipe)
    with deactivated(pipe, neurons, scale=0.5), deactivated(pipe, neurons, scale=0.5):
        assert torch.equal(latents(pipe), quarter)
    with pytest.raises(KeyboardInterrupt), deactivated(pipe, neurons):
        raise KeyboardInterrupt
    assert torch.equal(latents(pipe), plain)


def test_another_checkpoint_is_refused() -> None:
    other = some_neurons(tiny_pipeline("sd1", seed=1))
    pipe = tiny_pipeline("sd1")
    with pytest.raises(NeuronSetMismatch, match="use the model it was made for"), deactivated(pipe, other):
        pass
    with pytest.raises(NeuronSetMismatch, match="use the model it was made for"):
        fold(pipe, other)
