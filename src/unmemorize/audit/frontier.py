"""The cap:R curve, and on which side of it a method lies.

The honest rival of any method is to repeat less: `dedup` is cap:1, `standard` is cap:inf, and the runs
between them draw a curve of repeated loss over validation loss. A method earns its complexity if, at equal
validation loss, its repeated loss lies above that curve:

    beyond = repeated loss of the method - curve(validation loss of the method)

LIMIT: points are joined by straight lines; where the true curve bends upward between them, it is read too
low.

Pure numpy. Letters: K points of the curve, S seeds, R resamples. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from unmemorize.audit.statistics import (
    MIN_SEEDS,
    Floats,
    LossDraws,
    mean_over_seeds,
    percentile_measure,
    refused,
)
from unmemorize.errors import ConfigError
from unmemorize.records import Measure

STANDARD, DEDUP = "standard", "dedup"
MIN_CURVE_POINTS = 3  # the two ends alone make a chord, which lies below every curve that bulges


def curve_repeats(method: str) -> float | None:
    """Return a method's cap on repeats: 1 for dedup, inf for standard, None off the curve.

    Raises:
        ConfigError: if a `cap:R` has no whole R of at least 1.
    """
    if method in (STANDARD, DEDUP):
        return math.inf if method == STANDARD else 1.0
    if not method.startswith("cap:"):
        return None
    text = method.removeprefix("cap:")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"method {method!r} has no cap; write cap:R with R a whole number of 1 or more")
    return float(text)


def curve_methods(methods: Sequence[str]) -> list[str]:
    """Pick the methods on the curve, in order of the cap."""
    caps = {method: curve_repeats(method) for method in methods}
    return sorted((m for m, cap in caps.items() if cap is not None), key=lambda m: caps[m] or 0.0)


def curve_repeated_nats(validation_K: ArrayLike, repeated_K: ArrayLike, at: ArrayLike) -> Floats:
    """Read the curve: the highest repeated loss it reaches at a validation loss of at most `at`.

    Where the validation loss rises steadily as repeats are capped, this is plain interpolation; where it does
    not, the rival may take any point that is at least as good. To the left of the curve its leftmost point
    counts, which favours the rival.

    Args:
        validation_K: validation loss of the points, in order of the cap, shape (K,) or (K, R), nats per
            token.
        repeated_K: repeated loss of the points, same shape, nats per token.
        at: validation loss to read the curve at, scalar or shape (R,), nats per token.

    Returns:
        Repeated loss, shape of `at`, nats per token.
    """
    validation = np.asarray(validation_K, dtype=np.float64)
    repeated = np.asarray(repeated_K, dtype=np.float64)
    place = np.maximum(np.asarray(at, dtype=np.float64), validation.min(axis=0))
    best: Floats = np.where(validation <= place, repeated, -np.inf).max(axis=0)
    for k in range(len(validation) - 1):
        left, right = validation[k], validation[k + 1]
        crosses = (np.minimum(left, right) < place) & (place < np.maximum(left, right))
        share = (place - left) / np.where(crosses, right - left, 1.0)
        crossing = repeated[k] + share * (repeated[k + 1] - repeated[k])
        best = np.maximum(best, np.where(crosses, crossing, -np.inf))
    return best


def beyond_curve_nats(
    validation_S: ArrayLike,
    repeated_S: ArrayLike,
    curve_validation_KS: ArrayLike,
    curve_repeated_KS: ArrayLike,
) -> Measure:
    """Give by how much a method's repeated loss lies above the curve at its own validation loss.

    Every seed is compared with the curve of its own seed; the interval is over these differences.

    Args:
        validation_S: the method's validation loss by seed, shape (S,), nats per token.
        repeated_S: its repeated loss, shape (S,), nats per token.
        curve_validation_KS: validation loss of the points in order of the cap, shape (K, S), nats per token.
        curve_repeated_KS: their repeated loss, shape (K, S), nats per token.

    Returns:
        Positive is beyond the curve, negative behind it. Refused below `MIN_SEEDS` seeds or
        `MIN_CURVE_POINTS` points, or if the method's mean validation loss lies outside the range of the mean
        curve.
    """
    validation = np.asarray(validation_S, dtype=np.float64)
    curve = np.asarray(curve_validation_KS, dtype=np.float64)
    if len(curve) < MIN_CURVE_POINTS:
        return refused(_too_few_points(len(curve)), len(validation))
    if len(validation) >= MIN_SEEDS:
        reason = _out_of_range(float(validation.mean()), curve.mean(axis=1))
        if reason:
            return refused(reason, len(validation))
    if not len(validation):
        return mean_over_seeds([])
    rival = curve_repeated_nats(curve, curve_repeated_KS, validation)
    return mean_over_seeds(np.asarray(repeated_S, dtype=np.float64) - rival)


def beyond_curve_in_one_run(
    validation: LossDraws, repeated: LossDraws, method: int, points: Sequence[int]
) -> Measure:
    """Give the same for the models of one seed, with an interval over documents.

    Args:
        validation: losses on never-trained text.
        repeated: losses on repeated text, of the same models in the same order.
        method: index of the model looked at.
        points: indices of the models on the curve, in order of the cap.
    """
    num = min(validation.num, repeated.num)
    if len(points) < MIN_CURVE_POINTS:
        return refused(_too_few_points(len(points)), num)
    rows = list(points)
    reason = _out_of_range(float(validation.value_M[method]), validation.value_M[rows])
    if reason:
        return refused(reason, num)
    rival = curve_repeated_nats(validation.value_M[rows], repeated.value_M[rows], validation.value_M[method])
    rival_R = curve_repeated_nats(
        validation.draws_MR[rows], repeated.draws_MR[rows], validation.draws_MR[method]
    )
    return percentile_measure(
        float(repeated.value_M[method] - rival), repeated.draws_MR[method] - rival_R, num
    )


def _too_few_points(num: int) -> str:
    return f"points on the cap:R curve: {num}; it needs standard, dedup and a cap:R between them"


def _out_of_range(validation: float, curve_K: Floats) -> str | None:
    low, high = float(curve_K.min()), float(curve_K.max())
    if low <= validation <= high:
        return None
    if validation < low:
        rank = f"better than every point of the cap:R curve, whose best is {low:.3f}"
    else:
        rank = f"worse than every point of the cap:R curve, whose worst is {high:.3f}"
    return f"validation loss {validation:.3f} is {rank}, so nothing on it is equal"
