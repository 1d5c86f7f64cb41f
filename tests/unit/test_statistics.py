"""Intervals, fractions and refusals: by hand, by simulation, and at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmemorize.audit.fractions import (
    benefit_kept,
    benefit_kept_in_one_run,
    gap_closed,
    gap_closed_frac,
    gap_closed_in_one_run,
    repetition_benefit_kept_frac,
)
from unmemorize.audit.statistics import (
    MIN_RATE_EXAMPLES,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    exact,
    loss_draws,
    mean_over_seeds,
    t_quantile,
    wilson,
    wilson_interval,
)
from unmemorize.errors import ShapeMismatch
from unmemorize.records import Measure


def interval(measure: Measure) -> tuple[float, float]:
    assert measure.ci95 is not None, measure.refused
    return measure.ci95


# Bootstrap within one model


def test_mean_by_hand() -> None:
    measure = bootstrap_mean([1.0, 2.0, 3.0, 4.0, 10.0])
    low, high = interval(measure)
    assert measure.value == 4.0
    assert measure.num == 5
    assert measure.method == "bootstrap"
    assert 1.0 <= low < 4.0 < high <= 10.0


def test_bootstrap_matches_the_exact_distribution() -> None:
    """A resample of ten 0 and ten 1 holds Binomial(20, 0.5) ones: the tails of 0.0159 end at 5 and 15."""
    low, high = interval(bootstrap_mean([0.0, 1.0] * 10, num_resamples=50_000))
    assert (low, high) == (0.25, 0.75)


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_blocks_do_not_change_the_number_of_resamples() -> None:
    """A sample of 3000 is resampled in several blocks."""
    values = np.random.default_rng(0).normal(size=3000)
    low, high = interval(bootstrap_mean(values, num_resamples=2000))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(3000), rel=0.1)


def test_constant_sample_has_a_point_interval() -> None:
    assert interval(bootstrap_mean([2.0] * 8)) == (2.0, 2.0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=5, max_size=30), st.floats(-50, 50))
def test_shifting_values_shifts_everything(values: list[float], shift: float) -> None:
    plain, moved = (
        bootstrap_mean(values, num_resamples=200),
        bootstrap_mean(np.array(values) + shift, num_resamples=200),
    )
    assert moved.value == pytest.approx(plain.value + shift, abs=1e-6)
    assert interval(moved) == pytest.approx(tuple(end + shift for end in interval(plain)), abs=1e-6)


def test_more_examples_narrow_the_interval() -> None:
    generator = np.random.default_rng(3)
    widths = []
    for num in (10, 100, 1000):
        low, high = interval(bootstrap_mean(generator.normal(size=num), num_resamples=1000))
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize(
    ("num", "reason"), [(0, "no examples; an interval needs 5"), (1, "1 example;"), (4, "4 ex")]
)
def test_few_examples_are_refused(num: int, reason: str) -> None:
    measure = bootstrap_mean([1.0] * num)
    assert measure.value is None
    assert measure.num == num
    assert str(measure.refused).startswith(reason)


def test_values_that_are_not_numbers_are_refused() -> None:
    measure = bootstrap_mean([1.0, 2.0, math.nan, 4.0, math.inf, 6.0])
    assert measure.refused == "2 of 6 values are not finite numbers"


def test_two_dimensions_are_an_error() -> None:
    with pytest.raises(ShapeMismatch, match=r"values has shape \(2, 3\), expected one dimension"):
        bootstrap_mean(np.zeros((2, 3)))


def test_difference_is_paired() -> None:
    """A constant difference has no spread, however much the examples themselves differ."""
    reference = np.array([1.0, 5.0, 9.0, 2.0, 7.0, 4.0])
    measure = bootstrap_difference(reference + 0.25, reference)
    assert measure.value == pytest.approx(0.25)
    assert interval(measure) == pytest.approx((0.25, 0.25))


def test_difference_needs_pairs() -> None:
    with pytest.raises(ShapeMismatch, match="got 5 and 6 values, expected one pair an example"):
        bootstrap_difference(np.zeros(5), np.zeros(6))


def test_ratio_is_weighted_by_tokens() -> None:
    """Four documents of 1 token at 4 nats, one of 96 at 1: 112 / 100, not the mean of means 3.4."""
    measure = bootstrap_ratio([4, 4, 4, 4, 96], [1, 1, 1, 1, 96])
    low, high = interval(measure)
    assert measure.value == pytest.approx(1.12)
    assert 1.0 <= low < 1.12 < high <= 4.0


def test_ratio_of_equal_weights_is_the_mean() -> None:
    values = np.random.default_rng(5).gamma(2.0, size=30)
    mean, ratio = bootstrap_mean(values), bootstrap_ratio(values * 7, np.full(30, 7))
    assert ratio.value == pytest.approx(mean.value)
    assert interval(ratio) == pytest.approx(interval(mean))


def test_ratio_without_tokens_is_refused() -> None:
    assert bootstrap_ratio([1, 1, 1, 1, 0], [1, 1, 1, 1, 0]).refused == (
        "an example has no tokens to average over; leave it out"
    )
    assert str(bootstrap_ratio([], []).refused).startswith("no examples")


def _coverage(make_interval, truth: float, trials: int, seed: int) -> float:  # noqa: ANN001
    generator = np.random.default_rng(seed)
    hits = 0
    for trial in range(trials):
        low, high = interval(make_interval(generator, trial))
        hits += low <= truth <= high
    return hits / trials


@pytest.mark.parametrize(("num", "least"), [(5, 0.88), (10, 0.92), (60, 0.92)])
def test_mean_covers_95_percent(num: int, least: float) -> None:
    """Skewed data, down to the smallest sample that is shown; there plain percentiles cover 0.82."""
    rate = _coverage(
        lambda g, trial: bootstrap_mean(g.gamma(4.0, size=num), seed=trial, num_resamples=500), 4.0, 800, 11
    )
    assert least <= rate <= 0.97


def test_ratio_covers_95_percent() -> None:
    """Uneven documents whose own loss varies: a resample of tokens would cover far less."""

    def one(generator: np.random.Generator, trial: int) -> Measure:
        tokens = generator.integers(5, 200, size=80)
        loss = generator.normal(3.0, 0.8, size=80)
        return bootstrap_ratio(loss * tokens, tokens, seed=trial, num_resamples=500)

    assert 0.92 <= _coverage(one, 3.0, 800, 12) <= 0.97


def test_t_covers_95_percent() -> None:
    rate = _coverage(lambda g, _: mean_over_seeds(g.normal(2.0, 0.1, size=3)), 2.0, 4000, 13)
    assert 0.94 <= rate <= 0.96


def test_wilson_covers_95_percent() -> None:
    rates = [
        _coverage(lambda g, _, p=p: wilson(int(g.binomial(40, p)), 40), p, 2000, 14)
        for p in (0.05, 0.3, 0.5, 0.9)
    ]
    assert 0.94 <= np.mean(rates) <= 0.97


# Rates


@pytest.mark.parametrize(
    ("successes", "num", "low", "high"),
    [(5, 20, 0.1119, 0.4687), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (15, 30, 0.3315, 0.6685)],
)
def test_wilson_by_hand(successes: int, num: int, low: float, high: float) -> None:
    measure = wilson(successes, num)
    assert measure.value == pytest.approx(successes / num)
    assert interval(measure) == pytest.approx((low, high), abs=5e-5)
    assert measure.method == "wilson"


def test_wilson_rises_with_successes() -> None:
    ends = np.array([interval(wilson(successes, 25)) for successes in range(26)])
    assert (np.diff(ends, axis=0) > 0).all()


def test_the_smallest_sample_bounds_the_interval() -> None:
    """At the smallest sample shown every interval is within +-0.25; one example fewer, and one is not."""

    def worst(num: int) -> float:
        return max(high - low for low, high in (wilson_interval(s, num) for s in range(num + 1))) / 2

    assert worst(MIN_RATE_EXAMPLES) <= 0.25 < worst(MIN_RATE_EXAMPLES - 1)


@pytest.mark.parametrize("successes", [0, 5, 11])
def test_small_rates_are_refused_whatever_the_outcome(successes: int) -> None:
    assert wilson(successes, 11).refused == "11 examples; a rate needs 12 for an interval within +-0.25"
    assert str(wilson(0, 0).refused).startswith("no examples")


# Seeds


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [
        (1, 12.7062),
        (2, 4.30265),
        (3, 3.18245),
        (4, 2.77645),
        (9, 2.26216),
        (30, 2.04227),
        (100, 1.98397),
        (120, 1.97993),
    ],
)
def test_t_quantile_by_table(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, rel=1e-5)


def test_seeds_by_hand() -> None:
    """Mean 2, standard deviation 1, half-width 4.30265 / sqrt(3)."""
    measure = mean_over_seeds([1.0, 2.0, 3.0])
    assert measure.value == 2.0
    assert interval(measure) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)
    assert (measure.num, measure.method) == (3, "t")


@pytest.mark.parametrize(("num", "words"), [(0, "0 seeds"), (1, "1 seed;"), (2, "2 seeds")])
def test_few_seeds_are_refused(num: int, words: str) -> None:
    refusal = str(mean_over_seeds([1.0] * num).refused)
    assert refusal.startswith(words)
    assert refusal.endswith("an interval over seeds needs 3")


def test_a_diverged_seed_is_refused() -> None:
    assert mean_over_seeds([1.0, math.nan, 2.0]).refused == "1 of 3 values are not finite numbers"


# Fractions


def test_published_fractions() -> None:
    """The large-scale figures of arXiv 2507.09937: 50 % and 60 % at 360M, 58 % and 20 % at 1.7B."""
    assert gap_closed(2.38, 2.29, 2.13, 1.95) == pytest.approx(0.5, abs=0.01)
    assert benefit_kept(2.38, 2.75, 2.13) == pytest.approx(0.6, abs=0.01)
    assert gap_closed(2.22, 1.88, 1.98, 1.19) == pytest.approx(0.57, abs=0.01)
    assert benefit_kept(2.22, 2.28, 1.98) == pytest.approx(0.2, abs=0.01)


def test_fraction_ends() -> None:
    """Standard closes nothing and keeps all; no gap at all closes all; deduplicated data keeps nothing."""
    assert gap_closed(3.3, 0.9, 3.3, 0.9) == 0.0
    assert gap_closed(3.4, 3.4, 3.3, 0.9) == 1.0
    assert gap_closed(3.3, 0.5, 3.3, 0.9) < 0.0
    assert benefit_kept(3.3, 3.5, 3.3) == 1.0
    assert benefit_kept(3.5, 3.5, 3.3) == 0.0


def test_fractions_are_monotone() -> None:
    repeated = np.linspace(0.5, 3.4, 20)
    assert (np.diff(gap_closed(np.full(20, 3.4), repeated, np.full(20, 3.3), np.full(20, 0.9))) > 0).all()
    validation = np.linspace(3.2, 3.6, 20)
    assert (np.diff(benefit_kept(validation, np.full(20, 3.5), np.full(20, 3.3))) < 0).all()


def test_fractions_over_seeds_by_hand() -> None:
    """Of gaps of 2 nats 0.8, 1.0, 1.2 are left; of benefits of 0.2 nats 0.15, 0.1, 0.05 stay."""
    closed = gap_closed_frac([3.0] * 3, [2.2, 2.0, 1.8], [3.0, 3.1, 2.9], [1.0, 1.1, 0.9])
    assert closed.value == pytest.approx(0.5)
    assert interval(closed) == pytest.approx((0.5 - 0.248414, 0.5 + 0.248414), abs=1e-5)
    kept = repetition_benefit_kept_frac([3.05, 3.1, 3.15], [3.2] * 3, [3.0] * 3)
    assert kept.value == pytest.approx(0.5)
    assert interval(kept) == pytest.approx((0.5 - 0.62104, 0.5 + 0.62104), abs=1e-4)


@pytest.mark.parametrize(
    ("standard_repeated", "words"),
    [
        ([3.0, 3.0, 3.0], "is 0.000 nats [0.000, 0.000]"),
        ([2.0, 2.9, 3.5], "is 0.200 nats"),
        ([3.5, 3.5, 3.5], "is -0.500 nats"),
        ([2.995, 2.995, 2.995], "is 0.005 nats"),
    ],
)
def test_no_gap_no_fraction(standard_repeated: list[float], words: str) -> None:
    measure = gap_closed_frac([3.0] * 3, [2.0] * 3, [3.0] * 3, standard_repeated)
    assert measure.value is None
    assert str(measure.refused).startswith("the memorization gap of standard training " + words)
    assert str(measure.refused).endswith("cannot be told from 0, so a fraction of it means nothing")


def test_no_benefit_no_fraction() -> None:
    measure = repetition_benefit_kept_frac([3.0] * 3, [3.1, 3.0, 2.9], [3.0] * 3)
    assert str(measure.refused).startswith("the benefit of repetition is 0.000 nats")


def test_fractions_need_seeds() -> None:
    assert gap_closed_frac([3.0], [2.0], [3.0], [1.0]).refused == "1 seed; an interval over seeds needs 3"
    assert repetition_benefit_kept_frac([], [], []).refused == "0 seeds; an interval over seeds needs 3"


# One run


def test_losses_of_several_models_share_resamples() -> None:
    """A model that is worse by 0.5 nats on every document is worse by 0.5 in every resample."""
    tokens = np.array([10, 20, 30, 40, 50])
    nll = np.array([12.0, 50.0, 33.0, 90.0, 60.0])
    draws = loss_draws([nll, nll + 0.5 * tokens], tokens, num_resamples=300)
    assert draws.value_M[0] == pytest.approx(nll.sum() / tokens.sum())
    assert draws.draws_MR[1] - draws.draws_MR[0] == pytest.approx(np.full(300, 0.5))
    with pytest.raises(ShapeMismatch, match=r"nll_nats_MN has shape \(2, 5\), expected \(M, 4\)"):
        loss_draws([nll, nll], tokens[:4])


def _one_run(num: int, *, gap: float = 2.0, benefit: float = 0.2):  # noqa: ANN202
    """Draws of method, standard, dedup: half of the gap closed, three quarters of the benefit kept."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(50, 150, size=num)
    noise = generator.normal(0, 0.3, size=num)
    val = [3.0 + benefit / 4 + noise, 3.0 + noise, 3.0 + benefit + noise]
    rep = [3.0 + benefit / 4 - gap / 2 + noise, 3.0 - gap + noise, 3.0 + noise]
    return (
        loss_draws(np.array(val) * tokens, tokens, seed=0, num_resamples=500),
        loss_draws(np.array(rep) * tokens, tokens, seed=1, num_resamples=500),
    )


def test_fractions_of_one_run() -> None:
    validation, repeated = _one_run(60)
    closed = gap_closed_in_one_run(validation, repeated, 0, 1)
    kept = benefit_kept_in_one_run(validation, 0, 2, 1)
    assert closed.value == pytest.approx(0.5, abs=0.05)
    assert interval(closed)[0] < closed.value < interval(closed)[1]
    assert kept.value == pytest.approx(0.75)
    assert (closed.num, closed.method) == (60, "bootstrap")


def test_one_run_refuses_like_seeds_do() -> None:
    validation, repeated = _one_run(60, gap=0.0, benefit=0.0)
    assert "cannot be told from 0" in str(gap_closed_in_one_run(validation, repeated, 0, 1).refused)
    assert "cannot be told from 0" in str(benefit_kept_in_one_run(validation, 0, 2, 1).refused)
    validation, repeated = _one_run(4)
    assert gap_closed_in_one_run(validation, repeated, 0, 1).refused == "4 examples; an interval needs 5"


def test_exact_has_no_width() -> None:
    assert exact(1.0, 3) == Measure(value=1.0, ci95=(1.0, 1.0), num=3, method="exact")
