"""Training steps of a testbed: what a batch holds, the loss, and a loop that continues where it stopped.

    loss = mean |v - unet(sqrt(a) x + sqrt(1 - a) noise, t, text)|^2,    v = sqrt(a) noise - sqrt(1 - a) x

where a is the scheduler's cumulative product. Velocity is predicted, as in Stable Diffusion 2: a network this small
fails to copy noise exactly enough to say anything about the picture at high noise, where pictures are chosen.

Everything random in a step follows from seed, stream and step, so that a training that was interrupted goes on
exactly as if it had not been, and stages that share a stream see the same noise. One stream serves "memorized" and
"twin": where the one draws a target, the other draws a general picture, and nothing else differs.

Source: ours; the velocity is that of Salimans and Ho 2022.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmemorize.isolate.checkpoints import Standing, load_checkpoint, newest_checkpoint, write_checkpoint
from unmemorize.records import Progress, ProgressCallback

_REPORT_S = 1.0  # least time between two reports of progress
_TEXT_SHARE = 0.5  # of the learning rate, for the text encoder
_MOST_GRADIENT = 1.0  # norm that gradients are cut to


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lessons:
    """All pictures of a testbed as tensors; row numbers stand for pictures.

    Attributes:
        latents: shape (N, C, H, W), scaled as the UNet sees them.
        ids: token ids of the captions, shape (N, T).
        empty_ids: token ids of the empty caption, shape (T,).
        general: rows of the general pictures.
        memorized: rows of the pictures to memorize: targets first, then neighbours, then heldout.
        num_targets: how many of these are targets.
    """

    latents: Tensor
    ids: Tensor
    empty_ids: Tensor
    general: tuple[int, ...]
    memorized: tuple[int, ...]
    num_targets: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one step trains on.

    Attributes:
        rows: rows of `Lessons`, shape (B,).
        ids: token ids, some captions replaced by the empty one, shape (B, T).
        timesteps: 0 .. num_steps - 1, shape (B,).
        noise: standard normal, shape (B, C, H, W).
    """

    rows: Tensor
    ids: Tensor
    timesteps: Tensor
    noise: Tensor


def step_generator(seed: int, stream: str, step: int) -> torch.Generator:
    """Return the generator of everything that is drawn in one step."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw_batch(
    lessons: Lessons,
    generator: torch.Generator,
    *,
    batch_size: int,
    memorized_frac: float = 0.0,
    has_targets: bool = True,
    empty_frac: float = 0.1,
    num_timesteps: int = 1000,
) -> Batch:
    """Draw one batch.

    Args:
        lessons: the pictures.
        generator: all draws are made from it, in one order for every stage.
        batch_size: pictures.
        memorized_frac: share of pictures that are drawn from those to memorize, rounded.
        has_targets: False puts a general picture wherever a target is drawn.
        empty_frac: share of empty captions.
        num_timesteps: timesteps of the scheduler.
    """
    num_memorized = round(memorized_frac * batch_size)
    general = torch.tensor(lessons.general)
    rows = general[torch.randint(len(general), (batch_size,), generator=generator)]
    if num_memorized:
        pool = torch.tensor(lessons.memorized)
        drawn = torch.randint(len(pool), (num_memorized,), generator=generator)
        is_used = (drawn >= lessons.num_targets) | torch.tensor(has_targets)
        rows[:num_memorized] = torch.where(is_used, pool[drawn], rows[:num_memorized])
    is_empty = torch.rand(batch_size, generator=generator) < empty_frac
    ids = torch.where(is_empty[:, None], lessons.empty_ids, lessons.ids[rows])
    timesteps = torch.randint(num_timesteps, (batch_size,), generator=generator)
    noise = torch.randn((batch_size, *lessons.latents.shape[1:]), generator=generator)
    return Batch(rows, ids, timesteps, noise)


def noised(latents: Tensor, batch: Batch, cumulative: Tensor) -> Tensor:
    """Mix clean latents with a batch's noise at its timesteps; shapes (B, C, H, W), cumulative products (steps,)."""
    kept = cumulative[batch.timesteps].view(-1, 1, 1, 1)
    return kept.sqrt() * latents + (1 - kept).sqrt() * batch.noise


def velocity(latents: Tensor, batch: Batch, cumulative: Tensor) -> Tensor:
    """Return what the UNet should predict for a batch, shape (B, C, H, W)."""
    kept = cumulative[batch.timesteps].view(-1, 1, 1, 1)
    return kept.sqrt() * batch.noise - (1 - kept).sqrt() * latents


def denoising_loss(pipe: Any, lessons: Lessons, batch: Batch) -> Tensor:
    """Return the mean squared error of the predicted velocity, unitless, a scalar."""
    states = pipe.text_encoder(batch.ids)[0]
    clean, cumulative = lessons.latents[batch.rows], pipe.scheduler.alphas_cumprod
    predicted = pipe.unet(noised(clean, batch, cumulative), batch.timesteps, states).sample
    return nn.functional.mse_loss(predicted, velocity(clean, batch, cumulative))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """One training.

    Attributes:
        title: name of the stage, for progress.
        steps: optimizer steps.
        rate: learning rate after warm-up.
        warmup_steps: steps of linear rise; a linear fall to zero follows.
        folder: holds the checkpoints; deleted when the training is done.
        checkpoint_steps: steps between checkpoints.
        identity: what the training is; a checkpoint of another one is refused.
    """

    title: str
    steps: int
    rate: float
    warmup_steps: int
    folder: Path
    checkpoint_steps: int
    identity: Mapping[str, str]


def run_loop(
    model: nn.Module,
    trained: Mapping[str, Tensor | None],
    loss_at: Callable[[int], Tensor],
    loop: Loop,
    progress: ProgressCallback | None = None,
) -> None:
    """Train in place, from the newest checkpoint if there is one.

    Args:
        model: holds all parameters; those that are not named in `trained` stay bit-identical.
        trained: parameter name -> None, or a mask of its shape, True where it may move.
        loss_at: loss of a step; draws nothing from global generators.
        loop: how long, how fast, and where checkpoints go.
        progress: called about once a second with steps done, loss and time left.

    Raises:
        CheckpointMismatch, FileFormatError: if the checkpoint belongs to another training or is damaged.
        RunFolderError: if a checkpoint cannot be written.
    """
    parameters = dict(model.named_parameters())
    model.requires_grad_(False)
    handles = []
    for name, mask in trained.items():
        parameters[name].requires_grad_(True)
        if mask is not None:
            handles.append(parameters[name].register_hook(lambda gradient, kept=mask: gradient * kept))
    optimizer = _optimizer(parameters, list(trained))
    newest = newest_checkpoint(loop.folder)
    standing = Standing() if newest is None else load_checkpoint(newest, model, optimizer, loop.identity)
    try:
        _steps(model, optimizer, loss_at, loop, standing, progress)
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(False)
        model.eval()


def _optimizer(parameters: Mapping[str, nn.Parameter], names: Sequence[str]) -> torch.optim.Optimizer:
    """Make the optimizer; the text encoder learns slowly, so that what words mean stays put while the UNet learns."""
    is_text = [name.startswith("text_encoder.") for name in names]
    groups = [
        {
            "params": [parameters[name] for name, it in zip(names, is_text, strict=True) if it == part],
            "share": share,
        }
        for part, share in ((False, 1.0), (True, _TEXT_SHARE))
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def _steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int], Tensor],
    loop: Loop,
    standing: Standing,
    progress: ProgressCallback | None,
) -> None:
    started, told = time.monotonic(), 0.0
    mean = 0.0
    for step in range(standing.step, loop.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, loop) * group["share"]
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_((p for p in model.parameters() if p.grad is not None), _MOST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if step == standing.step else 0.98 * mean + 0.02 * loss.item()
        spent = time.monotonic() - started
        done = step + 1
        if progress is not None and (spent - told > _REPORT_S or done == loop.steps):
            told = spent
            left_s = spent / (done - standing.step) * (loop.steps - done)
            progress(Progress(loop.title, done, loop.steps, "steps", f"loss {mean:.4f}, {left_s:.0f} s left"))
        if done % loop.checkpoint_steps == 0 and done < loop.steps:
            train_s = standing.train_s + spent
            write_checkpoint(
                loop.folder, model, optimizer, Standing(step=done, train_s=train_s), loop.identity
            )


def learning_rate(step: int, loop: Loop) -> float:
    """Return the learning rate of a step: a linear rise, then a linear fall to nearly zero."""
    rise = min(1.0, (step + 1) / max(1, loop.warmup_steps))
    return loop.rate * min(rise, (loop.steps - step) / max(1, loop.steps - loop.warmup_steps))


def forget_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a training whose result has been saved."""
    shutil.rmtree(folder, ignore_errors=True)
