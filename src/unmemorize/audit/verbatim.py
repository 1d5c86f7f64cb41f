"""How much of a text a model repeats word for word: scores of a continuation against the truth.

A sequence is a prefix of k tokens and a suffix s of l tokens. The model gives two continuations: g, its
greedy tokens after the prefix, and q, with q_t its most likely token after the prefix and the true s_<t
("teacher forcing"). Every score compares g or q with s, token by token. Pure numpy; producing g and q is the
family file's work.

Letters: N examples, T tokens of a suffix.
Source: definitions of Carlini et al. 2023 (exact extraction), Biderman et al. 2023 (equal positions), Wang et
al. 2025 (extraction strength), as restated in docs/metrics.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unmemorize.errors import ShapeMismatch

Tokens = NDArray[np.int64]

NEAR_VERBATIM_FRAC = 0.75


@dataclass(frozen=True, slots=True, eq=False)
class VerbatimScores:
    """Scores of N continuations, each array of shape (N,).

    Attributes:
        is_exact: whether g equals s.
        matched_prefix_tokens: tokens of g before the first one that differs, 0 .. l.
        equal_positions_frac: share of positions where g equals s.
        edit_distance_frac: Levenshtein distance of g and s in tokens, divided by l.
        is_near_verbatim: whether 1 - edit_distance_frac is at least 0.75.
        teacher_forced_accuracy_frac: share of positions where q equals s.
        extraction_strength_frac: 1 - o / l with o the smallest offset from which on q equals s; o = l if the
            last token is wrong, so that 0 can be reached.
    """

    is_exact: NDArray[np.bool_]
    matched_prefix_tokens: NDArray[np.int64]
    equal_positions_frac: NDArray[np.float64]
    edit_distance_frac: NDArray[np.float64]
    is_near_verbatim: NDArray[np.bool_]
    teacher_forced_accuracy_frac: NDArray[np.float64]
    extraction_strength_frac: NDArray[np.float64]


def score_continuations(generated_NT: Tokens, teacher_forced_NT: Tokens, truth_NT: Tokens) -> VerbatimScores:
    """Score greedy and teacher-forced continuations against the truth.

    Args:
        generated_NT: g, shape (N, l), int64 token ids.
        teacher_forced_NT: q, shape (N, l), int64.
        truth_NT: s, shape (N, l), int64, l at least 1.

    Raises:
        ShapeMismatch: if the three shapes differ, or l is 0.
    """
    shapes = (generated_NT.shape, teacher_forced_NT.shape, truth_NT.shape)
    if len(set(shapes)) != 1 or truth_NT.ndim != 2 or truth_NT.shape[1] == 0:
        raise ShapeMismatch(f"continuations have shapes {shapes}, expected one shape (N, l) with l >= 1")
    length = truth_NT.shape[1]
    equal = generated_NT == truth_NT
    forced = teacher_forced_NT == truth_NT
    distance = levenshtein(generated_NT, truth_NT) / length
    return VerbatimScores(
        is_exact=equal.all(axis=1),
        matched_prefix_tokens=_leading_true(equal),
        equal_positions_frac=equal.mean(axis=1),
        edit_distance_frac=distance,
        is_near_verbatim=1 - distance >= NEAR_VERBATIM_FRAC,
        teacher_forced_accuracy_frac=forced.mean(axis=1),
        extraction_strength_frac=_leading_true(forced[:, ::-1]) / length,
    )


def levenshtein(first_NT: Tokens, second_NT: Tokens) -> NDArray[np.int64]:
    """Count the insertions, deletions and substitutions between N pairs of sequences; shape (N,), tokens.

    A row of the table is finished at once: row[j] is the smallest row[i] + (j - i) over i <= j, which is a
    running minimum of row[i] - i.
    """
    num, length = second_NT.shape
    columns = np.arange(length + 1)
    row = np.broadcast_to(columns, (num, length + 1))
    for place in range(first_NT.shape[1]):
        substituted = row[:, :-1] + (first_NT[:, place, None] != second_NT)
        best = np.minimum(row[:, 1:] + 1, substituted)
        best = np.concatenate([np.full((num, 1), place + 1), best], axis=1)
        row = np.minimum.accumulate(best - columns, axis=1) + columns
    return np.asarray(row[:, -1], dtype=np.int64)


def _leading_true(flags_NT: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Length of the run of true at the start of every row, shape (N,)."""
    return np.asarray(np.logical_and.accumulate(flags_NT, axis=1).sum(axis=1), dtype=np.int64)
