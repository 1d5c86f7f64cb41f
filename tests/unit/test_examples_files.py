"""Files of examples that a user wrote: what a damaged or mistyped row says, and that no row is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unmemorize.audit.model import read_examples
from unmemorize.errors import DataError


class Letters:
    """A tokenizer of code points."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def read(path: Path) -> Any:
    return read_examples(path, Letters(), 64)  # type: ignore[arg-type]


def test_blank_lines_are_no_rows_and_repeats_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"text": "one", "repeats": 3}\n\n{"text": "two", "group": "ordinary"}\n')
    assert [(one.group, one.repeats) for one in read(path)] == [("target", 3), ("ordinary", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "one"}\n{"text": "tw', "line 2 is not JSON"),
        ('[{"text": "one"}]', "line 1 is a JSON list; expected one object a line"),
        ('{"text": NaN}\n', "row 1 has no text"),
        ('{"text": "a \\ud83d b"}\n', "row 1: the text holds half of a surrogate pair"),
        ('{"text": "one", "repeats": "many"}\n', "row 1: repeats is 'many', expected a whole number"),
        ('{"text": "one", "repeats": null}\n', "row 1: repeats is None"),
        ('{"text": "one", "repeats": Infinity}\n', "row 1: repeats is inf"),
        ('{"text": "one", "repeats": -1}\n', "row 1: repeats is -1"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read(path)


def test_a_torn_last_line_of_a_run_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "examples.jsonl").write_text(json.dumps({"text": "one"}) + '\n{"text": "tw')
    assert len(read(tmp_path)) == 1
