"""Activation statistics, z-scores and the similarity of maps, against hand-made and plain computations."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmemorize.errors import ConfigError, FileFormatError, ShapeMismatch
from unmemorize.localize.neuron_statistics import NeuronStatistics, import_statistics, load_statistics
from unmemorize.localize.scores import (
    best_match,
    map_similarity,
    mean_absolute,
    pair_similarities,
    scaled_maps,
    z_scores,
)
from unmemorize.neurons import Site

SITES = (Site("a.to_v", "out", 3), Site("b.to_v", "out", 2))


def statistics(rows: torch.Tensor, *, batch: int) -> NeuronStatistics:
    total = NeuronStatistics.empty("diffusion/x-1", SITES)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        total = total.updated([part[:, :3], part[:, 3:]], [f"caption {start + i}" for i in range(len(part))])
    return total


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.integers(1, 17), st.integers(1, 39), st.integers(0, 2**31))
def test_streaming_and_merging_equal_the_plain_formula(count: int, batch: int, cut: int, seed: int) -> None:
    rows = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 100
    whole = statistics(rows, batch=batch)
    cut = min(cut, count - 1)
    merged = statistics(rows[:cut], batch=batch).merged(statistics(rows[cut:], batch=1))
    for found in (whole, merged):
        assert found.count == count
        assert torch.allclose(torch.cat(found.means), rows.double().mean(0), atol=1e-9)
        assert torch.allclose(torch.cat(found.stds), rows.double().std(0).float(), atol=1e-5)


def test_digest_names_the_captions_not_the_batches() -> None:
    rows = torch.randn(6, 5)
    assert statistics(rows, batch=2).digest == statistics(rows, batch=6).digest
    assert statistics(rows, batch=2).digest != statistics(rows[:5], batch=2).digest


def test_statistics_survive_their_file(tmp_path: Path) -> None:
    found = statistics(torch.randn(6, 5), batch=2)
    back = load_statistics(found.save(tmp_path / "statistics.safetensors"))
    assert (back.model_id, back.sites, back.count, back.digest) == ("diffusion/x-1", SITES, 6, found.digest)
    assert all(
        torch.equal(a, b) for a, b in zip(back.means + back.squares, found.means + found.squares, strict=True)
    )
    (tmp_path / "torn").write_bytes((tmp_path / "statistics.safetensors").read_bytes()[:-3])
    with pytest.raises(
        FileFormatError,
        match="cannot read neuron statistics from .* pass the right file, or make it again",
    ):
        load_statistics(tmp_path / "torn")
    with pytest.raises(FileFormatError, match="cannot read neuron statistics"):
        load_statistics(tmp_path / "missing")


def test_statistics_of_other_sites_do_not_merge() -> None:
    other = NeuronStatistics.empty("diffusion/x-1", SITES[:1])
    with pytest.raises(ConfigError, match="cannot be merged"):
        statistics(torch.randn(3, 5), batch=3).merged(other)
    derivatives = NeuronStatistics.empty("diffusion/x-1", SITES, quantity="derivative")
    with pytest.raises(ConfigError, match="quantities cannot be merged"):
        statistics(torch.randn(3, 5), batch=3).merged(derivatives)


def test_mean_squares_are_those_of_the_rows() -> None:
    rows = torch.randn(7, 5) + 3
    found = torch.cat(statistics(rows, batch=2).mean_squares)
    torch.testing.assert_close(found, rows.square().mean(0))


def test_published_statistics_are_imported(tmp_path: Path) -> None:
    arrays = {"mean_0": [1.0, 2.0, 3.0], "std_0": [0.1, 0.2, 0.3], "mean_1": [4.0, 5.0], "std_1": [0.4, 0.5]}
    numpy.savez(tmp_path / "s.npz", **{name: numpy.float32(value) for name, value in arrays.items()})
    found = import_statistics(tmp_path / "s.npz", SITES, count=50)
    assert found.stds[1].tolist() == pytest.approx([0.4, 0.5])
    assert found.count == 50
    with pytest.raises(ShapeMismatch, match="holds 2 sites, the model has 1"):
        import_statistics(tmp_path / "s.npz", SITES[:1])
    with pytest.raises(ShapeMismatch, match=r"\(2,\) neurons at c, expected \(7,\)"):
        import_statistics(tmp_path / "s.npz", (SITES[0], Site("c", "out", 7)))
    with pytest.raises(FileFormatError, match="cannot read activation statistics"):
        import_statistics(tmp_path / "none.npz", SITES)


def test_mean_absolute_counts_the_chosen_positions() -> None:
    values = torch.tensor([[[1.0, -2.0], [3.0, 4.0], [-5.0, 0.0]]])
    assert mean_absolute(values).tolist() == [[3.0, 2.0]]
    assert mean_absolute(values, torch.tensor([[True, True, False]])).tolist() == [[2.0, 3.0]]
    assert mean_absolute(values, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0.0, 0.0]]


def test_z_scores() -> None:
    z = z_scores(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 2.0]))
    assert z.tolist() == [4.0, 0.0]


def test_maps_are_scaled_one_by_one() -> None:
    maps = torch.stack([torch.arange(4.0).view(2, 2), torch.full((2, 2), 7.0)]).unsqueeze(0)
    scaled = scaled_maps(maps)
    assert scaled[0, 0].flatten().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert scaled[0, 1].abs().max() == 0


def test_similarity_is_one_for_equal_and_low_for_unrelated_maps() -> None:
    maps = torch.rand(3, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert map_similarity(maps, maps).tolist() == pytest.approx([1.0] * 3)
    assert float(map_similarity(maps[:1], maps[1:2])) < 0.1
    mixed = 0.7 * maps[:1] + 0.3 * maps[1:2]
    more = 0.9 * maps[:1] + 0.1 * maps[1:2]
    assert float(map_similarity(maps[:1], mixed)) < float(map_similarity(maps[:1], more)) < 1


def test_pair_ranges_do_not_depend_on_the_call() -> None:
    maps = torch.rand(4, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    other = (maps * torch.tensor([1.0, 0.5, 0.9, 1.0]).view(-1, 1, 1, 1)).roll(2, -1) * 0.3 + maps * 0.7
    alone = torch.cat([map_similarity(maps[i : i + 1], other[i : i + 1]) for i in range(4)])
    assert torch.equal(map_similarity(maps, other), alone)
    assert not torch.allclose(map_similarity(maps, other, ranges="call"), alone, atol=1e-6)


@pytest.mark.parametrize("side", [16, 32, 48])
def test_small_maps_use_fewer_scales(side: int) -> None:
    maps = torch.rand(2, 4, side, side)
    assert float(map_similarity(maps[:1], maps[:1])) == pytest.approx(1.0)


def test_impossible_maps_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="smaller than the window of 11"):
        map_similarity(torch.rand(1, 4, 8, 8), torch.rand(1, 4, 8, 8))
    with pytest.raises(ShapeMismatch, match="cannot be compared"):
        map_similarity(torch.rand(1, 4, 16, 16), torch.rand(2, 4, 16, 16))


def test_best_match_is_taken_over_a_samples_own_pairs() -> None:
    maps = torch.rand(3, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    maps[2] = maps[0]
    values, pairs = pair_similarities(maps)
    assert pairs == [(0, 1), (0, 2), (1, 2)]
    best = best_match(values, pairs, 3)
    assert best[0] == best[2] == pytest.approx(1.0)
    assert best[1] < 0.5
