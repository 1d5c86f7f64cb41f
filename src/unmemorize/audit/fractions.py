"""Two fractions of what standard training does: the memorization that is gone, the gain that is kept.

    gap closed    = 1 - (val - rep) / (val_standard - rep_standard)
    benefit kept  = (val_dedup - val) / (val_dedup - val_standard)

with `val` the loss on text never trained on and `rep` the loss on repeated text, all of one seed. A fraction
of nothing is noise that looks like a percentage, so both are refused when their denominator cannot be told
from 0.

Pure numpy. Letters: S seeds. Source: the gap is that of MemSinks, arXiv 2507.09937; the fractions are ours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from unmemorize.audit.statistics import (
    Floats,
    LossDraws,
    mean_over_seeds,
    percentile_measure,
    refused,
    vector,
)
from unmemorize.records import Measure

MIN_DENOMINATOR_NATS = 0.01  # a gap or benefit below this is not worth a fraction of it


def gap_closed(
    validation: ArrayLike, repeated: ArrayLike, standard_validation: ArrayLike, standard_repeated: ArrayLike
) -> Floats:
    """Compute 1 - gap / gap of standard training, elementwise; losses in nats per token, result unitless.

    Source: MemSinks, arXiv 2507.09937, large-scale section; the fraction is ours.
    """
    gap = np.asarray(validation, dtype=np.float64) - np.asarray(repeated, dtype=np.float64)
    standard = np.asarray(standard_validation, dtype=np.float64) - np.asarray(
        standard_repeated, dtype=np.float64
    )
    result: Floats = 1 - gap / standard
    return result


def benefit_kept(
    validation: ArrayLike, dedup_validation: ArrayLike, standard_validation: ArrayLike
) -> Floats:
    """Compute the share of the repeats' gain in validation loss that stays, elementwise; unitless.

    Source: ours.
    """
    dedup = np.asarray(dedup_validation, dtype=np.float64)
    result: Floats = (dedup - np.asarray(validation)) / (dedup - np.asarray(standard_validation))
    return result


def gap_closed_frac(
    validation: ArrayLike, repeated: ArrayLike, standard_validation: ArrayLike, standard_repeated: ArrayLike
) -> Measure:
    """Give the mean gap closed over seeds; all arguments paired by seed, shape (S,), nats per token.

    Returns:
        1 means no gap is left, 0 means the gap of standard training, below 0 a larger one. Refused if
        standard training shows no gap: its interval reaches 0, or any seed's is below `MIN_DENOMINATOR_NATS`.
    """
    gap = vector(standard_validation, "standard_validation") - vector(standard_repeated, "standard_repeated")
    reason = _no_denominator(gap, mean_over_seeds(gap), "the memorization gap of standard training")
    if reason:
        return refused(reason, len(gap))
    return mean_over_seeds(gap_closed(validation, repeated, standard_validation, standard_repeated))


def repetition_benefit_kept_frac(
    validation: ArrayLike, dedup_validation: ArrayLike, standard_validation: ArrayLike
) -> Measure:
    """Give the mean benefit kept over seeds; all arguments paired by seed, shape (S,), nats per token.

    Returns:
        1 means the validation loss of standard training, 0 that of deduplicated data. Refused if repeats
        bring no
        benefit: the interval of it reaches 0, or any seed's is below `MIN_DENOMINATOR_NATS`.
    """
    gain = vector(dedup_validation, "dedup_validation") - vector(standard_validation, "standard_validation")
    reason = _no_denominator(gain, mean_over_seeds(gain), "the benefit of repetition")
    if reason:
        return refused(reason, len(gain))
    return mean_over_seeds(benefit_kept(validation, dedup_validation, standard_validation))


def gap_closed_in_one_run(validation: LossDraws, repeated: LossDraws, method: int, standard: int) -> Measure:
    """Give the gap closed by one trained model against another, with an interval over documents.

    Args:
        validation: losses on never-trained text.
        repeated: losses on repeated text, of the same models in the same order, with an independent seed.
        method: index of the model looked at.
        standard: index of the model trained in the standard way.
    """
    value_gap = validation.value_M - repeated.value_M
    draws_gap = validation.draws_MR - repeated.draws_MR
    return _fraction(
        1 - value_gap[method] / _not_zero(value_gap[standard]),
        1 - draws_gap[method] / _not_zero(draws_gap[standard]),
        (float(value_gap[standard]), draws_gap[standard]),
        "the memorization gap of standard training",
        min(validation.num, repeated.num),
    )


def benefit_kept_in_one_run(validation: LossDraws, method: int, dedup: int, standard: int) -> Measure:
    """Give the benefit kept by one trained model, with an interval over documents; indices as above."""
    value, draws = validation.value_M, validation.draws_MR
    gain, gain_draws = value[dedup] - value[standard], draws[dedup] - draws[standard]
    return _fraction(
        (value[dedup] - value[method]) / _not_zero(gain),
        (draws[dedup] - draws[method]) / _not_zero(gain_draws),
        (float(gain), gain_draws),
        "the benefit of repetition",
        validation.num,
    )


def _fraction(
    value: Floats, draws: Floats, denominator: tuple[float, Floats], what: str, num: int
) -> Measure:
    interval = percentile_measure(denominator[0], denominator[1], num)
    reason = _no_denominator(np.asarray([denominator[0]]), interval, what)
    return refused(reason, num) if reason else percentile_measure(float(value), draws, num)


def _no_denominator(values: Floats, interval: Measure, what: str) -> str | None:
    """Say why a fraction of `what` would mean nothing; None if it means something."""
    if interval.value is None or interval.ci95 is None:
        return interval.refused
    low, high = interval.ci95
    if low <= 0 or values.min() < MIN_DENOMINATOR_NATS:
        return (
            f"{what} is {interval.value:.3f} nats [{low:.3f}, {high:.3f}], which cannot be told from 0, "
            "so a fraction of it means nothing"
        )
    return None


def _not_zero(values: ArrayLike) -> Floats:
    """Replace exact zeros, which the refusal rule catches, so that dividing by them stays silent."""
    array = np.asarray(values, dtype=np.float64)
    return np.where(array == 0, 1e-12, array)
