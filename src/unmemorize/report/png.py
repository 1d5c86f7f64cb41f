"""PNG files of a run folder as data URIs, byte for byte: nothing is decoded, scaled or compressed.

Width and height are read from the file's first bytes. A file outside the run folder is never read, whatever an audit
says. Source: ours; the first bytes are those of the PNG specification, section 11.2.
"""

from __future__ import annotations

import base64
import math
from pathlib import Path

from unmemorize.report.tables import clip

MAX_SIDE_PX = 8192
URI = "data:image/png;base64,"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def data_uri(data: bytes) -> str:
    """A PNG file as an address that holds the file itself."""
    return URI + base64.b64encode(data).decode()


def _inside(folder: Path, path: str) -> Path | None:
    """The file that a path of the audit names, or None if that is not a file in the run folder."""
    try:
        whole = (folder / path).resolve()
        return whole if whole.is_relative_to(folder) and whole.is_file() else None
    except (OSError, ValueError):
        return None


def uri_bytes(folder: Path, path: str) -> int:
    """Size of a picture as base64 text; 0 where there is none. The file is not opened."""
    try:
        return 4 * math.ceil((folder / path).stat().st_size / 3) + len(URI) if path else 0
    except (OSError, ValueError):
        return 0


def read_png(folder: Path, path: str) -> tuple[bytes, str]:
    """The bytes of a picture, or none and the reason why it cannot be shown. `folder` is a resolved path."""
    if not path:
        return b"", "not made"
    found, name = _inside(folder, path), clip(path, 80)
    if found is None:
        return b"", f"not in the run folder: {name}"
    try:
        data = found.read_bytes()
    except OSError as error:
        return b"", f"{error.strerror or 'cannot be read'}: {name}"
    if not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR" or len(data) < 45:
        return b"", f"not a PNG picture: {name}"
    if b"IEND" not in data[-64:]:
        return b"", f"cut off: {name}"
    if not 0 < min(size_px(data)) <= max(size_px(data)) <= MAX_SIDE_PX:
        return b"", f"a side of 0 or over {MAX_SIDE_PX} pixels: {name}"
    return data, ""


def size_px(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from a PNG's header."""
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
