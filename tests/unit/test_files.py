"""Files appear complete or not at all, and every unreadable one is explained in one line."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from unmemorize.errors import FileFormatError, RunFolderError
from unmemorize.files import (
    append_json_line,
    read_json,
    read_json_lines,
    whole_folder,
    write_atomic,
    write_json,
    write_json_lines,
)

HEAD = {"format": "unmemorize.example", "format_version": 1}


def read_example(path: Path) -> dict[str, Any]:
    return read_json(path, format="unmemorize.example", version=1)


def test_write_makes_folders_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    assert write_atomic(path, "first") == path
    write_atomic(path, b"second \xff")
    assert path.read_bytes() == b"second \xff"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_atomic(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("stage", ["write", "replace", "interrupt"])
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    path = write_atomic(tmp_path / "file", "old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt if stage == "interrupt" else OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace" if stage == "replace" else "fsync", fail)
    if stage == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, "new")
    else:
        with pytest.raises(RunFolderError, match=r"cannot write .*file: No space left on device; free space"):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["a folder", "below a file"])
def test_impossible_destinations_are_explained(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    path = tmp_path / "folder" if place == "a folder" else tmp_path / "file" / "below"
    with pytest.raises(
        RunFolderError, match="cannot write .*; free space or choose another folder"
    ) as caught:
        write_atomic(path, "new")
    assert "\n" not in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"loss_nats": number})
    assert not list(tmp_path.iterdir())


def test_json_round_trip(tmp_path: Path) -> None:
    value = {**HEAD, "text": "ü \u2028 \x00 😀", "numbers": [1, 2.5, None, 2**70]}
    assert read_example(write_json(tmp_path / "file.json", value)) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; expected a unmemorize.example file"),
        (b"", "is not complete JSON"),
        (b'{"format": "unmemorize.exam', "is not complete JSON .*make it again"),
        (b"\xff\xfe", "is not complete JSON"),
        (b"[" * 100_000, "is not complete JSON .it is nested too deeply"),
        (b"[]", r"is not a unmemorize.example file \(found 'list'\); pass the right file"),
        (b'{"format": "other", "format_version": 1}', r"is not a unmemorize.example file \(found 'other'\)"),
        (
            b'{"format": "unmemorize.example", "format_version": 2}',
            "has unmemorize.example version 2, this release reads version 1",
        ),
        (b'{"format": "unmemorize.example"}', "version None, this release reads version 1"),
    ],
)
def test_unreadable_json_is_explained(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileFormatError, match=message) as caught:
        read_example(path)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot read"):
        read_example(tmp_path)
    with pytest.raises(FileFormatError, match="cannot read"):
        read_json_lines(tmp_path)


ROWS: list[dict[str, Any]] = [{"text": "one\u2028line\u0085é"}, {"text": "two\nlines"}, {"loss": 1.5}]


def test_json_lines_round_trip_with_unusual_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lines.jsonl"
    for row in ROWS:
        append_json_line(path, row)
    assert read_json_lines(path) == ROWS
    assert path.read_bytes().count(b"\n") == len(ROWS)


def test_json_lines_are_written_as_they_are_appended_and_all_or_none(tmp_path: Path) -> None:
    rows = [{"text": "Grüße\u2028"}, {"n": 1}]
    for row in rows:
        append_json_line(tmp_path / "appended.jsonl", row)
    path = write_json_lines(tmp_path / "written.jsonl", rows)
    assert path.read_bytes() == (tmp_path / "appended.jsonl").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_lines(path, [{"n": 2}, {"n": float("nan")}])
    assert read_json_lines(path) == rows
    assert read_json_lines(write_json_lines(path, [])) == []


def test_every_possible_tear_keeps_whole_rows_and_lets_appending_continue(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    for row in ROWS:
        append_json_line(whole, row)
    data = whole.read_bytes()
    path = tmp_path / "torn.jsonl"
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        kept = read_json_lines(path)
        assert kept == ROWS[: len(kept)]
        assert len(kept) >= data[:length].count(b"\n")
        append_json_line(path, {"after": length})
        assert read_json_lines(path) == [*kept, {"after": length}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\nnot json\n{"a": 2}\n', "line 2 is not JSON; make the file again"),
        (b'{"a": 1}\n[2]\n{"a": 3}\n', "line 2 is not a JSON object"),
        (b'{"a": 1}\n\xff\n{"a": 3}\n', "line 2 is not JSON"),
        (b'{"a": 1}\n\n{"a": 3}\n', "line 2 is not JSON"),
        (b'{"a": 1}\n' + b"[" * 100_000 + b"\n", "line 2 is not JSON"),
    ],
)
def test_damage_inside_json_lines_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=message):
        read_json_lines(path)


def test_missing_json_lines_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot read .*lines.jsonl"):
        read_json_lines(tmp_path / "lines.jsonl")


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), max_size=5))
def test_json_lines_hold_any_text(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    path.touch()
    for row in rows:
        append_json_line(path, row)
    assert read_json_lines(path) == json.loads(json.dumps(rows))


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_folder_that_cannot_be_written_is_explained_and_not_there(tmp_path: Path, error: Exception) -> None:
    def write() -> None:
        with whole_folder(tmp_path / "plain") as partial:
            (partial / "half").write_text("half")
            raise error

    with pytest.raises(RunFolderError, match="cannot write .*plain: .*No space left .*; free space"):
        write()
    assert list(tmp_path.iterdir()) == []
