"""Prompt files: every form gives the same prompts, and every mistake is one line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from unmemorize.corpus.prompts import Prompt, read_prompts, require_apart
from unmemorize.errors import DataError


def written(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", 'row,Caption,group\n0,a cat,target\n1,"a dog, old",ordinary\n'),
        ("p.csv.gz", 'prompt,group\na cat,\n"a dog, old",ordinary\na cat,\n'),
        ("p.jsonl", '{"text": "a cat"}\n\n{"text": "a dog, old", "group": "ordinary"}\n'),
    ],
)
def test_every_form_gives_the_same_prompts(tmp_path: Path, name: str, text: str) -> None:
    found = read_prompts(written(tmp_path / name, text))
    assert found == [Prompt(text="a cat"), Prompt(text="a dog, old", group="ordinary")]


def test_lines_pictures_kinds_and_limit(tmp_path: Path) -> None:
    lines = written(tmp_path / "p.txt", "a cat\n\na dog\na cat\n")
    assert [p.text for p in read_prompts(lines, group="ordinary")] == ["a cat", "a dog"]
    assert [p.group for p in read_prompts(lines, group="ordinary", limit=1)] == ["ordinary"]
    table = written(tmp_path / "p.csv", "prompt,picture,type\na cat,x/1.png|2.png,VM\n")
    (prompt,) = read_prompts(table)
    assert prompt.pictures == (tmp_path / "x/1.png", tmp_path / "2.png") and prompt.kind == "VM"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "name\na cat\n", "has no column prompt or caption or text; it has name"),
        ("p.csv", "prompt,group\na cat,enemy\n", "row 1 names group 'enemy'; expected target"),
        ("p.csv", "prompt,group\na cat,target\na cat,ordinary\n", "'a cat' is both target and ordinary"),
        ("p.csv", "prompt,group\na cat\n", "line 2 has another number of columns than the header"),
        ("p.csv", 'prompt\n"a cat\n', "is no row of a table"),
        ("p.csv", 'prompt\n" "\n', "row 1 holds an empty prompt"),
        ("p.txt", "\n", "holds no prompts; expected one a line"),
        ("p.jsonl", "{\n", "line 1 is not JSON"),
        ("p.jsonl", "[]\n", "line 1 is not a JSON object"),
        ("p.jsonl", "[" * 100_000, "line 1 is not JSON .it is nested too deeply"),
        ("p.jsonl", '{"prompt": null}\n', "row 1: the prompt is NoneType, expected text"),
        ("p.jsonl", '{"prompt": NaN}\n', "row 1: the prompt is float, expected text"),
        ("p.jsonl", '{"prompt": "a \\ud83d cat"}\n', "row 1: the prompt holds half of a surrogate pair"),
        ("p.csv", "text,text,group\na cat,a dog,target\n", "has more than one column text"),
        ("p.yaml", "a", "is of an unknown kind"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(written(tmp_path / name, text))


def test_missing_files_limits_and_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; expected a file of prompts"):
        read_prompts(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="is a folder; expected a file of prompts"):
        read_prompts(tmp_path)
    table = written(tmp_path / "p.csv", "prompt,title\na cat,the cat\n")
    assert read_prompts(table, column="Title")[0].text == "the cat"
    with pytest.raises(DataError, match="has no column name; it has prompt, title"):
        read_prompts(table, column="name")
    with pytest.raises(DataError, match="limit is 0"):
        read_prompts(table, limit=0)


def test_a_target_among_the_ordinary_prompts_is_an_error() -> None:
    require_apart([Prompt(text="a cat", group="ordinary")], ["a cat"])
    with pytest.raises(DataError, match="'a cat' stands among the examples and among the ordinary prompts"):
        require_apart([Prompt(text="a cat")], ["a dog", "a cat"])
