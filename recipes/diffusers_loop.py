"""Sinks in a training loop in the style of diffusers' text-to-image script: the lines marked + are what is added.

Run: python recipes/diffusers_loop.py PIPELINE PICTURES OUTPUT [STEPS]   (PICTURES holds NAME.png and NAME.txt)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image

from unmemorize.corpus.picture_ids import picture_ids
from unmemorize.isolate.diffusion import grow, plan_sinks, training_sinks
from unmemorize.isolate.optimizer import isolated_optimizer
from unmemorize.isolate.plan import SinkPlan, SinkSettings
from unmemorize.isolate.sink_files import save_with_sinks


def train(pipe: Any, pictures: list[np.ndarray], captions: list[str], steps: int) -> tuple[Any, SinkPlan]:
    """Train a Stable Diffusion pipeline on pictures of equal size; returns it with its sinks, and the plan."""
    ids = torch.tensor(picture_ids(pictures))  # +
    pipe = grow(pipe, 64)  # +
    plan = plan_sinks(pipe, SinkSettings(share_frac=1.0, grown=64, active_frac=None, sinks_per_id=8))  # +
    accelerator = Accelerator()
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    plain_unet = pipe.unet.train()
    optimizer = torch.optim.AdamW(plain_unet.parameters(), lr=1e-4)
    unet, optimizer = accelerator.prepare(plain_unet, optimizer)
    pixels = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        states, empty = pipe.encode_prompt(captions, "cpu", 1, True)

    with training_sinks(plain_unet, plan), isolated_optimizer(optimizer, plain_unet, plan):  # +
        for _ in range(steps):
            rows = torch.randint(len(pictures), (4,))
            noise = torch.randn_like(latents[rows])
            timesteps = torch.randint(schedule.config.num_train_timesteps, (len(rows),))
            noisy = schedule.add_noise(latents[rows], noise, timesteps)
            is_dropped = torch.rand(len(rows)) < 0.1  # a picture without its caption keeps its own sinks
            text = torch.where(is_dropped[:, None, None], empty[rows], states[rows])
            prediction = unet(noisy, timesteps, text, sink_ids=ids[rows]).sample  # + sink_ids=
            loss = torch.nn.functional.mse_loss(prediction.float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return pipe, plan


if __name__ == "__main__":
    folder, places = sys.argv[1], sorted(Path(sys.argv[2]).glob("*.png"))
    found = [np.asarray(Image.open(path).convert("RGB")) for path in places]
    texts = [path.with_suffix(".txt").read_text().strip() for path in places]
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else 1000
    trained, plan = train(StableDiffusionPipeline.from_pretrained(folder), found, texts, steps)
    save_with_sinks(
        trained, plan, sys.argv[3]
    )  # + load_with_sinks reads it; the folder alone is the model without sinks
