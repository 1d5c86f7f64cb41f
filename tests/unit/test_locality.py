"""Overlaps of neuron sets within and across groups, against counts by hand and the expected overlap of random sets."""

from __future__ import annotations

import pytest

from unmemorize.localize.locality import locality, overlap
from unmemorize.neurons import NeuronSet, Site

SITE = Site(path="block.mlp", side="in", start=0, width=100)
MODEL = "model-0123456789abcdef"


def chosen(*indices: int) -> NeuronSet:
    return NeuronSet(MODEL, {SITE: indices} if indices else {})


def test_overlap_is_shared_over_either() -> None:
    assert overlap(chosen(1, 2, 3), chosen(2, 3, 4, 5)) == pytest.approx(2 / 5)
    assert overlap(chosen(), chosen()) == 0.0


def test_groups_that_share_neurons_stand_out_from_strangers() -> None:
    sets = [
        chosen(*range(10)),
        chosen(*range(1, 11)),
        chosen(*range(50, 60)),
        chosen(*range(50, 60)),
        chosen(),
    ]
    found = locality(sets, [[0, 1], [2, 3, 4]])
    assert found.within == pytest.approx((9 / 11, 1.0))
    assert found.across == (0.0, 0.0)
    assert found.num_empty == 1


def test_random_sets_overlap_as_chance_has_it() -> None:
    """Two sets of half the neurons share a third of what either holds: 25 of 75."""
    sets = [chosen(*range(50)), chosen(*range(50, 100)), chosen(*range(25, 75))]
    found = locality(sets, [[0, 1], [2]], seed=3)
    assert found.within == (0.0,)
    assert found.within_random[0] == pytest.approx(1 / 3, abs=0.12)
    assert found.across_random[1] == pytest.approx(1 / 3, abs=0.12)
    assert locality(sets, [[0, 1], [2]], seed=3) == found


def test_groups_without_pairs_have_no_value() -> None:
    found = locality([chosen(1), chosen(2)], [[0], [1]])
    assert found.within == () and len(found.across) == 2
