"""Pictures as values: 8-bit RGB arrays, read from files, stored as PNG, and resized. Knows no model; torch-free.

A picture is an array of shape (H, W, 3), uint8. Whatever is opened becomes one: transparent parts are laid on white, as
a page shows them, and other colour spaces are converted. PNG stores the array exactly.

What this file does not do: judge pictures (`similarity.py`) or make them (`generation.py`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unmemorize.audit.examples import GROUPS
from unmemorize.corpus.pictures import opened_picture
from unmemorize.errors import DataError, missing_extra
from unmemorize.files import write_atomic
from unmemorize.records import Group

Picture: TypeAlias = NDArray[np.uint8]
"""Shape (H, W, 3), RGB, 0 to 255."""

PictureSource: TypeAlias = Picture | str | Path
"""A picture, or the path of its file."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptCase:
    """One prompt to audit.

    Attributes:
        prompt: the prompt; unique in an audit, unless names tell its cases apart.
        group: target, neighbour, heldout or ordinary. A picture of an ordinary prompt is one that was never trained
            on: it serves as a control for the copy threshold.
        pictures: training pictures that the prompt may reproduce, as arrays or paths; a similarity to the training
            picture is the largest over them. None where it is not known.
        name: tells cases apart that share a prompt, each with a picture and perhaps a `Way.case_context` of its own.
    """

    prompt: str
    group: Group
    pictures: tuple[PictureSource, ...] = ()
    name: str = ""

    @property
    def title(self) -> str:
        """The prompt, with the name where there is one."""
        return f"{self.prompt} ({self.name})" if self.name else self.prompt


def check_cases(cases: Sequence[PromptCase]) -> None:
    """Refuse prompts that would make an audit lie.

    Raises:
        DataError: if there are none, one is empty, or occurs twice under one name or in two groups, or a group is
            unknown.
    """
    if not cases:
        raise DataError("there are no prompts to audit; give at least one")
    groups: dict[str, Group] = {}
    seen: set[tuple[str, str]] = set()
    for case in cases:
        if case.group not in GROUPS:
            raise DataError(f"prompt {case.prompt!r} is in group {case.group!r}; expected one of {GROUPS}")
        if not case.prompt.strip():
            raise DataError("a prompt is empty; leave it out")
        if groups.get(case.prompt, case.group) != case.group or (case.prompt, case.name) in seen:
            raise DataError(
                f"prompt {case.prompt!r} occurs twice ({groups[case.prompt]} and {case.group}); name it once, with "
                "all its training pictures"
            )
        groups[case.prompt] = case.group
        seen.add((case.prompt, case.name))


def read_picture(source: PictureSource) -> Picture:
    """Return a picture from an array or a file.

    Args:
        source: an array of shape (H, W, 3), uint8, or the path of a PNG, JPEG, WebP, ... file.

    Raises:
        DataError: if the array has another shape or type, or the file cannot be read as a picture.
        MissingExtra: without Pillow.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8 or not source.size:
            raise DataError(
                f"a picture has shape {source.shape} and type {source.dtype}; expected (height, width, 3) and uint8"
            )
        return source
    try:
        with opened_picture(Path(source)) as opened:
            return _on_white(opened)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {source} as a picture ({error}); pass the path of a PNG or JPEG file"
        ) from error


def _on_white(opened: Any) -> Picture:
    if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
        layer = opened.convert("RGBA")
        white = _pillow().new("RGBA", layer.size, (255, 255, 255, 255))
        opened = _pillow().alpha_composite(white, layer)
    return np.array(opened.convert("RGB"))


def write_picture(path: str | Path, picture: Picture) -> Path:
    """Write a picture of shape (H, W, 3), uint8, as PNG; the file appears complete or not at all."""
    buffer = io.BytesIO()
    _pillow().fromarray(picture).save(buffer, format="PNG")
    return write_atomic(path, buffer.getvalue())


def resized(picture: Picture, height_px: int, width_px: int, method: str = "bilinear") -> Picture:
    """Resize a picture, averaging over what one new pixel covers.

    Args:
        picture: shape (H, W, 3), uint8.
        height_px: new height, pixels.
        width_px: new width, pixels.
        method: "bilinear", "bicubic" or "box".
    """
    pillow = _pillow()
    resampling = getattr(pillow.Resampling, method.upper())
    return np.array(pillow.fromarray(picture).resize((width_px, height_px), resampling))


def short_side_crop(picture: Picture, short_px: int, crop_px: int, method: str = "bilinear") -> Picture:
    """Resize so that the short side has `short_px` pixels, then cut a centred square of `crop_px` pixels."""
    height, width = picture.shape[:2]
    short = min(height, width)
    scaled = resized(picture, short_px * height // short, short_px * width // short, method)
    top, left = (round((side - crop_px) / 2) for side in scaled.shape[:2])
    return scaled[top : top + crop_px, left : left + crop_px]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("Pillow", "images") from error
    return Image
