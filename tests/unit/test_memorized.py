"""Sets of memorized sequences: both file kinds, cutting, and bad input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from unmemorize.corpus.memorized import MemorizedExample, cut_examples, read_memorized
from unmemorize.errors import ConfigError, DataError


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_of_ids_texts_and_whole_sequences(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "set.jsonl",
        {"prefix": [1, 2], "suffix": [3], "name": "a", "source": "book"},
        {"prefix": "ab", "suffix": "c"},
        {"tokens": [5, 6, 7, 8, 9]},
    )
    found = read_memorized(
        path,
        tokenizer="gpt2",
        prefix_tokens=2,
        suffix_tokens=2,
        encode=lambda text: list(text.encode()),
    )
    assert found.tokenizer == "gpt2"
    assert found.examples == (
        MemorizedExample(prefix=(1, 2), suffix=(3,), name="a", source="book"),
        MemorizedExample(prefix=(97, 98), suffix=(99,), name="1"),
        MemorizedExample(prefix=(5, 6), suffix=(7, 8), name="2"),
    )
    assert len(read_memorized(path, tokenizer="gpt2", limit=1).examples) == 1


def test_compressed_rows_name_their_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl.gz"
    row = {"prefix": [1], "suffix": [2], "tokenizer": "pythia"}
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    assert read_memorized(path).tokenizer == "pythia"
    assert read_memorized(path, tokenizer="pythia").tokenizer == "pythia"
    with pytest.raises(DataError, match="row 0: the tokenizer is pythia, expected gpt2"):
        read_memorized(path, tokenizer="gpt2")


def test_arrays_alone_and_in_two_halves(tmp_path: Path) -> None:
    rows = numpy.arange(12, dtype=numpy.uint16).reshape(2, 6)
    numpy.save(tmp_path / "whole.npy", rows)
    numpy.save(tmp_path / "head.npy", rows[:, :2])
    numpy.save(tmp_path / "tail.npy", rows[:, 2:])
    whole = read_memorized(tmp_path / "whole.npy", tokenizer="t", prefix_tokens=2, suffix_tokens=4)
    halves = read_memorized(tmp_path / "head.npy", tokenizer="t", suffix_path=tmp_path / "tail.npy")
    assert whole == halves
    assert whole.examples[1].tokens == (6, 7, 8, 9, 10, 11)


def test_digests_know_where_the_suffix_begins() -> None:
    first = MemorizedExample(prefix=(1, 2), suffix=(3,))
    assert first.digest == MemorizedExample(prefix=(1, 2), suffix=(3,), name="other").digest
    assert first.digest != MemorizedExample(prefix=(1,), suffix=(2, 3)).digest
    assert first.digest != MemorizedExample(prefix=(12,), suffix=(3,)).digest


def test_sequences_are_cut() -> None:
    (one,) = cut_examples([[1, 2, 3, 4]], 1, 2, names=["x"])
    assert one == MemorizedExample(prefix=(1,), suffix=(2, 3), name="x")
    with pytest.raises(DataError, match=r"example '0' has 2 tokens, expected at least 1 \+ 2"):
        cut_examples([[1, 2]], 1, 2)
    with pytest.raises(ConfigError, match="prefix and suffix are 0 and 2 tokens, expected 1 or more"):
        cut_examples([[1, 2]], 0, 2)
    with pytest.raises(DataError, match="example 'x' has 0 prefix and 1 suffix tokens"):
        MemorizedExample(prefix=(), suffix=(1,), name="x")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prefix": [1]}, r"row 0 has no 'suffix' \(it has prefix\); expected prefix and suffix, or tokens"),
        ({"text": "a"}, r"row 0 has no 'prefix' \(it has text\)"),
        ({"prefix": [1], "suffix": [2.5]}, "row 0: suffix is not a list of token ids"),
        ({"prefix": [True], "suffix": [2]}, "row 0: prefix is not a list of token ids"),
        ({"prefix": [-1], "suffix": [2]}, "row 0: prefix is not a list of token ids"),
        ({"prefix": 3, "suffix": [2]}, "row 0: prefix is not a list of token ids"),
        ({"prefix": "a", "suffix": [2]}, "row 0: prefix is text; pass encode="),
        ({"prefix": [], "suffix": [2]}, "has 0 prefix and 1 suffix tokens"),
        ({"tokens": [1, 2]}, r"has 2 tokens, expected at least 32 \+ 32"),
    ],
)
def test_bad_rows_are_explained(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_memorized(lines(tmp_path / "set.jsonl", row), tokenizer="t")


def test_bad_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the tokenizer is not named, expected a name"):
        read_memorized(lines(tmp_path / "set.jsonl", {"prefix": [1], "suffix": [2]}))
    with pytest.raises(DataError, match="holds no sequences"):
        read_memorized(lines(tmp_path / "empty.jsonl"), tokenizer="t")
    with pytest.raises(DataError, match="does not exist"):
        read_memorized(tmp_path / "none.jsonl", tokenizer="t")
    with pytest.raises(DataError, match=r"cannot read .*none.npy as a NumPy array"):
        read_memorized(tmp_path / "none.npy", tokenizer="t")
    numpy.save(tmp_path / "float.npy", numpy.zeros((2, 3)))
    with pytest.raises(DataError, match=r"holds float64 of shape \(2, 3\); expected integers"):
        read_memorized(tmp_path / "float.npy", tokenizer="t")
    objects = numpy.empty(2, dtype=object)
    objects[:] = [[1], [2, 3]]
    numpy.save(tmp_path / "object.npy", objects, allow_pickle=True)
    with pytest.raises(DataError, match="as a NumPy array"):
        read_memorized(tmp_path / "object.npy", tokenizer="t")
    numpy.save(tmp_path / "two.npy", numpy.zeros((2, 3), dtype=int))
    numpy.save(tmp_path / "three.npy", numpy.zeros((3, 3), dtype=int))
    with pytest.raises(DataError, match=r"has 2 rows and .*three.npy 3; expected the two halves"):
        read_memorized(tmp_path / "two.npy", tokenizer="t", suffix_path=tmp_path / "three.npy")
