"""Atomic files and checked JSON: the only way anything of ours reaches the disk. Torch-free.

A file appears complete or not at all: it is written beside its destination, flushed, and renamed over it.
Every JSON file of ours carries `format` and `format_version`; both are checked when it is read.
Weights are not handled here (safetensors does that); nothing here loads code or pickles.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from unmemorize.errors import FileFormatError, RunFolderError

_BLOCK_BYTES = 4096
_MOVED = (errno.ENOENT, errno.ENOTEMPTY)


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write a whole file, or leave the old one untouched.

    Args:
        path: destination; missing parent folders are made.
        content: text (stored as UTF-8) or bytes.

    Returns:
        The destination.

    Raises:
        RunFolderError: if the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise RunFolderError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return path


def what_to_do(error: Exception, otherwise: str) -> str:
    """Say what helps when a place of our own could not be written: another process may have taken it away.

    Args:
        error: what happened.
        otherwise: what helps against everything else, such as a full disk.
    """
    code, place = getattr(error, "errno", None), getattr(error, "filename", None)
    is_made = code == errno.EEXIST and place is not None and Path(place).is_dir()
    if code in _MOVED or is_made or "No such file" in str(error):
        return "another process seems to write there too; let one finish, or choose another folder"
    return otherwise


def write_json(path: str | Path, value: Any) -> Path:
    """Write a JSON document atomically.

    Args:
        path: destination.
        value: anything `json` can store; NaN and infinity are refused, because JSON has no such numbers.
    """
    return write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(text: str) -> Any:
    """Parse JSON that anyone may have written.

    Raises:
        ValueError: if it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: str | Path, *, format: str, version: int) -> dict[str, Any]:
    """Read a JSON object of ours and check its format name and version.

    Raises:
        FileFormatError: if the file is missing, truncated, not an object, or of another format or version.
    """
    path = Path(path)
    try:
        value = parse_json(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} does not exist; expected a {format} file") from error
    except OSError as error:
        raise FileFormatError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise FileFormatError(
            f"{path} is not complete JSON ({error}); it may be truncated, make it again"
        ) from error
    if not isinstance(value, dict) or value.get("format") != format:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise FileFormatError(f"{path} is not a {format} file (found {found!r}); pass the right file")
    if value.get("format_version") != version:
        raise FileFormatError(
            f"{path} has {format} version {value.get('format_version')!r}, this release reads version {version}"
        )
    return value


def write_json_lines(path: str | Path, rows: Iterable[Any]) -> Path:
    """Write JSON Lines atomically, one line a row; NaN and infinity are refused, as by `write_json`."""
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    return write_atomic(path, "".join(lines))


def append_json_line(path: str | Path, value: Any) -> None:
    """Append one JSON line and flush it.

    A crash may tear the line; readers drop a torn last line, and the next append clears it away.

    Raises:
        RunFolderError: if the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as stream:
            stream.write(_mend_tail(stream) + line.encode("utf-8"))
    except OSError as error:
        raise RunFolderError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON Lines of ours; a torn last line (crash while appending) is dropped.

    Raises:
        FileFormatError: if the file is missing, or any line but the last is not a JSON object.
    """
    path = Path(path)
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except OSError as error:
        raise FileFormatError(f"cannot read {path}: {error.strerror or error}") from error
    if _is_row(tail):
        lines.append(tail)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line.decode("utf-8"))
        except ValueError as error:
            raise FileFormatError(f"{path} line {number} is not JSON; make the file again") from error
        if not isinstance(row, dict):
            raise FileFormatError(f"{path} line {number} is not a JSON object; make the file again")
        rows.append(row)
    return rows


def _is_row(line: bytes) -> bool:
    """Tell whether a last line without an end is nevertheless a whole JSON object."""
    try:
        return isinstance(parse_json(line.decode("utf-8")), dict)
    except ValueError:
        return False


def _mend_tail(stream: BinaryIO) -> bytes:
    """Cut a torn last line off a file that is open for appending; returns what must precede the next line."""
    end = stream.seek(0, os.SEEK_END)
    tail = b""
    while end > 0 and b"\n" not in tail:
        start = max(0, end - _BLOCK_BYTES)
        stream.seek(start)
        tail = stream.read(end - start) + tail
        end = start
    tail = tail.rpartition(b"\n")[2]
    if not tail:
        return b""
    if _is_row(tail):
        return b"\n"
    stream.truncate(stream.seek(0, os.SEEK_END) - len(tail))
    return b""


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Give a place to write to, and move it to its destination when the block has ended without an error.

    Raises:
        RunFolderError: if the destination holds something, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} already holds something; choose a new folder or empty it")
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
        yield partial
        partial.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
        partial = None
    except Exception as error:
        if not _is_unwritten(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise RunFolderError(
            f"cannot write {folder}: {reason}; free space or choose another folder"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _is_unwritten(error: Exception) -> bool:
    """Tell whether a file could not be written; safetensors reports a full disk as an error of its own."""
    from safetensors import SafetensorError

    return isinstance(error, OSError) or (isinstance(error, SafetensorError) and "I/O error" in str(error))


def _umask() -> int:
    """Read the process umask; POSIX offers no way but to set it and set it back."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
