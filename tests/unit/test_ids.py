"""Ids: golden values, range and separation; near-duplicate groups against exact Jaccard similarity."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmemorize.errors import ConfigError, MissingExtra
from unmemorize.ids import ID_MAX, content_id, near_duplicate_ids, source_id

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ids.json").read_text("utf-8"))


def test_golden_values_never_change():
    for text, number in GOLDEN["content"]:
        assert content_id("x" * 100_000 if text == "x*100000" else text) == int(number)
    for namespace, text, number in GOLDEN["namespace"]:
        assert content_id(text, namespace=namespace) == int(number)
    for name, number in GOLDEN["source"]:
        assert source_id(name) == int(number)


def test_same_id_in_another_process_with_another_hash_seed():
    code = "from unmemorize.ids import content_id; print(content_id('Once upon a time'))"
    path = str(Path(__file__).parents[2] / "src")
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert answers == {str(content_id("Once upon a time"))}


@given(st.text(), st.text(), st.text(), st.text())
def test_ids_are_in_range_and_differ_by_text_and_namespace(space, text, other_space, other):
    first, second = content_id(text, namespace=space), content_id(other, namespace=other_space)
    assert 1 <= first <= ID_MAX
    assert (first == second) == ((space, text) == (other_space, other))


def test_namespace_and_text_cannot_be_shifted_into_each_other():
    assert len({content_id("bc", namespace="a"), content_id("c", namespace="ab"), content_id("abc")}) == 3
    assert source_id("book") == content_id("book", namespace="source") != content_id("book")


def _words(seed: int, num: int = 120) -> list[str]:
    source = random.Random(seed)
    return ["".join(source.choices("abcdefghijklmnop", k=6)) for _ in range(num)]


def _changed(words: list[str], num: int, seed: int) -> str:
    source, copy = random.Random(seed), list(words)
    for place in source.sample(range(len(words)), num):
        copy[place] = "changed"
    return " ".join(copy)


def _jaccard(first: str, second: str, num_words: int = 5) -> float:
    """Exact similarity, written the slow way."""
    sets = []
    for text in (first, second):
        words = text.casefold().split()
        sets.append({tuple(words[i : i + num_words]) for i in range(max(1, len(words) - num_words + 1))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_planted_groups_are_found_and_strangers_stay_apart():
    texts, groups = [], []
    for group in range(30):
        words = _words(group)
        for copy in range(3 if group < 10 else 1):
            texts.append(_changed(words, copy, seed=100 * group + copy))
            groups.append(group)
    for i, first in enumerate(texts):  # what was planted is what exact similarity says
        for j in range(i):
            similarity = _jaccard(first, texts[j])
            assert similarity > 0.75 if groups[i] == groups[j] else similarity < 0.01
    ids = near_duplicate_ids(texts)
    assert len(set(ids)) == 30
    assert all(len({n for n, g in zip(ids, groups, strict=True) if g == group}) == 1 for group in range(30))
    members = [content_id(text) for text, group in zip(texts, groups, strict=True) if group == 0]
    assert ids[0] == min(members)


def test_groups_do_not_depend_on_order_or_on_exact_copies():
    texts = [_changed(_words(g), c, seed=c) for g in range(8) for c in range(4)]
    expected = dict(zip(texts, near_duplicate_ids(texts), strict=True))
    shuffled = texts * 3
    random.Random(1).shuffle(shuffled)
    assert near_duplicate_ids(shuffled) == [expected[text] for text in shuffled]


def test_a_chain_of_near_duplicates_is_one_group():
    words = _words(0)
    texts = [" ".join(words[start : start + 100]) for start in (0, 8, 16)]
    assert _jaccard(texts[0], texts[2]) < 0.75 < _jaccard(texts[0], texts[1])
    assert len(set(near_duplicate_ids(texts, threshold_frac=0.75, num_permutations=512))) == 1


def test_case_is_folded_and_digits_are_not():
    words = _words(3)
    same = near_duplicate_ids([" ".join(words), "  ".join(words).upper()])
    assert len(set(same)) == 1
    numbered = [" ".join(f"{word} {row}" for word in words) for row in (1, 2)]
    assert len(set(near_duplicate_ids(numbered))) == 2


def test_short_and_empty_texts():
    ids = near_duplicate_ids(["", " ", "two words", "Two  WORDS", "other words"])
    assert ids[0] == ids[1] and ids[2] == ids[3]
    assert len(set(ids)) == 3
    assert near_duplicate_ids([]) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold_frac": 0.0}, "threshold_frac is 0.0, expected above 0"),
        ({"threshold_frac": 1.5}, "threshold_frac is 1.5"),
        ({"num_permutations": 30}, "num_permutations is 30, expected a multiple of 4"),
        ({"shingle_words": 0}, "shingle_words is 0, expected 1 or more"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        near_duplicate_ids(["a"], **settings)


def test_without_rensa_the_install_line_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(MissingExtra, match=r"rensa is not installed.*unmemorize\[data\]"):
        near_duplicate_ids(["a"])
