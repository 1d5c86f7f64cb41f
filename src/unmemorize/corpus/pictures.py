"""Captioned pictures, read from an array beside a table or from a folder of image files. Torch-free.

Two conventions are read: a NumPy archive with one array `images` beside a `captions.csv` whose rows are in the same
order, and the ImageFolder convention of `datasets`, image files with a `metadata.csv` or `metadata.jsonl` (or a
`captions.csv`) that names them in a column `file_name`. Archives are read without unpickling. Pictures are cut to their
central square and averaged down to the size asked for. Where captions are of no matter, `find_pictures` names pictures
and leaves them as they are.

Nothing is downloaded, and no caption is changed.
"""

from __future__ import annotations

import csv
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from unmemorize.errors import ConfigError, DataError, missing_extra
from unmemorize.files import parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TABLES = ("metadata.csv", "metadata.jsonl", "captions.csv")
_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture and its caption.

    Attributes:
        caption: what it was described as.
        pixels: shape (H, W, 3), uint8, RGB.
        name: tells it apart from the others of its source.
        source: where it came from.
    """

    caption: str
    pixels: NDArray[numpy.uint8]
    name: str
    source: str


def read_pictures(
    path: str | Path, *, size_px: int, caption_column: str = "caption", limit: int | None = None
) -> list[Picture]:
    """Read captioned pictures, all of one size.

    Args:
        path: a `.npz` archive beside `captions.csv`, a folder that holds both (of several archives the one whose name
            ends in the size), or a folder of image files with `metadata.csv`, `metadata.jsonl` or `captions.csv`.
        size_px: side of the square pictures that are returned, in pixels.
        caption_column: column of the caption; where it is missing, a column `text` is taken for `caption`.
        limit: read at most this many pictures.

    Returns:
        At least one picture, in the order of the table. Rows with an empty caption are passed over.

    Raises:
        ConfigError: if size or limit are out of range.
        DataError: if a file or column is missing, numbers of rows differ, or a picture cannot be read.
        MissingExtra: if image files are to be read or resized and Pillow is not installed.
    """
    path = Path(path)
    if size_px < 1 or (limit is not None and limit < 1):
        what = f"size_px is {size_px}" if size_px < 1 else f"limit is {limit}"
        raise ConfigError(f"{what}, expected 1 or more")
    archive = _archive(path, size_px)
    if archive is not None:
        pictures = _from_archive(archive, size_px, caption_column, limit)
    elif path.is_dir():
        pictures = _from_files(path, size_px, caption_column, limit)
    else:
        raise DataError(f"{path} does not exist; expected a .npz archive or a folder of pictures")
    if not pictures:
        raise DataError(f"{path} holds no captioned pictures; expected at least one row with a caption")
    return pictures


def find_pictures(path: str | Path) -> list[NDArray[numpy.uint8] | Path]:
    """Find pictures whose captions are of no matter; files are named, not read, and nothing is resized.

    Args:
        path: a folder with image files at any depth, or with one `.npz` archive and no image files; an archive with an
            array `images`; or a table (`.csv`, `.jsonl`) whose column `picture` or `file_name` names files relative to
            it, several separated by `|`.

    Returns:
        At least one picture: paths of files, or arrays of shape (H, W, 3), uint8, RGB.

    Raises:
        DataError: if there is no picture, a file or column is missing, or an archive cannot be read.
    """
    path = Path(path)
    found: list[NDArray[numpy.uint8] | Path] = []
    if path.is_dir():
        found += sorted(
            one for one in path.rglob("*") if one.suffix.lower() in _IMAGE_FILES and one.is_file()
        )
        archives = [] if found else sorted(path.glob("*.npz"))
        if len(archives) > 1:
            names = ", ".join(archive.name for archive in archives)
            raise DataError(f"{path} holds {len(archives)} archives ({names}); name one of them")
        path = archives[0] if archives else path
    if path.suffix.lower() == ".npz" and path.is_file():
        found += [_colour(image) for image in _images(path)]
    elif path.suffix.lower() in (".csv", ".jsonl") and path.is_file():
        found += _named(path)
    elif not path.is_dir():
        raise DataError(
            f"{path} holds no pictures or does not exist; expected a folder, a .npz archive, or a table (.csv, .jsonl)"
        )
    if not found:
        raise DataError(f"{path} holds no pictures; expected image files ({', '.join(_IMAGE_FILES)})")
    return found


def _named(table: Path) -> list[Path]:
    """Return the files that a table names."""
    found: list[Path] = []
    for number, row in enumerate(_csv_rows(table) if table.suffix.lower() == ".csv" else _json_rows(table)):
        names = row.get("picture", row.get("file_name"))
        if not isinstance(names, str):
            raise DataError(
                f"{table} row {number + 1} has neither picture nor file_name, only {sorted(row)}; name the picture"
            )
        found += [table.parent / name for name in names.split("|") if name]
    missing = next((one for one in found if not one.is_file()), None)
    if missing is not None:
        raise DataError(f"{missing} does not exist, but {table} names it; add the picture or drop its row")
    return found


def _archive(path: Path, size_px: int) -> Path | None:
    """Return the archive that a path stands for, if any."""
    if path.suffix.lower() == ".npz" and path.is_file():
        return path
    if not path.is_dir() or not (path / "captions.csv").is_file():
        return None
    found = sorted(path.glob("*.npz"))
    exact = [archive for archive in found if archive.stem.endswith(f"_{size_px}")]
    chosen = exact or found
    return chosen[-1] if chosen else None


def _from_archive(path: Path, size_px: int, caption_column: str, limit: int | None) -> list[Picture]:
    table = path.parent / "captions.csv"
    rows, images = _csv_rows(table), _images(path)
    if len(rows) != len(images):
        raise DataError(f"{path} holds {len(images)} pictures and {table} {len(rows)} rows; make them agree")
    pictures: list[Picture] = []
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        caption = _caption(row, caption_column, table, number)
        if caption and (limit is None or len(pictures) < limit):
            name = row.get("file") or row.get("file_name") or str(number)
            pictures.append(Picture(caption, resized(_colour(image), size_px), str(name), str(path)))
    return pictures


def _images(path: Path) -> NDArray[numpy.uint8]:
    """Return the pictures of an archive, shape (N, H, W, 3) or (N, H, W)."""
    try:
        with path.open("rb") as stream, numpy.load(stream, allow_pickle=False) as archive:
            images: NDArray[numpy.uint8] = archive["images"]
    except KeyError as error:
        raise DataError(f"{path} has no array 'images'; save the pictures under that name") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path} ({error}); expected a NumPy archive of plain arrays") from error
    if images.dtype != numpy.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        raise DataError(
            f"{path} holds {images.dtype} of shape {images.shape}; expected uint8 of shape (N, H, W, 3) or (N, H, W)"
        )
    return images


def _colour(image: NDArray[numpy.uint8]) -> NDArray[numpy.uint8]:
    return image if image.ndim == 3 else numpy.stack([image] * 3, axis=-1)


def _from_files(folder: Path, size_px: int, caption_column: str, limit: int | None) -> list[Picture]:
    table = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    if table is None:
        raise DataError(f"{folder} holds no {', '.join(_TABLES)}; put the captions beside the pictures")
    pictures: list[Picture] = []
    for number, row in enumerate(_csv_rows(table) if table.suffix == ".csv" else _json_rows(table)):
        if limit is not None and len(pictures) == limit:
            break
        caption = _caption(row, caption_column, table, number)
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise DataError(
                f"{table} row {number + 1} has no file_name, only {sorted(row)}; name the picture"
            )
        if caption:
            pictures.append(Picture(caption, _read_image(folder / name, size_px), name, str(folder)))
    return pictures


def _caption(row: dict[str, Any], column: str, table: Path, number: int) -> str:
    if column not in row and column == "caption" and "text" in row:
        column = "text"
    if column not in row:
        raise DataError(f"{table} has no column {column!r}, only {sorted(row)}; name the caption column")
    caption = row[column]
    if not isinstance(caption, str):
        raise DataError(
            f"{table} row {number + 1}: {column} is {type(caption).__name__}, expected text; repair the row"
        )
    return " ".join(caption.split())


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return list(csv.DictReader(stream, restval=""))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; put the captions beside the pictures") from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path} ({error}); expected a table in UTF-8") from error


def _json_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} ({error}); expected JSON Lines in UTF-8") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line) if line.strip() else None
        except ValueError as error:
            raise DataError(
                f"{path} line {number} is not JSON ({error}); expected one object a line"
            ) from error
        if row is not None and not isinstance(row, dict):
            raise DataError(f"{path} line {number} is a {type(row).__name__}; expected one object a line")
        rows += [] if row is None else [row]
    return rows


@contextmanager
def opened_picture(path: Path) -> Iterator[Any]:
    """Open a picture file with Pillow, turned as its EXIF data say, without a warning about large ones.

    Raises:
        OSError: if the file is missing or no picture.
        ValueError: if it has more pixels than Pillow opens, or more than 8 bits a channel, which Pillow would cut off.
        MissingExtra: without Pillow.
    """
    image_library = _pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", image_library.DecompressionBombWarning)
        try:
            image = image_library.open(path)
        except image_library.DecompressionBombError as error:
            raise ValueError(f"it is too large: {error}") from error
    with image:
        if image.mode[0] in "IF":
            raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}); save it with 8")
        yield _upright(image)


def _upright(image: Any) -> Any:
    """Return a picture as it is meant to be seen: cameras store it lying and name the turn in its EXIF data."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except SyntaxError:  # Pillow's word for EXIF data that are none
        return image


def _read_image(path: Path, size_px: int) -> NDArray[numpy.uint8]:
    try:
        with opened_picture(path) as image:
            return resized(numpy.asarray(image.convert("RGB"), dtype=numpy.uint8), size_px)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist, but the table names it; add the picture or drop its row"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the picture {path} ({error}); replace it or drop its row") from error


def resized(pixels: NDArray[numpy.uint8], size_px: int) -> NDArray[numpy.uint8]:
    """Cut out the central square and bring it to `size_px` on a side; shape (H, W, 3) in, (size, size, 3) out.

    Raises:
        MissingExtra: if the size is no whole fraction of the square's and Pillow is not installed.
    """
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    square = numpy.ascontiguousarray(pixels[top : top + side, left : left + side])
    factor, rest = divmod(side, size_px)
    if rest == 0:
        blocks = square.reshape(size_px, factor, size_px, factor, 3).astype(numpy.float64).mean((1, 3))
        averaged: NDArray[numpy.uint8] = numpy.rint(blocks).astype(numpy.uint8)
        return averaged
    image_library = _pillow()
    image = image_library.fromarray(square).resize((size_px, size_px), image_library.Resampling.LANCZOS)
    return numpy.asarray(image, dtype=numpy.uint8)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "images") from error
    return Image
