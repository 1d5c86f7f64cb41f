"""Detection and localization quality against literal definitions, with refusals and chance levels."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.reference import pictures as reference
from unmemorize.audit.detection import area_under_curve, detection, recall_precision, true_positive_rate
from unmemorize.audit.localized import localized_prompts, site_neurons
from unmemorize.audit.statistics import percentile_measure
from unmemorize.errors import DataError
from unmemorize.localize.results import Cost, PromptResult
from unmemorize.neurons import NeuronSet, Site

NARROW, WIDE = Site("a.to_v", "out", 10), Site("b.to_v", "out", 90)


def chosen(narrow: tuple[int, ...] = (), wide: tuple[int, ...] = (), model: str = "m") -> NeuronSet:
    return NeuronSet(model, {NARROW: narrow, WIDE: wide})


@pytest.mark.parametrize("seed", range(6))
def test_figures_equal_their_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    memorized = np.round(generator.normal(1, 1, 30 + seed), 1)  # rounded, so that there are ties
    ordinary = np.round(generator.normal(0, 1, 100 + 17 * seed), 1)
    assert area_under_curve(memorized, ordinary) == pytest.approx(
        reference.area_under_curve(list(memorized), list(ordinary)), abs=1e-12
    )
    for rate in (0.01, 0.05):
        assert true_positive_rate(memorized, ordinary, rate) == pytest.approx(
            reference.true_positive_rate(list(memorized), list(ordinary), rate), abs=1e-12
        )


def test_a_perfect_and_a_useless_score() -> None:
    perfect = detection(np.arange(20) + 500, np.arange(100), num_resamples=200)
    assert (perfect.auc.value, perfect.auc.ci95) == (1, (1, 1))
    assert (perfect.tpr_at_fpr.value, perfect.tpr_at_fpr.num) == (1, 20)
    useless = detection(np.arange(200), np.arange(200), num_resamples=500)
    assert useless.auc.value == 0.5
    assert useless.auc.ci95 is not None and useless.auc.ci95[0] < 0.5 < useless.auc.ci95[1]
    assert useless.tpr_at_fpr.value == pytest.approx(0.01)
    assert detection([5.0] * 12, [5.0] * 100, num_resamples=100).tpr_at_fpr.value == 0


def test_intervals_are_percentiles_of_the_figures_of_resampled_prompts() -> None:
    generator = np.random.default_rng(0)
    memorized, ordinary = generator.normal(1.5, 1, 30), generator.normal(0, 1, 110)
    found = detection(memorized, ordinary, seed=5, num_resamples=100)
    draws = np.random.default_rng(5)
    picks = draws.integers(0, 30, size=(100, 30)), draws.integers(0, 110, size=(100, 110))
    pairs = [(list(memorized[a]), list(ordinary[b])) for a, b in zip(*picks, strict=True)]
    for measure, values in (
        (found.auc, [reference.area_under_curve(high, low) for high, low in pairs]),
        (found.tpr_at_fpr, [reference.true_positive_rate(high, low, 0.01) for high, low in pairs]),
    ):
        expected = percentile_measure(0.0, values, 30)
        assert measure.ci95 == pytest.approx(expected.ci95, abs=1e-12)
        assert measure.ci95 is not None and measure.ci95[0] < measure.ci95[1]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Scores of known distributions: AUC is P(normal with shift 1 > normal) = 0.760."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        found = detection(generator.normal(1, 1, 40), generator.normal(0, 1, 40), num_resamples=400).auc
        assert found.ci95 is not None
        hits += found.ci95[0] <= 0.760 <= found.ci95[1]
    assert 88 <= hits <= 100


@pytest.mark.parametrize(
    ("num_memorized", "num_ordinary", "auc", "rate"),
    [
        (4, 200, "4 memorized and 200 ordinary prompts; an interval needs 5 of each", "needs 5 of each"),
        (11, 200, None, "a rate at 1 % false positives needs 12 and 100"),
        (50, 99, None, "a rate at 1 % false positives needs 12 and 100"),
    ],
)
def test_small_samples_are_refused(num_memorized: int, num_ordinary: int, auc: str | None, rate: str) -> None:
    quality = detection(np.arange(num_memorized), np.arange(num_ordinary), num_resamples=100)
    assert (quality.auc.refused is None) == (auc is None)
    assert auc is None or auc in str(quality.auc.refused)
    assert rate in str(quality.tpr_at_fpr.refused)


def test_scores_that_are_no_numbers_are_refused() -> None:
    quality = detection([1.0] * 20 + [float("nan")], np.arange(100))
    assert quality.auc.refused == quality.tpr_at_fpr.refused == "a score is not a finite number"


def test_recall_and_precision_stand_beside_chance() -> None:
    truth, found = chosen((1, 2), (5, 6)), chosen((2, 3, 4), (5,))
    quality = recall_precision(found, truth)
    assert (quality.recall_frac, quality.precision_frac) == (0.5, 0.5)
    assert (quality.num_found, quality.num_true, quality.num_common) == (4, 4, 2)
    expected = 3 * 2 / 10 + 1 * 2 / 90
    assert quality.random_recall_frac == pytest.approx(expected / 4)
    assert quality.random_precision_frac == pytest.approx(expected / 4)
    anywhere = recall_precision(found, truth, sites=[NARROW, WIDE])
    assert anywhere.random_recall_frac == pytest.approx(4 / 100)


@pytest.mark.parametrize("is_anywhere", [False, True])
def test_the_chance_level_is_that_of_drawn_sets(is_anywhere: bool) -> None:
    truth, found = chosen((1, 2, 7), (5, 6)), chosen((2, 3, 4), (5, 40, 41))
    sites = [NARROW, WIDE] if is_anywhere else None
    expected = recall_precision(found, truth, sites=sites).random_recall_frac
    generator, recalls = random.Random(0), []
    for seed in range(4000):
        if is_anywhere:
            drawn = generator.sample(range(100), 6)
            other = chosen(tuple(i for i in drawn if i < 10), tuple(i - 10 for i in drawn if i >= 10))
        else:
            other = found.placebo(seed=seed, outside=chosen())
        recalls.append(recall_precision(other, truth).recall_frac)
    assert sum(recalls) / len(recalls) == pytest.approx(expected, abs=0.01)


def test_nothing_found_has_no_precision() -> None:
    quality = recall_precision(chosen(), chosen((1,)))
    assert (quality.recall_frac, quality.random_recall_frac) == (0, 0)
    assert quality.precision_frac is None and quality.random_precision_frac is None


@pytest.mark.parametrize(
    ("found", "truth", "sites", "message"),
    [
        (chosen((1,)), chosen(), None, "the true set is empty"),
        (chosen((1,)), chosen((1,), model="n"), None, "compare sets of one model"),
        (chosen((1,), (2,)), chosen((1,)), [NARROW], "b.to_v, which is not among sites"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(
    found: NeuronSet, truth: NeuronSet, sites: list[Site] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        recall_precision(found, truth, sites=sites)


def test_localization_becomes_rows_for_reports() -> None:
    first = PromptResult(
        prompt="p",
        is_memorized=True,
        best_pair=0.9,
        initial=((1, 2, 2), (3,)),
        refined=((2,), ()),
        refined_score=0.2,
        cost=Cost(sample_forwards=8, seconds=1.5),
    )
    second = PromptResult(prompt="q", is_memorized=True, best_pair=0.8, refined=((2, 4), (7,)))
    third = PromptResult(prompt="r", is_memorized=False, best_pair=0.1)
    rows = localized_prompts([first, third], {"p": "target", "r": "ordinary"})
    assert (rows[0].num_initial, rows[0].num_refined, rows[0].sample_forwards) == (4, 1, 8)
    assert (rows[1].group, rows[1].is_memorized, rows[1].num_refined) == ("ordinary", False, 0)
    with pytest.raises(DataError, match="localized prompt 'q' is not in the audit"):
        localized_prompts([second], {"p": "target"})
    sites = site_neurons(
        [WIDE, NARROW], chosen((2, 9), (1,)), [PromptResult(**{**_fields(first), "refined": ((1,), (2,))})]
    )
    assert [(s.path, s.indices, s.num_prompts) for s in sites] == [
        ("b.to_v", [1], [1]),
        ("a.to_v", [2, 9], [1, 0]),
    ]
    assert site_neurons([NARROW], chosen((2,)))[0].num_prompts == []
    with pytest.raises(DataError, match="name all sites"):
        site_neurons([NARROW], chosen((2,), (1,)))


def _fields(result: PromptResult) -> dict[str, object]:
    return {"prompt": result.prompt, "is_memorized": True, "best_pair": result.best_pair}
