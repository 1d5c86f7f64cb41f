"""Figures with 95 % intervals, and the rules that refuse a figure its sample cannot support.

Within one trained model the unit is the example: intervals are expanded percentile bootstraps over examples,
all models on the same examples resampled together. Between trainings the unit is the seed: intervals are
Student t over seeds.

Pure numpy: knows no model, no group and no file. The refusal rules are the constants below; docs/metrics.md
gives the reasons.

Letters: N examples, C columns, M models, S seeds, R resamples.
Source: Efron and Tibshirani 1993, chapter 13 (percentile bootstrap); Hesterberg 2015 (expanded percentiles);
Wilson 1927; the rules are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unmemorize.errors import ShapeMismatch
from unmemorize.records import Measure

Floats = NDArray[np.float64]

MIN_EXAMPLES = 5  # below, a percentile bootstrap has too few distinct resamples to mean anything
MIN_RATE_EXAMPLES = 12  # the smallest n whose Wilson interval is at most +-0.25 whatever the outcome
MIN_SEEDS = 3  # below, the t quantile is 12.7 and an interval says nothing
NUM_RESAMPLES = 10_000

_BLOCK_ENTRIES = 2_000_000  # resample indices drawn at a time: 16 MB
_NORMAL_QUANTILE = 1.959963984540054


@dataclass(frozen=True, slots=True)
class LossDraws:
    """Losses of M models on the same N documents, with joint resamples.

    Attributes:
        value_M: token-weighted losses, shape (M,), nats per token.
        draws_MR: the same in R resamples of the documents, shape (M, R), nats per token.
        num: number of documents N.
    """

    value_M: Floats
    draws_MR: Floats
    num: int


def refused(reason: str, num: int = 0) -> Measure:
    """Make a measure that holds a reason instead of a value."""
    return Measure(refused=reason, num=num)


def exact(value: float, num: int = 0) -> Measure:
    """Make a measure that holds by definition, or was counted, not sampled."""
    return Measure(value=value, ci95=(value, value), num=num, method="exact")


def bootstrap_mean(values: ArrayLike, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Measure:
    """Give the mean over examples, with a percentile bootstrap interval.

    Args:
        values: one number an example, shape (N,), any unit.
        seed: seed of the resampling.
        num_resamples: R.

    Returns:
        The mean in the unit of `values`; refused below `MIN_EXAMPLES` examples or if a value is not finite.

    Source: Efron and Tibshirani 1993, section 13.3; tails by Hesterberg 2015.
    """
    column = vector(values, "values")
    reason = _unusable(column)
    if reason:
        return refused(reason, len(column))
    draws = _resampled_means(column[None, :], seed, num_resamples)[0]
    return _percentile(float(column.mean()), draws, len(column))


def bootstrap_difference(
    values: ArrayLike, reference: ArrayLike, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Measure:
    """Give the mean of `values - reference`, both measured on the same examples.

    Args:
        values: shape (N,), any unit.
        reference: shape (N,), same unit and same examples in the same order.
        seed: seed of the resampling.
        num_resamples: R.

    Raises:
        ShapeMismatch: if the two differ in length.

    Source: paired percentile bootstrap, Efron and Tibshirani 1993, section 8.3.
    """
    ours, theirs = vector(values, "values"), vector(reference, "reference")
    _require_equal_length(ours, theirs)
    return bootstrap_mean(ours - theirs, seed=seed, num_resamples=num_resamples)


def bootstrap_ratio(
    numerators: ArrayLike, denominators: ArrayLike, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Measure:
    """Give sum(numerators) / sum(denominators) over examples, resampling whole examples.

    With summed nats and token counts this is the token-weighted loss in nats per token.

    Args:
        numerators: shape (N,), any unit.
        denominators: shape (N,), positive.
        seed: seed of the resampling.
        num_resamples: R.

    Raises:
        ShapeMismatch: if the two differ in length.
    """
    above, below = vector(numerators, "numerators"), vector(denominators, "denominators")
    _require_equal_length(above, below)
    reason = _unusable(above) or _unusable(below)
    if not reason and below.min() <= 0:
        reason = "an example has no tokens to average over; leave it out"
    if reason:
        return refused(reason, len(above))
    draws = loss_draws(above[None, :], below, seed=seed, num_resamples=num_resamples)
    return _percentile(float(draws.value_M[0]), draws.draws_MR[0], draws.num)


def loss_draws(
    nll_nats_MN: ArrayLike, num_tokens_N: ArrayLike, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> LossDraws:
    """Resample the losses of several models on the same documents together.

    Args:
        nll_nats_MN: summed negative log-likelihood per model and document, shape (M, N), nats.
        num_tokens_N: predicted tokens per document, shape (N,), all at least 1; N at least 1.
        seed: seed of the resampling; documents are drawn from it alone, so equal seeds pair across calls.
        num_resamples: R.

    Raises:
        ShapeMismatch: if the number of documents differs.
    """
    nll, tokens = np.asarray(nll_nats_MN, dtype=np.float64), vector(num_tokens_N, "num_tokens_N")
    if nll.ndim != 2 or nll.shape[1] != len(tokens):
        raise ShapeMismatch(f"nll_nats_MN has shape {nll.shape}, expected (M, {len(tokens)})")
    means = _resampled_means(np.vstack([nll, tokens]), seed, num_resamples)
    return LossDraws(nll.sum(axis=1) / tokens.sum(), means[:-1] / means[-1], len(tokens))


def wilson(num_successes: int, num: int) -> Measure:
    """Give a success rate with its Wilson score interval.

    Refused below `MIN_RATE_EXAMPLES`, where the interval could be wider than +-0.25. The rule looks at n
    alone, never at the outcome: otherwise rates near 0 and 1 would be shown more readily than those in
    between.

    Args:
        num_successes: 0 .. num.
        num: number of trials.

    Returns:
        The rate, 0 .. 1.

    Source: Wilson 1927, without continuity correction.
    """
    if num < MIN_RATE_EXAMPLES:
        return refused(
            f"{_examples(num)}; a rate needs {MIN_RATE_EXAMPLES} for an interval within +-0.25", num
        )
    low, high = wilson_interval(num_successes, num)
    return Measure(value=num_successes / num, ci95=(low, high), num=num, method="wilson")


def wilson_interval(num_successes: int, num: int) -> tuple[float, float]:
    """Compute the bare 95 % Wilson interval, for any num of at least 1."""
    rate, z2 = num_successes / num, _NORMAL_QUANTILE**2
    middle = rate + z2 / (2 * num)
    half = _NORMAL_QUANTILE * math.sqrt(rate * (1 - rate) / num + z2 / (4 * num * num))
    scale = 1 + z2 / num
    low = 0.0 if num_successes == 0 else (middle - half) / scale
    high = 1.0 if num_successes == num else (middle + half) / scale
    return low, high


def mean_over_seeds(values: ArrayLike) -> Measure:
    """Give the mean over training seeds with its Student-t interval.

    Args:
        values: one number a seed, shape (S,), any unit.

    Returns:
        The mean; refused below `MIN_SEEDS` seeds or if a value is not finite.
    """
    column = vector(values, "values")
    num = len(column)
    if num < MIN_SEEDS:
        return refused(f"{num} seed{'' if num == 1 else 's'}; an interval over seeds needs {MIN_SEEDS}", num)
    reason = _not_finite(column)
    if reason:
        return refused(reason, num)
    mean = float(column.mean())
    half = t_quantile(num - 1) * float(column.std(ddof=1)) / math.sqrt(num)
    return Measure(value=mean, ci95=(mean - half, mean + half), num=num, method="t")


def t_quantile(degrees: int) -> float:
    """Return t with P(|T| <= t) = 0.95 for Student's t distribution with whole degrees of freedom.

    Source: Abramowitz and Stegun 26.7.3 and 26.7.4, inverted by bisection; above 100 degrees their 26.7.5.
    """
    if degrees > 100:
        z = _NORMAL_QUANTILE
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    low, high = 1.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_mass(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def percentile_measure(value: float, draws: ArrayLike, num: int) -> Measure:
    """Make a measure from a value and its bootstrap resamples; refused below `MIN_EXAMPLES` examples."""
    if num < MIN_EXAMPLES:
        return refused(f"{_examples(num)}; an interval needs {MIN_EXAMPLES}", num)
    return _percentile(float(value), vector(draws, "draws"), num)


def _resampled_means(columns_CN: Floats, seed: int, num_resamples: int) -> Floats:
    """Mean of every column in every resample, shape (C, R); all columns share each resample's examples."""
    num = columns_CN.shape[1]
    generator = np.random.default_rng(seed)
    means = np.empty((columns_CN.shape[0], num_resamples))
    block = max(1, _BLOCK_ENTRIES // num)
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        picked = generator.integers(0, num, size=(rows, num))
        for number, column in enumerate(columns_CN):
            means[number, start : start + rows] = column[picked].mean(axis=1)
    return means


def _percentile(value: float, draws: Floats, num: int) -> Measure:
    """Expanded percentile interval: the tails are those of a t distribution, which small samples need."""
    tail = 0.5 * math.erfc(math.sqrt(num / (num - 1)) * t_quantile(num - 1) / math.sqrt(2))
    low, high = np.percentile(draws, [100 * tail, 100 * (1 - tail)])
    return Measure(value=value, ci95=(float(low), float(high)), num=num, method="bootstrap")


def _t_mass(t: float, degrees: int) -> float:
    """P(|T| <= t)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine2 = math.cos(angle) ** 2
    term = math.sin(angle) if degrees % 2 == 0 else math.sin(angle) * math.cos(angle)
    total = 0.0
    for step in range(2 + degrees % 2, degrees + 1, 2):
        total += term
        term *= cosine2 * (step - 1) / step
    return total if degrees % 2 == 0 else 2 / math.pi * (angle + total)


def vector(values: ArrayLike, name: str) -> Floats:
    """Read numbers as a float64 array of one dimension, or raise `ShapeMismatch` naming them."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ShapeMismatch(f"{name} has shape {array.shape}, expected one dimension")
    return array


def _require_equal_length(ours: Floats, theirs: Floats) -> None:
    if len(ours) != len(theirs):
        raise ShapeMismatch(f"got {len(ours)} and {len(theirs)} values, expected one pair an example")


def _unusable(column: Floats) -> str | None:
    if len(column) < MIN_EXAMPLES:
        return f"{_examples(len(column))}; an interval needs {MIN_EXAMPLES}"
    return _not_finite(column)


def _not_finite(column: Floats) -> str | None:
    num_bad = int((~np.isfinite(column)).sum())
    return f"{num_bad} of {len(column)} values are not finite numbers" if num_bad else None


def _examples(num: int) -> str:
    return f"{num or 'no'} example{'' if num == 1 else 's'}"
