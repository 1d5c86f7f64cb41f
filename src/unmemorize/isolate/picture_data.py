"""What training on captioned pictures needs in memory: latents, encoded captions, ids, batches, and the loss.

    epsilon, v, sample     noisy = sqrt(a) x + sqrt(1 - a) noise     a: the scheduler's cumulative product at t
    flow                   noisy = (1 - s) x + s noise, target noise - x     s = (t + 1) / number of timesteps

Pictures and captions are encoded once, by the pipeline's own parts, and kept: a latent of 4 x 64 x 64 takes 64 kB in
float32, a caption of SD 1.x 236 kB (each distinct caption is kept once). Every draw of a step comes from one generator
that follows from seed and step, so that a training that was interrupted goes on with the same numbers, and methods see
the same noise. Encoders are not trained, and latents that a pipeline packs (Flux) are refused.

Source: noise prediction, Ho et al. 2020; velocity, Salimans and Ho 2022; flow matching, Lipman et al. 2023, with
timesteps drawn evenly.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unmemorize.corpus.picture_ids import PictureIdKind, picture_id, picture_ids
from unmemorize.errors import ConfigError, DataError, ModelNotSupported, UnmemorizeWarning
from unmemorize.models.denoising import Pipeline, conditions, joined, picked
from unmemorize.models.diffusion import quiet_diffusers
from unmemorize.models.prompts import cut_words, shortened

_ENCODE_ROWS = 16


class Captioned(Protocol):
    """A captioned picture: RGB pixels, uint8, shape (height, width, 3), with a name and a source ("" if unnamed)."""

    @property
    def caption(self) -> str:
        """The caption."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The pixels."""

    @property
    def name(self) -> str:
        """A name."""

    @property
    def source(self) -> str:
        """The source."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PictureData:
    """Encoded pictures of one size.

    Attributes:
        latents: shape (N, C, H, W), float32, as the denoiser sees them.
        captions: for each distinct caption one row of what the denoiser is told; row 0 is the empty caption.
        caption_rows: which row of `captions` a picture has, shape (N,), int64.
        num_captions: rows of `captions`.
        ids: N ids, 1 .. 2**63 - 1.
        digest: sixteen hexadecimal digits that name pixels, captions and ids.
    """

    latents: Tensor
    captions: Mapping[str, Any]
    caption_rows: Tensor
    num_captions: int
    ids: tuple[int, ...]
    digest: str


@torch.no_grad()
def encode_pictures(
    pipe: Pipeline,
    pictures: Sequence[Captioned],
    *,
    ids: PictureIdKind = "content",
    device: torch.device | None = None,
) -> PictureData:
    """Encode captioned pictures with a pipeline's own VAE and text encoders.

    Args:
        pipe: any text-to-image pipeline whose latents have the shape (N, C, H, W).
        pictures: N pictures of one size, a size that the VAE divides.
        ids: what an id stands for, see `picture_ids`.
        device: where to keep the result; by default the pipeline's.

    Captions that are longer than the text encoders read are cut; a warning says how many, and of one what is lost.

    Raises:
        DataError: if there are no pictures, or their sizes differ.
        ModelNotSupported: if the pipeline packs its latents.
    """
    if not pictures:
        raise DataError("there are no pictures to train on; give at least one")
    sizes = {picture.pixels.shape for picture in pictures}
    if len(sizes) > 1 or min(sizes)[0] != min(sizes)[1]:
        raise DataError(
            f"pictures have the shapes {sorted(sizes)[:3]}, expected squares of one size; resize them first"
        )
    size_px = min(sizes)[0]
    owners = picture_ids([p.pixels for p in pictures], ids, sources=[p.source for p in pictures])
    distinct = list(dict.fromkeys(["", *(picture.caption for picture in pictures)]))
    _warn_of_cut_captions(pipe, distinct[1:])
    with quiet_diffusers():
        parts = [
            conditions(pipe, distinct[start : start + _ENCODE_ROWS], size_px=size_px)
            for start in range(0, len(distinct), _ENCODE_ROWS)
        ]
    if "img_ids" in parts[0]:
        raise ModelNotSupported(
            f"{type(pipe).__name__} packs its latents; train it in a loop of your own inside training_sinks"
        )
    rows = {caption: number for number, caption in enumerate(distinct)}
    latents = torch.cat(
        [
            _latents(pipe, pictures[start : start + _ENCODE_ROWS])
            for start in range(0, len(pictures), _ENCODE_ROWS)
        ]
    )
    digest = hashlib.sha256(repr([(i, p.caption) for i, p in zip(owners, pictures, strict=True)]).encode())
    digest.update(repr([picture_id(picture.pixels) for picture in pictures]).encode())
    return PictureData(
        latents=latents.to(device or latents.device),
        captions=joined(parts),
        caption_rows=torch.tensor([rows[picture.caption] for picture in pictures]),
        num_captions=len(distinct),
        ids=tuple(owners),
        digest=digest.hexdigest()[:16],
    )


def _warn_of_cut_captions(pipe: Pipeline, captions: Sequence[str]) -> None:
    cut = {caption: words for caption in captions if (words := cut_words(pipe, caption))}
    if cut:
        caption, words = next(iter(cut.items()))
        warnings.warn(
            f"{len(cut):,} of {len(captions):,} captions are longer than the text encoder reads and are cut: of "
            f"{shortened(caption)!r} it does not see {shortened(words)!r}",
            UnmemorizeWarning,
            stacklevel=3,
        )


def _latents(pipe: Pipeline, pictures: Sequence[Captioned]) -> Tensor:
    vae = pipe.vae
    stacked = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).permute(0, 3, 1, 2)
    parameter = next(vae.parameters())
    encoded = vae.encode((stacked.float() / 127.5 - 1).to(parameter.device, parameter.dtype))
    # AutoencoderTiny gives latents as they are, all others a distribution; its mean adds no noise of its own.
    mean = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scaled: Tensor = (mean.float() - shift) * vae.config.scaling_factor
    return scaled


@dataclass(frozen=True, slots=True, eq=False)
class PictureBatch:
    """What one step trains on.

    Attributes:
        rows: rows of the data, shape (B,).
        caption_rows: their captions, some replaced by the empty one, shape (B,).
        levels: timesteps counted from 0 (least noise), shape (B,), int64.
        noise: standard normal, shape (B, C, H, W).
    """

    rows: Tensor
    caption_rows: Tensor
    levels: Tensor
    noise: Tensor

    def part(self, places: Sequence[int]) -> PictureBatch:
        """Return some of its rows."""
        chosen = torch.tensor(list(places), dtype=torch.int64)
        return PictureBatch(
            self.rows[chosen], self.caption_rows[chosen], self.levels[chosen], self.noise[chosen]
        )


def draw_batch(
    data: PictureData, rows: Sequence[int], num_levels: int, generator: torch.Generator, *, empty_frac: float
) -> PictureBatch:
    """Draw captions, noise and timesteps for the pictures of a step."""
    chosen = torch.tensor(list(rows), dtype=torch.int64)
    is_empty = torch.rand(len(chosen), generator=generator) < empty_frac
    levels = torch.randint(num_levels, (len(chosen),), generator=generator)
    noise = torch.randn((len(chosen), *data.latents.shape[1:]), generator=generator)
    return PictureBatch(chosen, torch.where(is_empty, 0, data.caption_rows[chosen]), levels, noise)


def num_levels(scheduler: Any) -> int:
    """Return the number of noise levels that a scheduler trains with."""
    return int(scheduler.config.num_train_timesteps)


def row_losses(
    denoiser: nn.Module, scheduler: Any, data: PictureData, batch: PictureBatch, **more: Any
) -> Tensor:
    """Return the mean squared error of the prediction for each picture of a batch.

    Args:
        denoiser: the denoiser, wrapped or not.
        scheduler: the pipeline's scheduler; its noise and its kind of prediction count.
        data: the pictures.
        batch: what to predict.
        more: further arguments of the call, such as `sink_ids`.

    Returns:
        Shape (B,), float32, unitless.
    """
    clean = data.latents[batch.rows.to(data.latents.device)]
    noise = batch.noise.to(clean)
    noisy, target, timesteps = _noised(scheduler, clean, noise, batch.levels.to(clean.device))
    told = _on_device(picked(data.captions, batch.caption_rows, data.num_captions), clean.device)
    inner = getattr(denoiser, "module", denoiser)
    first = list(inspect.signature(type(inner).forward).parameters)[1]
    noisy = noisy.to(next(inner.parameters()).dtype)
    output: Tensor = denoiser(**{first: noisy, "timestep": timesteps, **told, "return_dict": False, **more})[
        0
    ]
    prediction = output.float()
    if prediction.shape[1] == 2 * target.shape[1]:
        prediction = prediction.chunk(2, dim=1)[0]  # the second half is a learned variance
    return (prediction - target).square().flatten(1).mean(1)


def _noised(scheduler: Any, clean: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy latents, what is to be predicted, and the timesteps as the denoiser takes them."""
    cumulative = getattr(scheduler, "alphas_cumprod", None)
    if cumulative is None:
        share = ((levels + 1) / num_levels(scheduler)).view(-1, 1, 1, 1).to(clean)
        return (1 - share) * clean + share * noise, noise - clean, (levels + 1).float()
    kept = cumulative.to(clean)[levels].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
    kind = scheduler.config.prediction_type
    targets = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * clean,
    }
    if kind not in targets:
        raise ConfigError(f"the scheduler predicts {kind!r}, expected epsilon, v_prediction or sample")
    return noisy, targets[kind], levels


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {name: _on_device(part, device) for name, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


@torch.no_grad()
def mean_loss(
    denoiser: nn.Module,
    scheduler: Any,
    data: PictureData,
    rows: Sequence[int],
    *,
    num_levels_each: int = 4,
    batch_rows: int = 32,
) -> float | None:
    """Return the mean of `picture_losses`, without sink ids; None for no pictures."""
    if not rows:
        return None
    losses = picture_losses(
        denoiser, scheduler, data, rows, num_levels_each=num_levels_each, batch_rows=batch_rows
    )
    return float(losses.mean())


@torch.no_grad()
def picture_losses(
    denoiser: nn.Module,
    scheduler: Any,
    data: PictureData,
    rows: Sequence[int],
    *,
    sink_ids: Tensor | None = None,
    num_levels_each: int = 4,
    batch_rows: int = 32,
) -> Tensor:
    """Return the loss of each picture with its caption, in evaluation mode.

    A picture is measured at evenly spaced noise levels, with noise that follows from its place among `rows`, so that
    two calls with the same rows measure the same.

    Args:
        denoiser: the denoiser, in whatever state it is.
        scheduler: the pipeline's scheduler.
        data: the pictures.
        rows: which of them, N.
        sink_ids: id that each picture carries, shape (N,), int64, for a denoiser with sinks attached.
        num_levels_each: noise levels per picture.
        batch_rows: rows per call.

    Returns:
        Mean over noise levels, shape (N,), float64, unitless.
    """
    count, was_training = num_levels(scheduler), denoiser.training
    found: list[Tensor] = []
    repeated = [row for row in rows for _ in range(num_levels_each)]
    ids = None if sink_ids is None else sink_ids.repeat_interleave(num_levels_each)
    levels = torch.arange(num_levels_each).add(0.5).mul(count / num_levels_each).long().repeat(len(rows))
    denoiser.eval()
    try:
        for start in range(0, len(repeated), batch_rows):
            generator = torch.Generator().manual_seed(start)
            batch = draw_batch(data, repeated[start : start + batch_rows], count, generator, empty_frac=0.0)
            fixed = PictureBatch(
                batch.rows, batch.caption_rows, levels[start : start + batch_rows], batch.noise
            )
            more = {} if ids is None else {"sink_ids": ids[start : start + batch_rows]}
            found.append(row_losses(denoiser, scheduler, data, fixed, **more).double().cpu())
    finally:
        denoiser.train(was_training)
    return torch.cat(found).view(len(rows), num_levels_each).mean(1)
