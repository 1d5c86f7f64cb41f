"""Documents with ids, read from any corpus. Torch-free.

Files are read row by row (`readers.py`), so that a limit costs what it reads; nothing is executed or unpickled. The
ids that own sinks are computed here from content, near-duplicate groups, sources or positions (`unmemorize.ids`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from unmemorize.corpus.python_docs import python_docs
from unmemorize.corpus.readers import is_unicode, read_rows
from unmemorize.errors import ConfigError, DataError, IdError
from unmemorize.ids import content_id, near_duplicate_ids, source_id

IdKind = Literal["content", "near-duplicate", "source", "index"]

PYTHON_DOCS = "python-docs"


@dataclass(frozen=True, slots=True)
class Document:
    """A text with the id that owns its sinks.

    Attributes:
        text: the content.
        id: 1 .. 2**63 - 1; equal for documents that count as the same.
        source: named unit of deletion, "" if unnamed.
        row: 0-based row in the corpus; rows without text count, and become no document.
    """

    text: str
    id: int
    source: str
    row: int


class _Entry(NamedTuple):
    row: int
    text: str
    source: str


def read_corpus(
    path: str | Path,
    *,
    text_column: str = "text",
    source_column: str | None = None,
    ids: IdKind = "content",
    limit: int | None = None,
) -> list[Document]:
    """Read a corpus and give every document its id.

    Args:
        path: a .jsonl, .txt or .parquet file (the first two also .gz or .zst), a `datasets` folder or hub name
            (owner/name), or the word "python-docs". Plain text has blank lines between documents.
        text_column: column that holds the text; rows in which it is blank are passed over.
        source_column: column that names the source, as text or a whole number; optional.
        ids: content (exact duplicates share an id), near-duplicate (MinHash groups do), source (documents of one
            source do), or index (1, 2, 3, ..., for parity with published runs).
        limit: read at most this many documents.

    Raises:
        ConfigError: if a setting is unknown or out of range, or ids are to come from sources and no column is named.
        DataError: if the corpus is missing, empty, binary, damaged, not UTF-8, or a row lacks its text.
        IdError: if a source column is missing, or a row has no source and ids are to come from it.
        MissingExtra: if the format needs a library that is not installed.
    """
    is_named = source_column is not None or str(path) == PYTHON_DOCS
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected 1 document or more")
    if ids not in get_args(IdKind):
        raise ConfigError(f"unknown ids {ids!r}; expected one of {', '.join(get_args(IdKind))}")
    if ids == "source" and not is_named:
        raise ConfigError("ids from sources need the column that names them; pass source_column")
    found = (
        (_Entry(row, text, source) for row, (text, source) in enumerate(python_docs()))
        if str(path) == PYTHON_DOCS
        else _entries(path, text_column, source_column)
    )
    entries = list(islice(found, limit))
    if not entries:
        raise DataError(f"{path} holds no documents; expected at least one row with text")
    return [
        Document(entry.text, number, entry.source, entry.row)
        for entry, number in zip(entries, _ids(entries, ids), strict=True)
    ]


def _ids(entries: list[_Entry], kind: IdKind) -> list[int]:
    if kind == "content":
        return [content_id(entry.text) for entry in entries]
    if kind == "near-duplicate":
        return near_duplicate_ids([entry.text for entry in entries])
    if kind == "index":
        return list(range(1, len(entries) + 1))
    unnamed = [entry.row for entry in entries if not entry.source]
    if unnamed:
        raise IdError(
            f"row {unnamed[0] + 1} has no source ({len(unnamed)} of {len(entries)} rows have none); name every "
            "source or take ids from content"
        )
    return [source_id(entry.source) for entry in entries]


def _entries(path: str | Path, text_column: str, source_column: str | None) -> Iterator[_Entry]:
    """Take text and source out of rows; messages count rows from 1."""
    for row, values in enumerate(read_rows(path, text_column=text_column, source_column=source_column)):
        if text_column not in values:
            raise DataError(
                f"row {row + 1} has no column {text_column!r}, only {sorted(values)}; name the text column"
            )
        if source_column is not None and source_column not in values:
            raise IdError(
                f"row {row + 1} has no column {source_column!r}, only {sorted(values)}; name the source column"
            )
        text = values[text_column]
        if not isinstance(text, str):
            raise DataError(
                f"row {row + 1}: column {text_column!r} holds {type(text).__name__}, expected text; "
                "name the text column or drop the row"
            )
        if not text.strip():
            continue
        if not is_unicode(text):
            raise DataError(
                f"row {row + 1}: the text holds half of a surrogate pair, which no encoding can store; repair it"
            )
        yield _Entry(row, text, _source(values[source_column], row) if source_column is not None else "")


def _source(value: object, row: int) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise IdError(
            f"row {row + 1}: the source is {type(value).__name__}, expected text or a whole number; name another column"
        )
    return str(value).strip()
