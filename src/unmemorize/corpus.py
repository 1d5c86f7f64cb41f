"""Corpora: documents with ids from files, and the mixture an experiment trains on. Torch-free.

Read are JSON Lines, plain text with blank lines between documents, Parquet, a folder written by
`datasets.save_to_disk`, a hub name (streamed), and `python-docs`: the documentation that every Python interpreter
carries. Files are streamed; nothing is executed or unpickled.

A `Mixture` splits a corpus into documents that are repeated, seen once, and kept for validation, so that what a model
memorizes is known; its `schedule` is the shuffled multiset that one training pass goes through.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import random
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from unmemorize.errors import ConfigError, DataError, IdError, missing_extra
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
        row: 0-based position in the corpus.
    """

    text: str
    id: int
    source: str
    row: int


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
        path: a .jsonl, .txt or .parquet file (the first two also .gz or .zst), a `datasets` folder or hub name, or
            the word "python-docs".
        text_column: column that holds the text.
        source_column: column that names the source; optional.
        ids: content (exact duplicates share an id), near-duplicate (MinHash groups do), source (documents of one
            source do), or index (position + 1, for parity with published runs).
        limit: read at most this many documents.

    Raises:
        DataError: if the corpus is empty, binary, not UTF-8, or a row lacks its text.
        IdError: if ids are to come from sources and a row has none.
        MissingExtra: if the format needs a library that is not installed.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected 1 document or more")
    pairs: Iterable[tuple[str, str]] = (
        _python_docs()
        if str(path) == PYTHON_DOCS
        else _columns(_rows(path, text_column), text_column, source_column)
    )
    rows = list(islice(pairs, limit))
    if not rows:
        raise DataError(f"{path} holds no documents; expected at least one")
    return [
        Document(text, number, source, row)
        for row, ((text, source), number) in enumerate(zip(rows, _ids(rows, ids), strict=True))
    ]


def _ids(rows: list[tuple[str, str]], kind: IdKind) -> list[int]:
    if kind == "content":
        return [content_id(text) for text, _ in rows]
    if kind == "near-duplicate":
        return near_duplicate_ids([text for text, _ in rows])
    if kind == "index":
        return [row + 1 for row in range(len(rows))]
    if kind == "source":
        unnamed = [row for row, (_, source) in enumerate(rows) if not source]
        if unnamed:
            raise IdError(
                f"row {unnamed[0] + 1} has no source ({len(unnamed)} of {len(rows)} rows); name every source or use "
                "ids='content'"
            )
        return [source_id(source) for _, source in rows]
    raise ConfigError(f"unknown ids {kind!r}; expected content, near-duplicate, source or index")


def _columns(
    rows: Iterable[dict[str, Any]], text_column: str, source_column: str | None
) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(rows, start=1):
        text = row.get(text_column)
        if not isinstance(text, str):
            problem = "is not text" if text_column in row else f"is missing; the columns are {sorted(row)}"
            raise DataError(f"row {number}: column {text_column!r} {problem}; name the text column")
        if not text.strip():
            continue
        source = row.get(source_column, "") if source_column else ""
        if source_column and source_column not in row:
            raise IdError(
                f"row {number}: column {source_column!r} is missing; the columns are {sorted(row)}; name the source column"
            )
        yield text, "" if source is None else str(source)


def _rows(path: str | Path, text_column: str) -> Iterator[dict[str, Any]]:
    path = Path(path)
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if path.is_dir() or not path.suffix:
        yield from _dataset_rows(path)
    elif not path.is_file():
        raise DataError(f"{path} does not exist; expected a corpus file or folder")
    elif name.endswith((".jsonl", ".json", ".ndjson")):
        yield from _json_rows(path)
    elif name.endswith(".txt"):
        yield from ({text_column: text} for text in _paragraphs(_lines(path)))
    elif name.endswith(".parquet"):
        yield from _parquet_rows(path)
    else:
        raise DataError(
            f"{path} is not a known kind of corpus; expected .jsonl, .txt (.gz, .zst) or .parquet"
        )


def _lines(path: Path) -> Iterator[str]:
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
            f"{path} line {number} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); convert the file"
        ) from error
    except (EOFError, OSError) as error:
        raise DataError(
            f"cannot read {path} after line {number}: {error}; the file may be truncated"
        ) from error


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise missing_extra("zstandard", "data") from None
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True)
        return io.BufferedReader(reader)  # type: ignore[arg-type]
    return path.open("rb")


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
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


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", "data") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _dataset_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Stream a saved `datasets` folder, a folder of data files, or a hub name."""
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "data") from None
    try:
        if (path / "dataset_info.json").is_file():
            data: Any = datasets.load_from_disk(str(path))
        elif (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(path))["train"]
        else:
            data = datasets.load_dataset(str(path), split="train", streaming=True)
        yield from (dict(row) for row in data)
    except DataError:
        raise
    except Exception as error:  # datasets raises dozens of kinds
        text = str(error).strip().splitlines()
        raise DataError(
            f"cannot read {path} as a data set: {text[0] if text else type(error).__name__}"
        ) from error


def _python_docs() -> Iterator[tuple[str, str]]:
    """Yield the interpreter's own documentation: language topics, then docstrings of its library, sorted by name."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip(), f"topics/{name}"
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(
            part in ("test", "tests", "site-packages", "idlelib", "lib2to3") or "-" in part for part in parts
        ):
            continue
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for name, node in _named_nodes(tree, module):
            text = ast.get_docstring(node)
            if text and len(text) >= 100:
                yield text, f"library/{name}"


def _named_nodes(tree: ast.Module, module: str) -> Iterator[tuple[str, Any]]:
    yield module, tree
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{module}.{node.name}", node


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSettings:
    """How a corpus becomes an experiment with known memory."""

    num_repeated: int = 64
    """Documents that are repeated."""
    repeats: int = 64
    """Times each of them is seen."""
    num_once: int = 6000
    """Documents that are seen once; at most, if the corpus is smaller."""
    num_validation: int = 300
    """Documents that are never seen."""
    min_characters: int = 1
    """Shorter documents are left out."""
    repeated_source: str = ""
    """Repeat only documents whose source starts with this."""
    seed: int = 0
    """Seed of the split."""

    def __post_init__(self) -> None:
        for name in ("num_repeated", "repeats", "num_validation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.num_once < 0:
            raise ConfigError(f"num_once is {self.num_once}, expected 0 or more")


@dataclass(frozen=True, slots=True)
class Mixture:
    """A split corpus. No content is in two parts; documents of one part have distinct ids."""

    repeated: tuple[Document, ...]
    once: tuple[Document, ...]
    validation: tuple[Document, ...]
    repeats: int

    def counts(self, cap: int | None = None) -> list[tuple[Document, int]]:
        """List the training documents with how often each is seen, at most `cap` times."""
        repeats = self.repeats if cap is None else min(cap, self.repeats)
        return [(d, repeats) for d in self.repeated] + [(d, 1) for d in self.once]

    def schedule(self, cap: int | None = None, *, seed: int) -> list[Document]:
        """Return one training pass: the multiset of `counts`, shuffled by seed."""
        order = [document for document, times in self.counts(cap) for _ in range(times)]
        random.Random(seed).shuffle(order)
        return order


def mix(documents: list[Document], settings: MixtureSettings) -> Mixture:
    """Split a corpus into repeated, once and validation documents; each id appears once in the split.

    Raises:
        DataError: if there are not enough different documents.
    """
    seen: Counter[int] = Counter()
    distinct: list[Document] = []
    for document in documents:
        seen[document.id] += 1
        if seen[document.id] == 1 and len(document.text) >= settings.min_characters:
            distinct.append(document)
    random.Random(settings.seed).shuffle(distinct)
    fitting = [d for d in distinct if d.source.startswith(settings.repeated_source)]
    repeated = tuple(fitting[: settings.num_repeated])
    taken = {d.id for d in repeated}
    rest = [d for d in distinct if d.id not in taken]
    if len(repeated) < settings.num_repeated or len(rest) < settings.num_validation:
        raise DataError(
            f"the corpus has {len(distinct)} different documents of {settings.min_characters} characters or more, "
            f"{len(fitting)} of them to repeat; expected {settings.num_repeated} to repeat and {settings.num_validation} "
            "for validation; use a larger corpus or smaller numbers"
        )
    validation = tuple(rest[: settings.num_validation])
    once = tuple(rest[settings.num_validation :][: settings.num_once])
    return Mixture(repeated, once, validation, settings.repeats)
