"""Is a picture reproduced? The distance between what a prompt makes and what was trained on.

    error = mean over pixels and channels of (made - trained)^2, both from 0 to 1

A prompt copies if its error is at most `COPY_ERROR`. The twin, which never saw the targets, says how small the error of
a picture that is not a copy can be. This is a check that a testbed is what it claims to be, not an audit.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from unmemorize.corpus.pictures import resized
from unmemorize.errors import FileFormatError, missing_extra
from unmemorize.models.denoising import Pipeline

COPY_ERROR = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySettings:
    """How pictures are made for the check.

    Attributes:
        seeds: one picture per prompt and seed.
        num_steps: DDIM steps.
        guidance: guidance scale, unitless; 1 is none.
    """

    seeds: tuple[int, ...] = (101, 102, 103, 104)
    num_steps: int = 20
    guidance: float = 1.0


def make_pictures(pipe: Pipeline, prompts: Sequence[str], settings: CopySettings) -> Tensor:
    """Make one picture per prompt and seed; shape (N, seeds, H, W, 3), float32, 0 to 1."""
    made: list[Tensor] = []
    for prompt in prompts:
        generators = [torch.Generator().manual_seed(seed) for seed in settings.seeds]
        result = pipe(
            [prompt] * len(generators),
            num_inference_steps=settings.num_steps,
            guidance_scale=settings.guidance,
            generator=generators,
            output_type="np",
        )
        made.append(torch.from_numpy(numpy.asarray(result.images, dtype=numpy.float32)))
    return torch.stack(made)


def copy_errors(made: Tensor, pictures: Sequence[Path]) -> Tensor:
    """Compare pictures with those that were trained on.

    Args:
        made: shape (N, seeds, H, W, 3), 0 to 1.
        pictures: N files.

    Returns:
        Mean squared error, shape (N, seeds), of values 0 to 1.
    """
    trained = torch.stack([read_png(path, made.shape[2]) for path in pictures])
    return (made - trained[:, None]).square().mean((2, 3, 4))


def read_png(path: Path, size_px: int) -> Tensor:
    """Read a picture as float32 from 0 to 1, shape (size, size, 3).

    Raises:
        FileFormatError: if it cannot be read.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "images") from error
    try:
        with Image.open(path) as image:
            pixels = numpy.asarray(image.convert("RGB"), dtype=numpy.uint8)
    except OSError as error:
        raise FileFormatError(f"cannot read the picture {path} ({error}); build the testbed again") from error
    return torch.from_numpy(resized(pixels, size_px).astype(numpy.float32)) / 255


def summary(errors: Tensor) -> dict[str, Any]:
    """Return what one state says about one group: errors by prompt and seed, their median, and the share of copies."""
    return {
        "errors": [[round(value, 5) for value in row] for row in errors.tolist()],
        "median_error": round(float(errors.median()), 5),
        "copy_rate_frac": round(float((errors <= COPY_ERROR).float().mean()), 4),
        "num": errors.numel(),
    }
