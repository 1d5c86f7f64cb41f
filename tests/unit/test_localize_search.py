"""Searches on effects that are known exactly: no model is involved."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmemorize.errors import ConfigError
from unmemorize.localize.orders import importance_order, slope_order
from unmemorize.localize.search import (
    Entries,
    Neuron,
    SearchSettings,
    candidate_sets,
    refine,
    select,
    smallest,
)

DEFAULT = SearchSettings()
Z = [torch.tensor([6.0, -5.5, 0.0, 1.1]), torch.tensor([0.0, 2.0])]
ACTIVATIONS = [torch.tensor([1.0, 4.0, 3.0, 2.0]), torch.tensor([9.0, 1.0])]


def test_released_schedule_stops_before_theta_one() -> None:
    sets = list(candidate_sets(ACTIVATIONS, Z, DEFAULT, is_compat=True))
    assert (sets[0].theta, sets[0].k, sets[0].entries) == (5.0, 0, ((0, 1), ()))
    assert (sets[-1].theta, sets[-1].k, len(sets)) == (1.25, 15, 16)
    assert sets[1].entries == ((0, 1, 1), (0,))  # a neuron that meets both conditions is listed twice


def test_paper_schedule_reaches_theta_one_and_lists_once() -> None:
    big = [torch.zeros(40), torch.zeros(40)]
    big[0][3] = 1.1
    sets = list(candidate_sets([torch.rand(40)] * 2, big, DEFAULT, is_compat=False))
    assert (sets[-1].theta, sets[-1].k, len(sets)) == (1.0, 16, 17)
    assert all(len(set(layer)) == len(layer) for candidates in sets for layer in candidates.entries)
    assert 3 in sets[-1].entries[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"theta_step": 0.75, "initial_theta": 2.5}, [2.5, 1.75]),
        ({"has_top_k": False, "theta_step": 0.5, "initial_theta": 2.0, "min_theta": 1.5}, [2.0, 1.5]),
    ],
)
def test_odd_schedules_end(changes: dict[str, float], expected: list[float]) -> None:
    sets = list(candidate_sets(ACTIVATIONS, Z, SearchSettings(**changes), is_compat=True))  # type: ignore[arg-type]
    assert [candidates.theta for candidates in sets] == expected


def test_top_k_alone_is_bounded() -> None:
    only_k = SearchSettings(initial_theta=math.inf)
    assert len(list(candidate_sets(ACTIVATIONS, Z, only_k, is_compat=True))) == 1280
    assert len(list(candidate_sets(ACTIVATIONS, Z, only_k, is_compat=False))) == 5


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected a fall by more than 0"):
        SearchSettings(theta_step=0.0)
    with pytest.raises(ConfigError, match="neither theta nor top-k"):
        SearchSettings(initial_theta=math.inf, has_top_k=False)


def test_selection_takes_the_first_set_that_breaks_or_replaces_the_threshold() -> None:
    def effect(entries: Entries) -> tuple[float, ...]:
        return (1 - 0.1 * sum(map(len, entries)), 0.2)

    sets = list(candidate_sets(ACTIVATIONS, Z, DEFAULT, is_compat=True))
    found = select(iter(sets), effect, DEFAULT)
    assert [trial.value for trial in found.trials][-1] <= 0.428 < found.trials[-2].value
    assert (found.threshold, found.is_replaced) == (0.428, False)
    never = select(iter(sets), lambda entries: (0.9,), DEFAULT)
    assert (len(never.trials), never.threshold, never.is_replaced) == (16, 0.9, True)


def test_refinement_takes_one_copy_at_a_time_and_can_leave_an_unsorted_list() -> None:
    needed = {(0, 5), (0, 2)}

    def effect(entries: Entries) -> tuple[float, ...]:
        off = {(layer, index) for layer, chosen in enumerate(entries) for index in chosen}
        return (0.1 if needed <= off else 0.9,)

    outcome = refine(((2, 5, 7, 2), (1, 1), ()), effect, 0.428)
    assert outcome.entries == ((5, 2), (), ())
    assert [trial.label for trial in outcome.layer_trials] == [(1,), (0,)]
    assert [trial.label for trial in outcome.neuron_trials] == [(0, 2), (0, 5), (0, 7), (0, 2)]


def test_relative_refinement_compares_changes() -> None:
    def effect(entries: Entries) -> tuple[float, ...]:
        return (0.5 if 1 in entries[0] else 0.6,)

    assert refine(((0, 1),), effect, 0.0, relative_threshold=0.1).entries == ((1,),)
    assert refine(((0, 1),), effect, 0.0, relative_threshold=0.3).entries == ((),)


class Counted:
    """An effect with memory of its own: neurons that must all be off, per sample."""

    def __init__(self, needed: Sequence[set[Neuron]]) -> None:
        self.needed, self.seen = needed, set[tuple[frozenset[Neuron], int]]()

    def __call__(self, neurons: Sequence[Neuron], samples: Sequence[int]) -> tuple[float, ...]:
        self.seen |= {(frozenset(neurons), sample) for sample in samples}
        return tuple(0.1 if self.needed[sample] <= set(neurons) else 0.9 for sample in samples)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.data())
def test_the_needed_neurons_are_found_exactly(count: int, data: st.DataObject) -> None:
    order = [(index % 3, index) for index in range(count)]
    chosen = data.draw(st.sets(st.sampled_from(order), min_size=1, max_size=4))
    effect = Counted([chosen] * 3)
    found = smallest(order, effect, 0.428, [0, 1, 2])
    assert set(found.neurons) == chosen
    assert set(found.prefix) >= chosen
    assert not found.is_replaced
    on_first = {neurons for neurons, sample in effect.seen if sample == 0}
    assert len(on_first) <= (len(chosen) + 1) * 2 * (math.log2(count) + 2) + len(chosen)


def test_a_sample_that_needs_more_joins_the_search() -> None:
    order = [(0, index) for index in range(32)]
    effect = Counted([{(0, 3)}, {(0, 3), (0, 20)}, {(0, 3)}])
    found = smallest(order, effect, 0.428, [0, 1, 2])
    assert set(found.neurons) == {(0, 3), (0, 20)}
    assert found.scores == (0.1, 0.1, 0.1)


def test_what_cannot_be_broken_is_said() -> None:
    found = smallest([(0, 0), (0, 1)], lambda neurons, samples: (0.8,) * len(samples), 0.428, [0, 1])
    assert found.is_replaced
    assert found.threshold == 0.8
    assert len(found.neurons) == 1
    effect = Counted([{(0, 9)}])
    given_up = smallest([(0, 0), (0, 1)], effect, 0.428, [0], gives_up=True)
    assert given_up.is_replaced and given_up.neurons == ((0, 0), (0, 1))
    assert len(effect.seen) == 2  # one neuron and both; no search for the fewest that do as little
    nothing = smallest([], lambda neurons, samples: (1.0,) * len(samples), 0.428, [0])
    assert (nothing.neurons, nothing.is_replaced) == ((), True)


def test_the_order_is_unusual_first_then_as_the_sets_grow() -> None:
    z = [torch.tensor([6.0, -5.5, 0.0, 1.1] + [0.0] * 30), torch.tensor([0.0, 2.0] + [0.0] * 30)]
    activations = [torch.arange(34.0), torch.arange(32.0)]
    order = importance_order(candidate_sets(activations, z, DEFAULT, is_compat=False), z)
    assert order[:6] == [(0, 0), (0, 1), (1, 1), (0, 3), (0, 33), (1, 31)]
    assert len(order) == len(set(order)) == 4 + 2 * 16


def test_slopes_come_first_and_z_scores_decide_ties() -> None:
    slopes = [torch.tensor([0.0, 0.5, -0.2]), torch.tensor([0.0, 0.0])]
    z = [torch.tensor([1.0, 0.0, 9.0]), torch.tensor([-3.0, 1.0])]
    assert slope_order(slopes, z) == [(0, 1), (1, 0), (0, 0), (1, 1), (0, 2)]
