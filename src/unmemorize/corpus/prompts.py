"""Prompts of a text-to-image model: a table, JSON Lines or one prompt a line, each with its group. Torch-free.

A prompt is a target unless the file or the caller says otherwise. `picture` names training pictures, relative to the
file. One prompt in two groups is an error: a target among the controls would fake what the controls are there to show.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from unmemorize.corpus.readers import is_unicode, text_lines
from unmemorize.errors import DataError
from unmemorize.files import parse_json

PromptGroup = Literal["target", "neighbour", "heldout", "ordinary"]

_TEXT_COLUMNS = ("prompt", "caption", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt and what is known of it.

    Attributes:
        text: the prompt.
        group: target, neighbour, heldout or ordinary.
        pictures: training pictures that it is said to reproduce; paths.
        kind: what the source calls it (for example "VM" and "TM"); "" if nothing.
    """

    text: str
    group: PromptGroup = "target"
    pictures: tuple[Path, ...] = ()
    kind: str = ""


def read_prompts(
    path: str | Path, *, column: str | None = None, group: PromptGroup = "target", limit: int | None = None
) -> list[Prompt]:
    """Read prompts from `.csv`, `.jsonl` or `.txt` (one a line), each also with `.gz`.

    Columns of a table: the prompt (`prompt`, `caption` or `text`, or `column`), and optionally `group`, `picture`
    (several are separated by `|`) and `type`. Equal rows are read once.

    Args:
        path: the file.
        column: name of the column that holds the prompt.
        group: group of rows that name none.
        limit: read at most this many prompts.

    Raises:
        DataError: if the file is missing, empty, damaged, lacks the column, names an unknown group, or puts one prompt
            into two groups.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}, expected 1 prompt or more")
    found: dict[str, Prompt] = {}
    for number, row in enumerate(_rows(path, column), start=1):
        prompt = _prompt(path, number, row, group)
        before = found.setdefault(prompt.text, prompt)
        if before.group != prompt.group:
            raise DataError(
                f"{path} row {number}: the prompt {prompt.text[:60]!r} is both {before.group} and {prompt.group}; "
                "give every prompt one group"
            )
        if len(found) == limit:
            break
    if not found:
        raise DataError(f"{path} holds no prompts; expected one a line, or a table with a prompt column")
    return list(found.values())


def require_apart(prompts: Sequence[Prompt], ordinary: Sequence[str]) -> None:
    """Raise `DataError` if a prompt that is looked for also stands among the ordinary ones."""
    looked_for = {prompt.text for prompt in prompts if prompt.group != "ordinary"}
    both = next((text for text in ordinary if text in looked_for), None)
    if both is not None:
        raise DataError(
            f"the prompt {both[:60]!r} stands among the examples and among the ordinary prompts; take it out of one"
        )


def _prompt(path: Path, number: int, row: dict[str, Any], group: PromptGroup) -> Prompt:
    if not isinstance(row["prompt"], str):
        kind = type(row["prompt"]).__name__
        raise DataError(f"{path} row {number}: the prompt is {kind}, expected text; repair or delete the row")
    text = row["prompt"].strip()
    if not is_unicode(text):
        raise DataError(
            f"{path} row {number}: the prompt holds half of a surrogate pair, which no encoding can store; repair it"
        )
    if not text:
        raise DataError(f"{path} row {number} holds an empty prompt; delete the row")
    named = str(row.get("group") or group)
    if named not in get_args(PromptGroup):
        raise DataError(
            f"{path} row {number} names group {named!r}; expected {', '.join(get_args(PromptGroup))}"
        )
    pictures = [part for part in str(row.get("picture") or "").split("|") if part]
    return Prompt(
        text=text,
        group=cast("PromptGroup", named),
        pictures=tuple(path.parent / part for part in pictures),
        kind=str(row.get("type") or ""),
    )


def _rows(path: Path, column: str | None) -> Iterator[dict[str, Any]]:
    """Yield rows whose prompt is called `prompt`."""
    kind = path.name.lower().removesuffix(".gz")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}; expected a file of prompts (.csv, .jsonl or .txt)")
    if kind.endswith(".txt"):
        yield from ({"prompt": line} for line in text_lines(path) if line.strip())
    elif kind.endswith(".csv"):
        reader = csv.DictReader(text_lines(path), strict=True)
        try:
            name = _text_column(path, [name or "" for name in reader.fieldnames or []], column)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path} line {reader.line_num} has another number of columns than the header; mend the row"
                    )
                yield {**_lower(row), "prompt": row[name]}
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} is no row of a table: {error}") from error
    elif kind.endswith((".jsonl", ".ndjson")):
        for number, line in enumerate(text_lines(path), start=1):
            if not line.strip():
                continue
            try:
                value = parse_json(line)
            except ValueError as error:
                raise DataError(f"{path} line {number} is not JSON ({error}); make the file again") from error
            if not isinstance(value, dict):
                raise DataError(f"{path} line {number} is not a JSON object; make the file again")
            yield {**_lower(value), "prompt": value[_text_column(path, list(value), column)]}
    else:
        raise DataError(f"{path} is of an unknown kind; expected .csv, .jsonl or .txt (also .gz)")


def _text_column(path: Path, names: Sequence[str], column: str | None) -> str:
    keys = [name.strip().lower() for name in names]
    twice = next((name for name in keys if name and keys.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has more than one column {twice}; rename or delete the others")
    lower = dict(zip(keys, names, strict=True))
    wanted = [column.strip().lower()] if column is not None else list(_TEXT_COLUMNS)
    for name in wanted:
        if name in lower:
            return lower[name]
    raise DataError(f"{path} has no column {' or '.join(wanted)}; it has {', '.join(names) or 'none'}")


def _lower(row: dict[str, Any]) -> dict[str, Any]:
    return {str(name).strip().lower(): value for name, value in row.items()}
