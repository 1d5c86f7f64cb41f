"""From which similarity on a picture counts as a copy, where a measure has no convention.

A computed threshold is the largest of three values:

    controls      just above what pictures of ordinary prompts reach against a fitting picture that was never trained on
    references    just above what training pictures of different prompts reach against each other
    least         a value of the measure; few or very unlike pictures (noise) would set a threshold near 0

and has to hold against *strangers*: pictures made for one prompt beside the training picture of another. If more than
1 in 20 of these pairs reach it, it does not tell copies from unrelated pictures, and none is given.

Letters: N prompts, S seeds, D features. Source: ours; controls as in conformal prediction (Vovk et al. 2005).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from unmemorize.audit.picture_figures import PictureSimilarities
from unmemorize.audit.pictures import PromptCase
from unmemorize.audit.similarity import SimilarityMeasure
from unmemorize.audit.statistics import Floats
from unmemorize.audit.ways import PictureAuditSettings
from unmemorize.errors import DataError

CONTROL_QUANTILE = 0.99  # controls may be called copies in 1 of 100
MIN_CONTROLS = 20  # fewer never-trained pictures do not set a threshold
SUFFICIENT_CONTROLS = 99  # fewer cannot vouch for 1 in 100
MAX_STRANGERS_FRAC = (
    0.05  # pairs of a made picture and another prompt's that may reach it: a model mixes some up
)


@dataclass(frozen=True, slots=True)
class CopyThreshold:
    """From which similarity on a picture counts as a copy, and why.

    Attributes:
        value: the threshold, unitless; None if none could be chosen.
        rule: how it was chosen, or why it was not, for `settings` of the audit.
        is_computed: whether it comes from the audit's own pictures.
    """

    value: float | None
    rule: str
    is_computed: bool = True


def choose_threshold(
    measure: SimilarityMeasure,
    cases: Sequence[PromptCase],
    settings: PictureAuditSettings,
    references: Sequence[Tensor],
    before: PictureSimilarities,
    made_NSD: Floats | NDArray[np.float32],
) -> CopyThreshold:
    """Choose a copy threshold.

    In this order: the one named in the settings; the measure's convention; computed. Controls need a picture that fits
    the prompt and was never trained on, which is what ordinary prompts come with. From `SUFFICIENT_CONTROLS` on they
    decide alone; with fewer, but at least `MIN_CONTROLS`, the larger of that and the references; else the references.

    Args:
        measure: the measure.
        cases: the prompts, N.
        settings: thresholds that the user has named.
        references: for each prompt the vectors of its pictures, shape (K, D).
        before: similarities in state "before".
        made_NSD: vectors of the pictures made in state "before", shape (N, S, D).
    """
    if measure.name in settings.copy_thresholds:
        return CopyThreshold(float(settings.copy_thresholds[measure.name]), "named in the settings", False)
    if measure.copy_threshold is not None:
        return CopyThreshold(measure.copy_threshold, "convention of the literature", False)
    is_control = np.array([case.group == "ordinary" and len(case.pictures) > 0 for case in cases])
    found = []
    if is_control.sum() >= MIN_CONTROLS:
        found.append(threshold_from_controls(before.copy_NS[is_control]))
    trained = [number for number, case in enumerate(cases) if case.pictures and case.group != "ordinary"]
    prompts = [case.prompt for case in cases]
    if is_control.sum() < SUFFICIENT_CONTROLS and len({prompts[n] for n in trained}) > 1:
        found.append(
            threshold_from_references([references[n] for n in trained], [prompts[n] for n in trained])
        )
    if not found:
        return CopyThreshold(None, "none: it takes training pictures of two prompts or 20 controls")
    chosen = max(found, key=lambda one: one.value or -math.inf)
    assert chosen.value is not None
    if chosen.value < measure.least_threshold:
        rule = f"the least that {measure.name} calls a copy; computed it would be {chosen.value:.3f}, {chosen.rule}"
        chosen = CopyThreshold(measure.least_threshold, rule)
    return _held_against(strangers(made_NSD, references, prompts), chosen)


def _held_against(strangers_P: Floats, chosen: CopyThreshold) -> CopyThreshold:
    """Give no threshold if too many pairs of unrelated pictures reach it, or if it is not above 0."""
    assert chosen.value is not None
    num_reached = int((strangers_P >= chosen.value).sum())
    if chosen.value > 0 and num_reached <= MAX_STRANGERS_FRAC * len(strangers_P):
        return chosen
    return CopyThreshold(
        None,
        f"none: {chosen.value:.3f} ({chosen.rule}) is reached by {num_reached} of {len(strangers_P)} pairs of pictures "
        "made for one prompt and the picture of another, so that it would not tell copies from unrelated pictures",
    )


def strangers(
    made_NSD: Floats | NDArray[np.float32], references: Sequence[Tensor], prompts: Sequence[str]
) -> Floats:
    """Compare the pictures made for each prompt with the pictures that belong to every other one.

    Args:
        made_NSD: vectors of length 1, shape (N, S, D).
        references: for each prompt the vectors of its pictures, shape (K, D), K may be 0.
        prompts: N prompts; equal ones are no strangers.

    Returns:
        Largest similarity over seeds and pictures of each pair of different prompts, shape (P,), unitless.
    """
    texts = np.array(prompts)
    found = [np.zeros(0)]
    for number, own in enumerate(references):
        if len(own):
            best_N = (made_NSD @ own.numpy().T).max(axis=(1, 2))
            found.append(best_N[texts != texts[number]])
    return np.concatenate(found)


def threshold_from_controls(similarities_NS: ArrayLike) -> CopyThreshold:
    """Choose the threshold that pictures of never-trained prompts rarely reach.

    Args:
        similarities_NS: of N prompts in S seeds, to a picture that fits the prompt and was never trained on,
            shape (N, S).

    Returns:
        Just above the smallest value that at least 99 % of N + 1 prompts stay below with their best seed; with fewer
        than 199 prompts that is the largest value, which a new prompt passes with probability 1 / (N + 1).

    Raises:
        DataError: with fewer than `MIN_CONTROLS` prompts, or values that are not finite.

    Source: ours; an order statistic as in conformal prediction (Vovk et al. 2005).
    """
    values = np.asarray(similarities_NS, dtype=np.float64)
    if values.ndim != 2 or len(values) < MIN_CONTROLS or not np.isfinite(values).all():
        raise DataError(
            f"got controls of shape {values.shape}; a copy threshold needs finite similarities of {MIN_CONTROLS} "
            "never-trained prompts or more"
        )
    best = np.sort(values.max(axis=1))
    rank = min(math.ceil(CONTROL_QUANTILE * (len(best) + 1)), len(best))
    return CopyThreshold(
        math.nextafter(float(best[rank - 1]), 2),
        f"just above the {rank}th smallest of {len(best)} best similarities of never-trained prompts to a picture "
        "that fits them",
    )


def threshold_from_references(vectors: Sequence[Tensor], prompts: Sequence[str]) -> CopyThreshold:
    """Choose the threshold that training pictures of different prompts never reach.

    One pair of prompts with nearly equal pictures pushes it up, so that copies are missed; the rule names that pair.

    Args:
        vectors: for each prompt the vectors of its training pictures, shape (K, D) each, of length 1.
        prompts: the prompts.

    Raises:
        DataError: with fewer than two prompts that have a picture.

    Source: ours.
    """
    places = [number for number, group in enumerate(vectors) for _ in range(len(group))]
    owners = [
        prompts.index(prompts[number]) for number in places
    ]  # one prompt may have several pictures apart
    if len(set(owners)) < 2:
        raise DataError(
            "a copy threshold needs training pictures of two prompts, or a number; set copy_thresholds"
        )
    flat, owner = torch.cat(list(vectors)), torch.tensor(owners)
    best, pair = -math.inf, (0, 0)
    for place, vector in enumerate(flat):  # row by row: all pairs at once would not fit
        row = torch.where(owner == owner[place], -math.inf, flat @ vector)
        value, other = row.max(0)
        if float(value) > best:
            best, pair = float(value), (places[place], places[int(other)])
    return CopyThreshold(
        math.nextafter(best, 2),
        f"just above the largest similarity between training pictures of different prompts "
        f"({prompts[pair[0]]!r} and {prompts[pair[1]]!r})",
    )
