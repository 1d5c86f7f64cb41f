"""Scores as a value: choosing the best, files, averages; formulas of attribution at known points."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmemorize.errors import ConfigError, FileFormatError, ShapeMismatch
from unmemorize.localize.attribution import (
    activation_scores,
    concrete_gates,
    concrete_open,
    initial_logit,
    interpolation_points,
)
from unmemorize.localize.neuron_scores import NeuronScores, ScoringCost, load_scores, mean_scores
from unmemorize.neurons import Site

SITES = (Site("a.down", "in", 4), Site("b.down", "in", 6))


def scores(first: list[float], second: list[float], **changes: object) -> NeuronScores:
    fields = {
        "model_id": "language/x-1",
        "sites": SITES,
        "values": (torch.tensor(first), torch.tensor(second)),
        "method": "test",
        "cost": ScoringCost(forward_equivalents=3, seconds=0.5),
        "examples": ("aa",),
        "details": {"settings": {"seed": 1}},
    }
    return NeuronScores(**{**fields, **changes})  # type: ignore[arg-type]


RANKED = scores([0.1, 0.4, 0.4, 0.2], [9.0, 7.0, 8.0, 0.3, 0.0, -1.0])


def chosen(neurons: object) -> dict[str, tuple[int, ...]]:
    return {site.path: indices for site, indices in neurons.indices.items()}  # type: ignore[attr-defined]


def test_the_best_of_each_layer() -> None:
    assert chosen(RANKED.top(0.5)) == {"a.down": (1, 2), "b.down": (0, 1, 2)}
    assert chosen(RANKED.top(count=1)) == {"a.down": (1,), "b.down": (0,)}
    assert chosen(RANKED.top(0.001)) == {"a.down": (1,), "b.down": (0,)}
    assert chosen(RANKED.top(1.0, exclude_layers=[0])) == {"b.down": (0, 1, 2, 3, 4, 5)}
    assert RANKED.top(0.5).model_id == "language/x-1"


def test_the_best_of_all_layers() -> None:
    assert chosen(RANKED.top(count=4, per_layer=False)) == {"a.down": (1,), "b.down": (0, 1, 2)}
    assert chosen(RANKED.top(0.3, per_layer=False)) == {"b.down": (0, 1, 2)}
    assert chosen(RANKED.top(count=2, per_layer=False, exclude_layers=[1])) == {"a.down": (1, 2)}


def test_what_was_not_examined_is_never_chosen() -> None:
    part = scores([-math.inf, 0.0, -math.inf, 1.0], [-math.inf] * 6)
    assert chosen(part.top(1.0)) == {"a.down": (1, 3)}
    assert part.ranked() == [(0, 3), (0, 1)]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-5, 5, width=32), min_size=10, max_size=10), st.floats(0.01, 1.0))
def test_no_neuron_outside_scores_more(values: list[float], share: float) -> None:
    found = scores(values[:4], values[4:])
    for per_layer in (True, False):
        best = found.top(share, per_layer=per_layer)
        groups = [[site] for site in SITES] if per_layer else [list(SITES)]
        for group in groups:
            inside, outside = [], []
            for layer, site in enumerate(SITES):
                for index in range(site.width):
                    if site in group:
                        (inside if (site, index) in best else outside).append(found.values[layer][index])
            assert len(inside) == max(1, math.floor(share * sum(site.width for site in group) + 0.5))
            assert not outside or min(inside) >= max(outside)


def test_scores_survive_their_file(tmp_path: Path) -> None:
    part = scores([-math.inf, 0.5, 1.0, 2.0], [1.0] * 6)
    back = load_scores(part.save(tmp_path / "a" / "scores.safetensors"))
    assert all(torch.equal(one, other) for one, other in zip(part.values, back.values, strict=True))
    assert (back.model_id, back.sites, back.method, back.cost) == (
        "language/x-1",
        SITES,
        "test",
        ScoringCost(forward_equivalents=3, seconds=0.5),
    )
    assert (back.examples, dict(back.details)) == (("aa",), {"settings": {"seed": 1}})


def test_bad_files_and_values_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    with pytest.raises(FileFormatError, match="cannot read neuron scores"):
        load_scores(path)
    whole = RANKED.save(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        FileFormatError, match="cannot read neuron scores from .* pass the right file, or make it again"
    ):
        load_scores(path)
    from safetensors.torch import save_file

    save_file({"scores_0": torch.zeros(2)}, path)
    with pytest.raises(FileFormatError, match=r"is not a unmemorize.neuron_scores file of version 1"):
        load_scores(path)
    with pytest.raises(ShapeMismatch, match=r"scores of shapes \[\(4,\), \(5,\)\] for sites of \[4, 6\]"):
        scores([0.0] * 4, [0.0] * 5)
    with pytest.raises(ConfigError, match="scores by test are not numbers"):
        scores([math.nan] * 4, [0.0] * 6)
    for bad in ({}, {"share": 0.5, "count": 1}):
        with pytest.raises(ConfigError, match="give either a share or a count"):
            RANKED.top(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"share is 1.5, expected a fraction"):
        RANKED.top(1.5)
    with pytest.raises(ConfigError, match="count is 5, expected 1 to 4"):
        RANKED.top(count=5)
    with pytest.raises(ConfigError, match="no layer 2 to exclude; expected 0 to 1"):
        RANKED.top(0.5, exclude_layers=[2])


def test_means_add_costs_and_keep_to_one_method() -> None:
    other = scores([1.1, 0.4, 0.4, 0.2], [9.0] * 6, examples=("bb",))
    mean = mean_scores([RANKED, other])
    assert mean.values[0].tolist() == pytest.approx([0.6, 0.4, 0.4, 0.2])
    assert (mean.examples, mean.cost.forward_equivalents) == (("aa", "bb"), 6)
    for bad in ([], [RANKED, scores([0.0] * 4, [0.0] * 6, method="other")]):
        with pytest.raises(ConfigError, match="cannot be averaged"):
            mean_scores(bad)


# Formulas


def test_alternating_activations_vanish_when_read_with_their_sign() -> None:
    values = torch.tensor([[[1.0, 2.0], [-1.0, 2.0], [50.0, 50.0]]])
    positions = torch.tensor([[True, True, False]])
    norms = torch.tensor([3.0, 1.0])
    assert activation_scores(values, positions, norms).tolist() == [[3.0, 2.0]]
    assert activation_scores(values, positions, norms, "signed").tolist() == [[0.0, 2.0]]


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 0.99))
def test_gates_start_as_open_as_asked(open_frac: float) -> None:
    logit = initial_logit(open_frac)
    assert 1.2 / (1 + math.exp(-logit)) - 0.1 == pytest.approx(open_frac, abs=1e-9)


def test_the_price_is_the_probability_of_being_open() -> None:
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    for logit in (-2.0, 0.0, 1.5):
        for sharpness in (1 / 3, 2 / 3):
            gates = concrete_gates(torch.full_like(uniform, logit), uniform, sharpness)
            assert gates.min() == 0
            assert gates.max() == 1
            share = float((gates > 0).float().mean())
            assert share == pytest.approx(float(concrete_open(torch.tensor(logit), sharpness)), abs=0.005)


def test_points_include_both_ends() -> None:
    points = interpolation_points(20)
    assert (len(points), float(points[0]), float(points[-1])) == (20, 0.0, 1.0)
    with pytest.raises(ConfigError, match="gates start open by 1.2"):
        initial_logit(1.2)
