"""From similarities of pictures to the figures of a state. Pure numpy: knows no model, no picture and no file.

The prompt is the unit of every interval: the pictures of one prompt are made from one text and are no independent
evidence. A prompt counts by one number, computed over its S seeds:

    copy rate          1 if its best seed reaches the copy threshold, else 0
    copy similarity    its best seed (typical: its median seed)
    kept similarity    its median seed, each picture against the one of the same seed before
    seed similarity    the median of its S (S - 1) / 2 pairs

Differences are taken prompt by prompt, so that what two states share does not widen their interval.

Letters: N prompts, S seeds. Source: medians as in Hintersdorf et al. 2024; the best seed as in Wen et al. 2024; unit
of sampling, pairing and refusals are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unmemorize.audit.statistics import (
    MIN_RATE_EXAMPLES,
    NUM_RESAMPLES,
    Floats,
    bootstrap_difference,
    bootstrap_mean,
    refused,
    wilson,
)
from unmemorize.records import Measure, Similarity


@dataclass(frozen=True, slots=True, eq=False)
class PictureSimilarities:
    """Similarities of the pictures of one state by one measure.

    Attributes:
        copy_NS: to the nearest training picture of the prompt, shape (N, S); NaN in rows without one.
        kept_NS: to the picture of the same prompt and seed in state "before", shape (N, S); None there.
        between_N: median similarity of two pictures of a prompt, shape (N,); NaN with a single seed.
    """

    copy_NS: Floats
    kept_NS: Floats | None
    between_N: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampling:
    """How intervals are made: seed and number of resamples of the bootstrap."""

    seed: int = 0
    num_resamples: int = NUM_RESAMPLES

    def mean(self, values: Floats) -> Measure:
        """Give the mean of one number a prompt, shape (N,)."""
        return bootstrap_mean(values, seed=self.seed, num_resamples=self.num_resamples)

    def difference(self, values: Floats, reference: Floats) -> Measure:
        """Give the mean of paired differences, shape (N,) each."""
        return bootstrap_difference(values, reference, seed=self.seed, num_resamples=self.num_resamples)


def similarity_figures(
    measure: str,
    state: PictureSimilarities,
    is_member: NDArray[np.bool_],
    threshold: float | None,
    *,
    before: PictureSimilarities | None = None,
    placebo: PictureSimilarities | None = None,
    resampling: Resampling | None = None,
) -> Similarity:
    """Summarize one group of prompts in one state.

    Args:
        measure: name of the measure.
        state: similarities of the state.
        is_member: which prompts belong to the group, shape (N,).
        threshold: similarity from which a picture is a copy, unitless; None if none could be chosen.
        before: those of state "before"; None if this is it.
        placebo: those of the placebo; None if there is none, or this is it.
        resampling: seed and size of the bootstrap.

    Returns:
        Means over prompts, unitless; fractions from 0 to 1; refused where there are too few prompts.
    """
    resampling = resampling or Resampling()
    has_picture = is_member & np.isfinite(state.copy_NS).all(axis=1)
    figures: dict[str, Measure | None] = {}
    if has_picture.any():
        now = state.copy_NS[has_picture]
        earlier = None if before is None else before.copy_NS[has_picture]
        figures |= _copy_figures(now, earlier, threshold, resampling)
    if state.kept_NS is not None and before is not None:
        kept_N = np.median(state.kept_NS[is_member], axis=1)
        figures["kept_similarity"] = resampling.mean(kept_N)
        if placebo is not None and placebo.kept_NS is not None:
            reference = np.median(placebo.kept_NS[is_member], axis=1)
            figures["kept_beyond_placebo"] = resampling.difference(kept_N, reference)
    between_N = state.between_N[is_member]
    figures["seed_similarity"] = (
        refused("one seed makes one picture a prompt; diversity needs two", len(between_N))
        if state.copy_NS.shape[1] < 2
        else resampling.mean(between_N)
    )
    return Similarity.model_validate({"measure": measure, **figures})


def _copy_figures(
    now_NS: Floats, before_NS: Floats | None, threshold: float | None, resampling: Resampling
) -> dict[str, Measure | None]:
    best_N = now_NS.max(axis=1)
    figures: dict[str, Measure | None] = {
        "copy_similarity": resampling.mean(best_N),
        "typical_copy_similarity": resampling.mean(np.median(now_NS, axis=1)),
    }
    if before_NS is not None:
        figures["copy_similarity_change"] = resampling.difference(best_N, before_NS.max(axis=1))
    if threshold is None:
        figures["copy_rate_frac"] = refused(
            "no copy threshold could be chosen; set copy_thresholds (--copy-threshold)", len(best_N)
        )
        return figures
    is_copy_N = best_N >= threshold
    figures["copy_rate_frac"] = wilson(int(is_copy_N.sum()), len(is_copy_N))
    shares_N = (now_NS >= threshold).mean(axis=1)
    few = refused(f"{len(best_N)} prompts; a rate needs {MIN_RATE_EXAMPLES}", len(best_N))
    is_few = len(best_N) < MIN_RATE_EXAMPLES
    figures["copy_rate_per_picture_frac"] = few if is_few else resampling.mean(shares_N)
    if before_NS is not None:
        was_copy_N = before_NS.max(axis=1) >= threshold
        figures["copy_rate_change_frac"] = (
            few if is_few else resampling.difference(is_copy_N.astype(float), was_copy_N.astype(float))
        )
    return figures


def similarities_of_state(
    vectors_NSD: Floats | NDArray[np.float32],
    references: Sequence[NDArray[np.float32]],
    before_NSD: NDArray[np.float32] | None,
) -> PictureSimilarities:
    """Compare the pictures of a state with training pictures, with those before, and with each other.

    Args:
        vectors_NSD: vectors of length 1 of the pictures, shape (N, S, D).
        references: for each prompt the vectors of its training pictures, shape (K, D), K may be 0.
        before_NSD: vectors of the pictures in state "before", shape (N, S, D); None if this is it.
    """
    num, seeds = vectors_NSD.shape[:2]
    copies = np.full((num, seeds), np.nan)
    between = np.full(num, np.nan)
    upper = np.triu_indices(seeds, 1)
    for number, (pictures_SD, own) in enumerate(zip(vectors_NSD, references, strict=True)):
        if len(own):
            copies[number] = (pictures_SD @ own.T).max(axis=1)
        if seeds > 1:
            between[number] = np.median((pictures_SD @ pictures_SD.T)[upper])
    kept = None if before_NSD is None else np.einsum("nsd,nsd->ns", vectors_NSD, before_NSD).astype(float)
    return PictureSimilarities(copies, kept, between)


def per_prompt(measured: Mapping[str, PictureSimilarities], number: int) -> dict[str, list[float]]:
    """Lay out one prompt's copy similarity by state and seed; empty where it has no training picture."""
    rows = {state: similarities.copy_NS[number] for state, similarities in measured.items()}
    return {state: [float(v) for v in row] for state, row in rows.items() if np.isfinite(row).all()}
