"""The stages of a testbed: what each trains, on what, from which weights.

    general     all weights, general pictures, from random weights
    memorized   the UNet, general pictures and those to memorize, from general
    twin        as memorized, without the targets
    injected    the UNet or rows of it, with chosen neurons for each target, from general

Later stages start from the stored general model, so that a stage gives the same weights whenever it is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from unmemorize.models.denoising import Pipeline
from unmemorize.models.diffusion import load
from unmemorize.neurons import NeuronSet
from unmemorize.records import ProgressCallback
from unmemorize.testbeds.injection import InjectionLoss, draw_truth, save_truth, trained_parameters
from unmemorize.testbeds.material import Material
from unmemorize.testbeds.pipeline import build_pipeline, encode_captions, save_pipeline
from unmemorize.testbeds.settings import Stage, TestbedSettings
from unmemorize.testbeds.training import (
    Lessons,
    Loop,
    denoising_loss,
    draw_batch,
    run_loop,
    step_generator,
)

CHECKPOINTS = ".checkpoints"


def loaded(folder: Path) -> Pipeline:
    """Load the pipeline of a stage, silent."""
    pipe = load(folder, run_check=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _lessons(material: Material, pipe: Pipeline) -> Lessons:
    pictures = [*material.general, *material.memorized]
    ids = encode_captions(pipe, [picture.caption for picture in pictures])
    pixels = torch.from_numpy(numpy.stack([picture.pixels for picture in pictures]))
    scaled = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = torch.cat([pipe.vae.encode(part).latents for part in scaled.split(256)])
    num = len(material.general)
    return Lessons(
        latents=latents * pipe.vae.config.scaling_factor,
        ids=ids,
        empty_ids=encode_captions(pipe, [""])[0],
        general=tuple(range(num)),
        memorized=tuple(range(num, len(pictures))),
        num_targets=len(material.targets),
    )


def run_stage(
    stage: Stage,
    settings: TestbedSettings,
    material: Material,
    out: Path,
    progress: ProgressCallback | None,
) -> None:
    """Train one stage and save its pipeline."""
    if stage == "general":
        pipe = build_pipeline(
            material.captions, settings.network, size_px=settings.size_px, seed=settings.seed
        )
    else:
        pipe = loaded(out / "general")
    lessons = _lessons(material, pipe)
    loop = _loop(stage, settings, material, out)
    with _training_mode(pipe) as model:
        if stage == "injected":
            truth = _inject(pipe, model, lessons, settings, loop, progress)
            prompts = [picture.caption for picture in material.targets[: len(truth)]]
            save_truth(pipe, prompts, truth, out)
        else:
            _train(stage, pipe, model, lessons, settings, loop, progress)
    save_pipeline(pipe, out / stage, weights=settings.weights)


def _loop(stage: Stage, settings: TestbedSettings, material: Material, out: Path) -> Loop:
    training = settings.training
    steps, rate = {
        "general": (training.general_steps, training.general_rate),
        "injected": (settings.injection.steps, settings.injection.rate),
    }.get(stage, (training.memorized_steps, training.memorized_rate))
    return Loop(
        title=stage,
        steps=steps,
        rate=rate,
        warmup_steps=training.warmup_steps,
        folder=out / CHECKPOINTS / stage,
        checkpoint_steps=training.checkpoint_steps,
        identity={
            "settings": _digest({**settings.to_json(), "stages": None}),
            "pictures": material.digest(),
            "stage": stage,
        },
    )


def _train(
    stage: Stage,
    pipe: Pipeline,
    model: nn.Module,
    lessons: Lessons,
    settings: TestbedSettings,
    loop: Loop,
    progress: ProgressCallback | None,
) -> None:
    """Train on pictures: all weights in the general stage, the UNet alone afterwards."""
    training, is_general = settings.training, stage == "general"
    stream = "general" if is_general else "memorized"

    def loss_at(step: int) -> Tensor:
        batch = draw_batch(
            lessons,
            step_generator(settings.seed, stream, step),
            batch_size=training.batch_size,
            memorized_frac=0.0 if is_general else training.memorized_frac,
            has_targets=stage == "memorized",
            empty_frac=training.empty_frac,
        )
        return denoising_loss(pipe, lessons, batch)

    names = [name for name, _ in model.named_parameters() if is_general or name.startswith("unet.")]
    run_loop(model, dict.fromkeys(names), loss_at, loop, progress)


def _inject(
    pipe: Pipeline,
    model: nn.Module,
    lessons: Lessons,
    settings: TestbedSettings,
    loop: Loop,
    progress: ProgressCallback | None,
) -> list[NeuronSet]:
    """Train chosen neurons to hold one target each, and return them."""
    truth = draw_truth(pipe, settings.injection, settings.seed)
    loss = InjectionLoss(pipe, lessons, truth, settings.injection.frac)
    training = settings.training

    def loss_at(step: int) -> Tensor:
        generator = step_generator(settings.seed, "injected", step)
        batch = draw_batch(lessons, generator, batch_size=training.batch_size, empty_frac=training.empty_frac)
        return loss(batch, generator)

    run_loop(model, trained_parameters(model, truth, settings.injection), loss_at, loop, progress)
    return truth


@contextmanager
def _training_mode(pipe: Pipeline) -> Iterator[nn.ModuleDict]:
    """Give UNet and text encoder as one module, in training mode while the block is open."""
    model = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    model.train()
    try:
        yield model
    finally:
        model.eval()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
