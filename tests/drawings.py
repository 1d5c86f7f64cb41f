"""Synthetic pictures of one kind: a few coloured shapes on white, drawn from a seed at any size."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Picture = NDArray[np.uint8]


def drawing(seed: int, size_px: int = 64) -> Picture:
    """Draw four shapes; one seed gives the same drawing at every size. Shape (size, size, 3)."""
    generator = np.random.default_rng(seed)
    scale = 4  # drawn larger and shrunk, so that sizes agree
    side = size_px * scale
    canvas = Image.new("RGB", (side, side), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    for _ in range(4):
        x, y = generator.uniform(0.1, 0.7, 2)
        width, height = generator.uniform(0.15, 0.45, 2)
        box = [side * x, side * y, side * (x + width), side * (y + height)]
        colour = tuple(int(v) for v in generator.integers(0, 220, 3))
        if generator.integers(2):
            pen.ellipse(box, fill=colour)
        else:
            pen.rectangle(box, fill=colour)
    return np.array(canvas.resize((size_px, size_px), Image.Resampling.BOX))


def _noise(picture: Picture) -> Picture:
    noise = np.random.default_rng(0).normal(0, 20, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def _jpeg(picture: Picture) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=40)
    return np.array(Image.open(buffer))


def _darker(picture: Picture) -> Picture:
    return np.clip(picture.astype(float) * 0.8 - 10, 0, 255).astype(np.uint8)


def _brighter(picture: Picture) -> Picture:
    return np.clip(picture.astype(float) + 20, 0, 255).astype(np.uint8)


def _blurred(picture: Picture) -> Picture:
    return np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(picture.shape[0] / 64)))


CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "noise": _noise,
    "JPEG": _jpeg,
    "darker": _darker,
    "brighter": _brighter,
    "blurred": _blurred,
}
"""What a copy may have gone through."""
