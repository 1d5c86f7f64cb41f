"""Neuron sets are values with set algebra, tied to a model, and saved as data."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmemorize.errors import ConfigError, FileFormatError, NeuronSetMismatch
from unmemorize.neurons import NeuronSet, Site, load_neurons, same_model, union

MODEL = "language/llama-1a2b3c4d-0011223344556677"
ANY = "language/llama-1a2b3c4d-*"
SITES = (Site("a.down", "in", 12), Site("a.value", "out", 7, 3), Site("b.down", "in", 12))


@st.composite
def neuron_sets(draw: st.DrawFn) -> NeuronSet:
    return NeuronSet(
        MODEL,
        {
            site: tuple(draw(st.lists(st.integers(0, site.width - 1), max_size=6)))
            for site in draw(st.sets(st.sampled_from(SITES)))
        },
    )


@given(neuron_sets(), neuron_sets(), neuron_sets())
def test_algebra_is_that_of_sets_of_pairs(a: NeuronSet, b: NeuronSet, c: NeuronSet) -> None:
    assert set(a | b) == set(a) | set(b)
    assert set(a & b) == set(a) & set(b)
    assert set(a - b) == set(a) - set(b)
    assert (a <= b) == (set(a) <= set(b))
    assert a | b == b | a
    assert a & b == b & a
    assert (a | b) - c == (a - c) | (b - c)
    assert (a | b) - b <= a
    assert a | a == a & a == a
    assert len(a - a) == 0
    assert len(a) == len(set(a)) == len(list(a))
    assert union([a, b, c]) == a | b | c
    assert (hash(a) == hash(b)) or a != b


@given(neuron_sets())
def test_membership_and_copies(a: NeuronSet) -> None:
    assert all(neuron in a for neuron in a)
    assert (Site("elsewhere", "in", 3), 0) not in a
    assert copy.deepcopy(a) == a
    assert pickle.loads(pickle.dumps(a)) == a


@given(neuron_sets())
def test_save_then_load_is_equal(tmp_path_factory: pytest.TempPathFactory, a: NeuronSet) -> None:
    assert load_neurons(a.save(tmp_path_factory.mktemp("neurons") / "neurons.json")) == a


@given(neuron_sets(), st.integers(0, 2**32))
def test_placebo_has_the_same_sizes_elsewhere(a: NeuronSet, seed: int) -> None:
    possible = all(2 * len(chosen) <= site.width for site, chosen in a.indices.items())
    if not possible:
        with pytest.raises(
            ConfigError, match="no placebo of .* neurons at .*: only .* others; choose a smaller set"
        ):
            a.placebo(seed=seed)
        return
    drawn = a.placebo(seed=seed)
    assert drawn == a.placebo(seed=seed)
    assert {s: len(c) for s, c in drawn.indices.items()} == {s: len(c) for s, c in a.indices.items()}
    assert len(drawn & a) == 0


def test_placebo_may_avoid_other_neurons() -> None:
    a = NeuronSet(MODEL, {SITES[0]: (0, 1)})
    outside = NeuronSet(MODEL, {SITES[0]: tuple(range(2, 12))})
    assert a.placebo(seed=0, outside=outside) == a


def test_indices_are_sorted_distinct_plain_integers() -> None:
    torch = pytest.importorskip("torch")
    neurons = NeuronSet(MODEL, {SITES[0]: tuple(torch.tensor([3, 1, 3]))})
    assert neurons.indices[SITES[0]] == (1, 3)
    assert all(type(index) is int for index in neurons.indices[SITES[0]])
    assert NeuronSet(MODEL, {SITES[0]: ()}).indices == {}


@pytest.mark.parametrize("index", [-1, 12])
def test_indices_out_of_range_are_refused(index: int) -> None:
    with pytest.raises(ConfigError, match=rf"out of range at a.down: got .*{index}.*, expected 0..11"):
        NeuronSet(MODEL, {SITES[0]: (3, index)})


@pytest.mark.parametrize(
    "fields", [("", "in", 3, 0), ("a", "middle", 3, 0), ("a", "in", 0, 0), ("a", "in", 3, -1)]
)
def test_impossible_sites_are_refused(fields: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="not a site: .*expected a path, side in or out"):
        Site(*fields)


def test_a_set_cannot_be_changed() -> None:
    neurons = NeuronSet(MODEL, {SITES[0]: (1,)})
    with pytest.raises(TypeError):
        neurons.indices[SITES[1]] = (2,)  # type: ignore[index]
    with pytest.raises(AttributeError):
        neurons.model_id = ANY  # type: ignore[misc]


def test_the_mapping_it_was_made_from_may_change() -> None:
    source = {SITES[0]: (1,)}
    neurons = NeuronSet(MODEL, source)
    source[SITES[0]] = (2,)
    assert neurons.indices[SITES[0]] == (1,)


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (MODEL, MODEL, True),
        (MODEL, ANY, True),
        (ANY, ANY, True),
        (MODEL, MODEL[:-1] + "8", False),
        (ANY, "language/llama-1a2b3c4e-*", False),
        (MODEL, "language/gpt2-1a2b3c4d-*", False),
    ],
)
def test_model_ids_match(first: str, second: str, equal: bool) -> None:
    assert same_model(first, second) == same_model(second, first) == equal


def test_a_combination_keeps_the_narrower_model_id() -> None:
    a, b = NeuronSet(MODEL, {SITES[0]: (1,)}), NeuronSet(ANY, {SITES[0]: (2,)})
    assert (a | b) == (b | a)
    assert (b | a).model_id == MODEL


def test_sets_of_different_models_do_not_combine() -> None:
    a, b = NeuronSet(MODEL, {SITES[0]: (1,)}), NeuronSet("language/gpt2-1a2b3c4d-*", {SITES[0]: (1,)})
    for combine in (NeuronSet.__or__, NeuronSet.__and__, NeuronSet.__sub__, NeuronSet.__le__):
        with pytest.raises(NeuronSetMismatch, match=f"different models: {MODEL} and language/gpt2"):
            combine(a, b)


def test_union_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="union of no neuron sets"):
        union([])


def _spoil(value: dict[str, Any], change: str) -> dict[str, Any]:
    site = value["sites"][0]
    if change == "index":
        site["indices"] = [site["width"]]
    elif change == "text":
        site["indices"] = ["1"]
    elif change == "float":
        site["width"] = 12.0
    elif change == "extra":
        site["comment"] = "x"
    elif change == "missing":
        del value["model_id"]
    elif change == "side":
        site["side"] = "middle"
    elif change == "version":
        value["format_version"] = 2
    elif change == "width":
        site["width"], site["indices"] = 0, []
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("index", "holds impossible neurons: .*out of range"),
        ("text", r"does not fit the neuron format at sites.0.indices.0"),
        ("float", r"does not fit the neuron format at sites.0.width"),
        ("extra", r"does not fit the neuron format at sites.0.comment"),
        ("missing", r"does not fit the neuron format at model_id"),
        ("side", r"does not fit the neuron format at sites.0.side"),
        ("version", "version 2, this release reads version 1"),
        ("width", "holds impossible neurons: not a site"),
    ],
)
def test_damaged_files_are_explained(tmp_path: Path, change: str, message: str) -> None:
    path = NeuronSet(MODEL, {SITES[0]: (1, 2)}).save(tmp_path / "neurons.json")
    path.write_text(json.dumps(_spoil(json.loads(path.read_text()), change)))
    with pytest.raises(FileFormatError, match=message) as caught:
        load_neurons(path)
    assert "\n" not in str(caught.value)


def test_truncated_files_are_explained(tmp_path: Path) -> None:
    path = NeuronSet(MODEL, {SITES[0]: (1, 2)}).save(tmp_path / "neurons.json")
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="not complete JSON"):
            load_neurons(path)


def test_light_modules_do_not_import_torch() -> None:
    code = "import sys, unmemorize, unmemorize.errors, unmemorize.files, unmemorize.neurons; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
