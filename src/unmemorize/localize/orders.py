"""In which order a search tries candidates. Pure mathematics; knows no model.

- by how unusual a neuron is: absolute z-score, then largest activation (the candidates of NeMo, put in a row);
- by slope: how much of the memory a neuron holds to first order, all neurons of the sites, z-scores as tie-break.

What is unusual need not matter, and a slope needs a backward pass; `smallest` in `search.py` takes either.

Source: the candidates are those of Hintersdorf et al. 2024; putting them in a row, and the slopes, are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from unmemorize.localize.search import CandidateSet, Neuron


def importance_order(sets: Iterator[CandidateSet], z: Sequence[Tensor]) -> list[Neuron]:
    """Order all candidates: unusual ones by absolute z-score, largest first, then the rest as the sets grow."""
    sets_seen = list(sets)
    theta = min(candidates.theta for candidates in sets_seen)
    unusual = [
        (abs(float(value)), layer, index)
        for layer, scores in enumerate(z)
        for index, value in enumerate(scores.tolist())
        if abs(value) > theta
    ]
    order = [(layer, index) for _, layer, index in sorted(unusual, key=lambda entry: (-entry[0], *entry[1:]))]
    for candidates in sets_seen:
        order += [(layer, index) for layer, chosen in enumerate(candidates.entries) for index in chosen]
    return list(dict.fromkeys(order))


def slope_order(slopes: Sequence[Tensor], z: Sequence[Tensor]) -> list[Neuron]:
    """Order all neurons by slope, largest first; equal ones by absolute z-score, then by place.

    Args:
        slopes: change of the memory per openness of the neuron, shape (F,) per site, unitless.
        z: z-scores, same shapes, in standard deviations.
    """
    keyed = [
        (-slope, -abs(unusual), layer, index)
        for layer, (some, scores) in enumerate(zip(slopes, z, strict=True))
        for index, (slope, unusual) in enumerate(zip(some.tolist(), scores.tolist(), strict=True))
    ]
    return [(layer, index) for _, _, layer, index in sorted(keyed)]
