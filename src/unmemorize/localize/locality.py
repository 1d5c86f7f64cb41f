"""Do triggers of one picture share neurons, and triggers of different pictures not? Overlaps beside random sets.

The overlap of two sets A and B is |A and B| / |A or B|, over all sites, two neurons being equal where site and index
are. Raw overlaps mislead: two large sets overlap by chance, and two empty ones are no agreement at all. So empty sets
are left out, and each pair is also drawn anew: random sets of the same sizes at each site.

Source: Jaccard 1901; the comparison within and across pictures is ours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from unmemorize.neurons import NeuronSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Locality:
    """Overlaps, 0..1, unitless, one value a group of sets: the mean over its pairs.

    Attributes:
        within: pairs inside a group; groups with fewer than two sets that are not empty have none.
        across: pairs of one set of the group and one of another group.
        within_random: as `within`, for random sets of the same sizes at each site.
        across_random: as `across`, likewise.
        num_empty: sets that were left out because they are empty.
    """

    within: tuple[float, ...]
    across: tuple[float, ...]
    within_random: tuple[float, ...]
    across_random: tuple[float, ...]
    num_empty: int


def locality(sets: Sequence[NeuronSet], groups: Sequence[Sequence[int]], *, seed: int = 0) -> Locality:
    """Compare the overlap of sets within groups with the overlap across groups.

    Args:
        sets: N neuron sets of one model.
        groups: rows of `sets` that belong together, such as the prompts of one picture; each row in one group.
        seed: seed of the random sets.
    """
    generator = random.Random(seed)
    full = [[sets[row] for row in group if len(sets[row])] for group in groups]
    inside = [list(combinations(group, 2)) for group in full]
    outside = [
        [
            (one, other)
            for one in group
            for place, rest in enumerate(full)
            if place != number
            for other in rest
        ]
        for number, group in enumerate(full)
    ]
    return Locality(
        within=tuple(_means(inside)),
        across=tuple(_means(outside)),
        within_random=tuple(_means(inside, generator)),
        across_random=tuple(_means(outside, generator)),
        num_empty=sum(not len(sets[row]) for group in groups for row in group),
    )


def overlap(first: NeuronSet, second: NeuronSet) -> float:
    """Return |A and B| / |A or B|, 0..1; 0 for two empty sets.

    Raises:
        NeuronSetMismatch: if they belong to different models.
    """
    either = len(first | second)
    return len(first & second) / either if either else 0.0


def _means(
    pairs_by_group: Sequence[Sequence[tuple[NeuronSet, NeuronSet]]], generator: random.Random | None = None
) -> Iterator[float]:
    """Yield the mean overlap of each group that has pairs, of random sets in their place if there is a generator."""
    for pairs in pairs_by_group:
        if pairs:
            chosen = (
                pairs
                if generator is None
                else [(_drawn(a, generator), _drawn(b, generator)) for a, b in pairs]
            )
            yield sum(overlap(a, b) for a, b in chosen) / len(chosen)


def _drawn(chosen: NeuronSet, generator: random.Random) -> NeuronSet:
    """Draw as many neurons at each site, any of them."""
    nothing = NeuronSet(chosen.model_id, {})
    return chosen.placebo(seed=generator.getrandbits(63), outside=nothing)
