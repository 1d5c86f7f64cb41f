"""Ids of pictures: from exact content, from near-duplicate groups, or from named sources. Torch-free.

    content           first 63 bits of SHA-256(height, width, pixels)
    near-duplicate    pictures whose thumbnails (16 x 16 means) differ by less than a threshold, root mean square

Exact copies share an id whatever their file name or format, as long as they decode to the same pixels. Copies that
were encoded again or scaled differ in every pixel; thumbnails find them. How far apart copy and stranger are depends on
the pictures: for photographs and drawings of 64 pixels the default of 0.03 tells them apart, for icons of 32 pixels no
threshold does, and ids from content are the right choice (numbers in docs/gotchas.md). Crops, mirror images and changed
colours are not found.

Source: ours. An existing hashing library (ImageHash) was passed over because it brings SciPy and PyWavelets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unmemorize.errors import ConfigError, DataError
from unmemorize.ids import ID_MAX, Groups, source_id

PictureIdKind = Literal["content", "near-duplicate", "source"]
Pixels = NDArray[np.uint8]

THUMBNAIL_PX = 16
_CHUNK_ROWS = 1024


def picture_ids(
    pictures: Sequence[Pixels],
    kind: PictureIdKind = "content",
    *,
    sources: Sequence[str] | None = None,
    threshold_frac: float = 0.03,
) -> list[int]:
    """Give every picture an id.

    Args:
        pictures: N pictures, each uint8 of shape (height, width, 3), red, green, blue, 0 to 255.
        kind: "content" (same pixels), "near-duplicate" (those share an id) or "source" (named sources).
        sources: for "source": the name of each picture's source.
        threshold_frac: for "near-duplicate": see `near_duplicate_picture_ids`.

    Returns:
        N ids, 1 .. 2**63 - 1.

    Raises:
        ConfigError: if the kind is unknown, a setting is out of range, or sources are missing.
        DataError: if a picture has another shape or dtype.
    """
    if kind == "content":
        return [picture_id(picture) for picture in pictures]
    if kind == "near-duplicate":
        return near_duplicate_picture_ids(pictures, threshold_frac=threshold_frac)
    if kind != "source":
        raise ConfigError(f"unknown kind of id {kind!r}; expected content, near-duplicate or source")
    if sources is None or len(sources) != len(pictures) or not all(sources):
        raise ConfigError(
            f"ids from sources need a name for each of the {len(pictures)} pictures; pass sources="
        )
    return [source_id(name) for name in sources]


def picture_id(pixels: Pixels) -> int:
    """Return the id of a picture: 1 .. 2**63 - 1, equal for equal pixels.

    Args:
        pixels: uint8, shape (height, width, 3).

    Raises:
        DataError: if the shape or dtype is another.
    """
    _require_picture(pixels)
    digest = hashlib.sha256(f"{pixels.shape[0]}x{pixels.shape[1]}:".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return int.from_bytes(digest.digest()[:8], "big") & ID_MAX or 1


def near_duplicate_picture_ids(pictures: Sequence[Pixels], *, threshold_frac: float = 0.03) -> list[int]:
    """Give near duplicates one id: that of the group's member with the smallest content id.

    Groups are the connected components of pairs whose thumbnails differ by less than the threshold, so that a group's
    two most distant members may differ by more. Every pair is compared, so that the time grows with the square of N.

    Args:
        pictures: N pictures, each uint8 of shape (height, width, 3); sizes may differ.
        threshold_frac: root mean square difference of thumbnails from which pictures are strangers, 0 to 1 of the
            range of a colour channel.

    Returns:
        N ids, the same in any order of the pictures.

    Raises:
        ConfigError: if the threshold is out of range.
        DataError: if a picture has another shape or dtype.
    """
    if not 0.0 < threshold_frac <= 1.0:
        raise ConfigError(f"threshold_frac is {threshold_frac}, expected above 0 and at most 1")
    owns = [picture_id(picture) for picture in pictures]
    different = dict(zip(owns, pictures, strict=True))
    if not different:
        return []
    keys = list(different)
    thumbnails = np.stack([_thumbnail(picture) for picture in different.values()])
    groups = Groups(keys)
    for first, second in _near_pairs(thumbnails, threshold_frac):
        groups.join(keys[first], keys[second])
    return [groups.canonical(own) for own in owns]


def _near_pairs(thumbnails: NDArray[np.float32], threshold_frac: float) -> list[tuple[int, int]]:
    """List the pairs whose root mean square difference is below the threshold."""
    squares = (thumbnails**2).sum(axis=1)
    pairs: list[tuple[int, int]] = []
    # Products in single precision find candidates with a margin for their rounding; differences decide.
    limit = (threshold_frac + 0.002) ** 2 * thumbnails.shape[1]
    for start in range(0, len(thumbnails), _CHUNK_ROWS):
        chunk = thumbnails[start : start + _CHUNK_ROWS]
        rest = thumbnails[start:]
        distances = squares[start : start + _CHUNK_ROWS, None] + squares[None, start:] - 2 * chunk @ rest.T
        rows, columns = np.nonzero(np.triu(distances < limit, k=1))
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            difference = chunk[row].astype(np.float64) - rest[column]
            if float(np.sqrt((difference**2).mean())) < threshold_frac:
                pairs.append((start + row, start + column))
    return pairs


def _thumbnail(pixels: Pixels) -> NDArray[np.float32]:
    """Return the means over a grid of boxes, centred, shape (16 * 16 * 3,), in units of the channel's range."""
    values = pixels.astype(np.float64) / 255 - 0.5
    for axis in (0, 1):
        length = values.shape[axis]
        edges = np.arange(THUMBNAIL_PX) * length // THUMBNAIL_PX
        counts = np.maximum(1, np.diff(np.append(edges, length)))
        shape = [1, 1, 1]
        shape[axis] = THUMBNAIL_PX
        values = np.add.reduceat(values, edges, axis=axis) / counts.reshape(shape)
    return values.reshape(-1).astype(np.float32)


def _require_picture(pixels: Pixels) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise DataError(
            f"a picture is {pixels.dtype} of shape {pixels.shape}, expected uint8 of shape (height, width, 3); convert "
            "it to RGB first"
        )
