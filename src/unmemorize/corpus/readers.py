"""Rows of a corpus as mappings, streamed from JSON Lines, plain text, Parquet, `datasets` folders and hub names.

Text is decoded strictly: a damaged, truncated or binary file is an error with its line, never a shorter corpus. What a
row must hold is checked by the caller.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from unmemorize.errors import DataError, UnmemorizeError, missing_extra
from unmemorize.files import parse_json

Row = dict[str, Any]

_JSON = (".jsonl", ".json", ".ndjson")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_CHUNK_BYTES = 1 << 16


def read_rows(path: str | Path, *, text_column: str, source_column: str | None) -> Iterator[Row]:
    """Stream the rows of a file, a folder or a hub name.

    Args:
        path: what to read; the extension tells how.
        text_column: what the text of plain-text documents is called; columnar formats read only the columns named.
        source_column: column that names the source; optional.

    Raises:
        DataError: if there is nothing of that name, its kind is unknown, or it is damaged.
        MissingExtra: if the format needs a library that is not installed.
    """
    path = Path(path)
    kind = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    wanted = [text_column] if source_column is None else [text_column, source_column]
    is_file_name = kind.endswith((*_JSON, ".txt", ".parquet"))
    is_hub_name = not path.exists() and not is_file_name and _HUB_NAME.fullmatch(str(path)) is not None
    if path.is_dir() or is_hub_name:
        yield from _dataset_rows(path, wanted)
    elif not path.is_file():
        raise DataError(
            f"{path} does not exist; expected a corpus file or folder, or a hub name like owner/name"
        )
    elif kind.endswith(_JSON):
        yield from _json_rows(path)
    elif kind.endswith(".txt"):
        yield from ({text_column: text} for text in _paragraphs(text_lines(path)))
    elif path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path, wanted)
    else:
        raise DataError(
            f"{path} is of an unknown kind; expected .jsonl or .txt (also .gz or .zst), or .parquet"
        )


def text_lines(path: Path) -> Iterator[str]:
    """Stream lines of UTF-8 text, compressed or not."""
    number = 0
    try:
        with _opened(path) as stream:
            for number, line in enumerate(stream, start=1):
                if b"\0" in line:
                    raise DataError(f"{path} line {number} holds binary data; expected UTF-8 text")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} line {number} is not UTF-8 (byte {error.start + 1} of the line is "
            f"{error.object[error.start]:#04x}); convert the file"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is damaged or truncated after line {number} ({error}); copy or make it again"
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; check the file and its permissions"
        ) from error


def is_unicode(text: str) -> bool:
    """Tell whether a text can be stored; half of a surrogate pair, which JSON can name, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _opened(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstandardStream(path), _CHUNK_BYTES)
    return path.open("rb")


class _ZstandardStream(io.RawIOBase):
    """Decompressed bytes of a .zst file, all of its frames.

    The library's own reader takes a truncated file for a shorter one, and stops after the first of several frames.
    """

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise missing_extra("zstandard", "data") from None
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._file = path.open("rb")
        self._compressed, self._held = b"", b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._held and self._fill():
            pass
        size = min(len(buffer), len(self._held))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size

    def _fill(self) -> bool:
        """Decompress one more chunk; returns whether there may be more."""
        self._compressed = self._compressed or self._file.read(_CHUNK_BYTES)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("the last frame has no end")
            return False
        self._frame = self._frame or self._new_frame()
        try:
            self._held = self._frame.decompress(self._compressed)
        except self._error as error:
            raise EOFError(str(error)) from error
        self._compressed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
        return True


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(
                f"{path} line {number} is not JSON ({error}); expected one object a line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path} line {number} is a JSON {type(row).__name__}; expected one object a line"
            )
        yield row


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Split plain text into documents at blank lines."""
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line)
        elif held:
            yield "".join(held).strip()
            held = []
    if held:
        yield "".join(held).strip()


def _parquet_rows(path: Path, wanted: list[str]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", "data") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(1024, columns=_columns(table.schema_arrow.names, wanted)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file ({_first_line(error)}); make it again"
        ) from error


def _dataset_rows(path: Path, wanted: list[str]) -> Iterator[Row]:
    """Stream a folder written by `datasets.save_to_disk`, a folder of data files, or a hub name."""
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "data") from None
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            data: Any = datasets.load_from_disk(str(path))
            if isinstance(data, dict):
                data = _train_split(data, path)
        else:
            data = datasets.load_dataset(str(path), split="train", streaming=True)
        if data.column_names:
            data = data.select_columns(_columns(data.column_names, wanted))
        yield from data
    except UnmemorizeError:
        raise
    except Exception as error:  # datasets and its readers raise dozens of kinds
        raise DataError(
            f"cannot read {path} as a data set ({_first_line(error)}); expected a file, a folder or a hub name"
        ) from error


def _train_split(splits: dict[str, Any], path: Path) -> Any:
    if "train" not in splits:
        raise DataError(
            f"{path} has the splits {sorted(splits)} and no 'train'; save the one to read by itself"
        )
    return splits["train"]


def _columns(names: list[str], wanted: list[str]) -> list[str]:
    """Return the columns to read; all of them if one is missing, so that the message can name what there is."""
    return wanted if set(wanted) <= set(names) else list(names)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
