"""Slow, literal figures of pictures, prompt by prompt and pair by pair. The fast ones must agree with these."""

from __future__ import annotations

from statistics import fmean, median

import numpy as np

Vectors = list[list[np.ndarray]]  # prompt, seed


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    norm = float(np.sqrt((first**2).sum()) * np.sqrt((second**2).sum()))
    return sum(float(a) * float(b) for a, b in zip(first, second, strict=True)) / norm


def copy_similarity(made: Vectors, references: list[list[np.ndarray]]) -> list[list[float]]:
    """For each prompt and seed the largest similarity to a training picture."""
    return [
        [max(cosine(picture, reference) for reference in own) for picture in pictures]
        for pictures, own in zip(made, references, strict=True)
        if own
    ]


def copy_rate(copies: list[list[float]], threshold: float) -> float:
    return sum(1 for row in copies if max(row) >= threshold) / len(copies)


def copy_rate_per_picture(copies: list[list[float]], threshold: float) -> float:
    flat = [value for row in copies for value in row]
    return sum(1 for value in flat if value >= threshold) / len(flat)


def kept_similarity(made: Vectors, before: Vectors) -> float:
    return fmean(
        median(cosine(a, b) for a, b in zip(now, earlier, strict=True))
        for now, earlier in zip(made, before, strict=True)
    )


def seed_similarity(made: Vectors) -> float:
    return fmean(
        median(
            cosine(pictures[i], pictures[j])
            for i in range(len(pictures))
            for j in range(i + 1, len(pictures))
        )
        for pictures in made
    )


def area_under_curve(memorized: list[float], ordinary: list[float]) -> float:
    wins = 0.0
    for high in memorized:
        for low in ordinary:
            wins += 1.0 if high > low else 0.5 if high == low else 0.0
    return wins / (len(memorized) * len(ordinary))


def true_positive_rate(memorized: list[float], ordinary: list[float], rate: float) -> float:
    """The largest share of memorized scores above any threshold that at most `rate` of ordinary ones exceed."""
    best = 0.0
    for threshold in [*ordinary, *memorized]:
        if sum(1 for score in ordinary if score > threshold) <= rate * len(ordinary):
            best = max(best, sum(1 for score in memorized if score > threshold) / len(memorized))
    return best
