"""How well does a score tell memorized prompts from ordinary ones, and how well was the memory's place found? Pure.

    AUC            P(score of a memorized prompt > score of an ordinary one), ties count half
    TPR at 1 % FPR share of memorized prompts above a threshold that at most 1 % of ordinary prompts exceed
    recall         |found and true| / |true|
    precision      |found and true| / |found|

Recall and precision stand beside what random sets of the same size reach: at a narrow site, chance finds much.

What this file does not do: compute scores, or know where memory is. Letters: M memorized and O ordinary prompts,
R resamples. Source: Fawcett 2006 for the curve's figures; Carlini et al. 2022 for the low false-positive rate; the
expectation of random sets and the refusals are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from unmemorize.audit.statistics import (
    MIN_EXAMPLES,
    MIN_RATE_EXAMPLES,
    NUM_RESAMPLES,
    Floats,
    percentile_measure,
    refused,
    vector,
)
from unmemorize.errors import DataError
from unmemorize.neurons import NeuronSet, Site, same_model
from unmemorize.records import Measure

FALSE_POSITIVE_RATE = 0.01
MIN_ORDINARY = 100  # below, 1 % of the ordinary prompts is less than one of them

_BLOCK_ENTRIES = 2_000_000  # resampled scores held at a time: 16 MB


@dataclass(frozen=True, slots=True)
class DetectionQuality:
    """How well a score separates memorized from ordinary prompts.

    Attributes:
        auc: area under the receiver operating characteristic, 0 to 1; 0.5 is chance.
        tpr_at_fpr: share of memorized prompts found at a false-positive rate of at most 1 %, 0 to 1.
    """

    auc: Measure
    tpr_at_fpr: Measure


def detection(
    scores_memorized: ArrayLike,
    scores_ordinary: ArrayLike,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> DetectionQuality:
    """Judge a score that should be higher for memorized prompts.

    Args:
        scores_memorized: shape (M,), any unit.
        scores_ordinary: shape (O,), same unit.
        seed: seed of the bootstrap, which resamples both kinds of prompts apart.
        num_resamples: R.

    Returns:
        The AUC, refused below 5 prompts of a kind; the TPR at 1 % FPR, refused below 12 memorized or 100 ordinary
        prompts; both if a score is not finite. `num` is the smaller of M and O.
    """
    memorized, ordinary = (
        vector(scores_memorized, "scores_memorized"),
        vector(scores_ordinary, "scores_ordinary"),
    )
    num = min(len(memorized), len(ordinary))
    counts = f"{len(memorized)} memorized and {len(ordinary)} ordinary prompts"
    if num < MIN_EXAMPLES:
        few = refused(f"{counts}; an interval needs {MIN_EXAMPLES} of each", num)
        return DetectionQuality(few, few)
    if not (np.isfinite(memorized).all() and np.isfinite(ordinary).all()):
        bad = refused("a score is not a finite number", num)
        return DetectionQuality(bad, bad)
    aucs, tprs = _resampled(memorized, ordinary, seed, num_resamples)
    auc = percentile_measure(area_under_curve(memorized, ordinary), aucs, num)
    if len(memorized) < MIN_RATE_EXAMPLES or len(ordinary) < MIN_ORDINARY:
        reason = f"{counts}; a rate at 1 % false positives needs {MIN_RATE_EXAMPLES} and {MIN_ORDINARY}"
        return DetectionQuality(auc, refused(reason, num))
    return DetectionQuality(auc, percentile_measure(true_positive_rate(memorized, ordinary), tprs, num))


def area_under_curve(memorized: Floats, ordinary: Floats) -> float:
    """Compute P(memorized > ordinary) + P(equal) / 2 over all pairs, 0 to 1."""
    return float(_areas(memorized[None, :], np.sort(ordinary)[None, :])[0])


def true_positive_rate(memorized: Floats, ordinary: Floats, rate: float = FALSE_POSITIVE_RATE) -> float:
    """Compute the share of memorized scores above the lowest threshold that at most `rate` of ordinary ones exceed."""
    threshold = np.sort(ordinary)[len(ordinary) - 1 - math.floor(rate * len(ordinary))]
    return float((memorized > threshold).mean())


def _resampled(memorized: Floats, ordinary: Floats, seed: int, num_resamples: int) -> tuple[Floats, Floats]:
    """AUC and TPR in R resamples of both kinds, shape (R,) each."""
    generator = np.random.default_rng(seed)
    aucs, tprs = np.empty(num_resamples), np.empty(num_resamples)
    place = len(ordinary) - 1 - math.floor(FALSE_POSITIVE_RATE * len(ordinary))
    block = max(1, _BLOCK_ENTRIES // (len(memorized) + len(ordinary)))
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        drawn_RM = memorized[generator.integers(0, len(memorized), size=(rows, len(memorized)))]
        drawn_RO = np.sort(ordinary[generator.integers(0, len(ordinary), size=(rows, len(ordinary)))], axis=1)
        aucs[start : start + rows] = _areas(drawn_RM, drawn_RO)
        tprs[start : start + rows] = (drawn_RM > drawn_RO[:, place, None]).mean(axis=1)
    return aucs, tprs


def _areas(memorized_RM: Floats, sorted_RO: Floats) -> Floats:
    """AUC of each row; the second argument is sorted along its rows."""
    areas = np.empty(len(memorized_RM))
    for number, (high, low) in enumerate(zip(memorized_RM, sorted_RO, strict=True)):
        below = np.searchsorted(low, high, side="left") + np.searchsorted(low, high, side="right")
        areas[number] = below.mean() / (2 * len(low))
    return areas


@dataclass(frozen=True, slots=True)
class LocalizationQuality:
    """How much of the memory's true place a neuron set covers.

    Attributes:
        recall_frac: share of the true neurons that were found, 0 to 1.
        precision_frac: share of the found neurons that are true, 0 to 1; None if nothing was found.
        random_recall_frac: expected recall of a random set of the same size.
        random_precision_frac: expected precision of it; None if nothing was found.
        num_found: size of the found set.
        num_true: size of the true set.
        num_common: neurons in both.
    """

    recall_frac: float
    precision_frac: float | None
    random_recall_frac: float
    random_precision_frac: float | None
    num_found: int
    num_true: int
    num_common: int


def recall_precision(
    found: NeuronSet, truth: NeuronSet, *, sites: Sequence[Site] | None = None
) -> LocalizationQuality:
    """Compare found neurons with those that hold the memory.

    The counts are exact, so there is no interval: over several memories, average and resample them.

    Args:
        found: what localization gave.
        truth: where the memory is, at least one neuron.
        sites: where random sets are drawn, over all of their neurons alike; by default random sets have the size of
            `found` at each of its sites, so that choosing the right site counts as chance.

    Raises:
        DataError: if the sets belong to different models, the truth is empty, or a found neuron lies outside `sites`.
    """
    if not same_model(found.model_id, truth.model_id):
        raise DataError(
            f"found neurons belong to {found.model_id}, the true ones to {truth.model_id}; compare sets of one model"
        )
    if not len(truth):
        raise DataError("the true set is empty; recall needs at least one neuron that holds the memory")
    if sites is None:
        expected = sum(
            len(chosen) * len(truth.indices.get(site, ())) / site.width
            for site, chosen in found.indices.items()
        )
    else:
        outside = [site for site in found.indices if site not in set(sites)]
        if outside:
            raise DataError(f"neurons were found at {outside[0].path}, which is not among sites; name it")
        reachable = sum(len(truth.indices.get(site, ())) for site in set(sites))
        expected = len(found) * reachable / sum(site.width for site in set(sites))
    common = len(found & truth)
    return LocalizationQuality(
        recall_frac=common / len(truth),
        precision_frac=common / len(found) if len(found) else None,
        random_recall_frac=expected / len(truth),
        random_precision_frac=expected / len(found) if len(found) else None,
        num_found=len(found),
        num_true=len(truth),
        num_common=common,
    )
