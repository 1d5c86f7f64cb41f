"""Which prompts belong together: near duplicates in words, or prompts of near-duplicate pictures. Knows no model.

    alike   Jaccard similarity of word sets reaches a threshold, or the pictures are alike
    group   connected components of alike pairs

Prompts are short, so that pairs are compared exactly; only pairs that share a word are. For long texts see
`near_duplicate_ids` in `ids.py`, which estimates.

Source: grouping prompts before localization follows NeMo-C (Di et al. 2025); the rule is ours.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from unmemorize.errors import ConfigError, ShapeMismatch

_WORD = re.compile(r"\w+")


def clusters(
    prompts: Sequence[str],
    *,
    threshold_frac: float = 0.5,
    shingle_words: int = 1,
    picture_similarity: Sequence[Sequence[float]] | None = None,
    picture_threshold: float = 0.7,
    picture_hashes: Sequence[int] | None = None,
    hash_bits: int = 6,
) -> list[tuple[str, ...]]:
    """Group near-duplicate prompts.

    Groups are chains: two members that are far apart can be joined by those between them.

    Args:
        prompts: N prompts; repeated ones count once.
        threshold_frac: Jaccard similarity of the prompts' word runs from which two are alike, above 0 and at most 1.
        shingle_words: words per run; a shorter prompt is one run. Case and punctuation do not count.
        picture_similarity: similarity of the prompts' training pictures, N x N, unitless; above `picture_threshold` two
            prompts are alike whatever their words.
        picture_threshold: see there.
        picture_hashes: perceptual hashes of the training pictures, N integers; two that differ in at most `hash_bits`
            bits are alike.
        hash_bits: see there, in bits.

    Returns:
        Groups in order of their first prompt, members in order; every prompt is in exactly one.

    Raises:
        ConfigError: if a setting is out of range.
        ShapeMismatch: if similarities or hashes are not one per prompt.
    """
    if not 0.0 < threshold_frac <= 1.0 or shingle_words < 1 or hash_bits < 0:
        raise ConfigError(
            f"threshold_frac {threshold_frac}, shingle_words {shingle_words}, hash_bits {hash_bits}; expected above 0 "
            "and at most 1, 1 or more, 0 or more"
        )
    _require_lengths(len(prompts), picture_similarity, picture_hashes)
    parent = list(range(len(prompts)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def join(first: int, second: int) -> None:
        low, high = sorted((root(first), root(second)))
        parent[high] = low

    for first, second in _alike_words([_runs(prompt, shingle_words) for prompt in prompts], threshold_frac):
        join(first, second)
    for first in range(len(prompts)):
        for second in range(first):
            near = picture_similarity is not None and picture_similarity[first][second] > picture_threshold
            if picture_hashes is not None:
                near |= (picture_hashes[first] ^ picture_hashes[second]).bit_count() <= hash_bits
            if near:
                join(first, second)
    grouped: dict[int, dict[str, None]] = defaultdict(dict)
    for number, prompt in enumerate(prompts):
        grouped[root(number)][prompt] = None
    return [tuple(members) for members in grouped.values()]


def _alike_words(runs: Sequence[frozenset[str]], threshold_frac: float) -> Iterator[tuple[int, int]]:
    """Yield pairs whose Jaccard similarity reaches the threshold, by way of the runs they share."""
    holders: dict[str, list[int]] = defaultdict(list)
    for number, own in enumerate(runs):
        shared: dict[int, int] = defaultdict(int)
        for run in own:
            for other in holders[run]:
                shared[other] += 1
            holders[run].append(number)
        for other, count in shared.items():
            if count >= threshold_frac * (len(own) + len(runs[other]) - count):
                yield other, number


def _runs(prompt: str, num_words: int) -> frozenset[str]:
    words = _WORD.findall(prompt.casefold()) or [prompt]
    return frozenset(" ".join(words[i : i + num_words]) for i in range(max(1, len(words) - num_words + 1)))


def _require_lengths(
    count: int, similarity: Sequence[Sequence[float]] | None, hashes: Sequence[int] | None
) -> None:
    if similarity is not None and (len(similarity) != count or any(len(one) != count for one in similarity)):
        raise ShapeMismatch(
            f"picture_similarity is not {count} x {count}; pass one row and one column per prompt"
        )
    if hashes is not None and len(hashes) != count:
        raise ShapeMismatch(f"{len(hashes)} picture_hashes for {count} prompts; pass one per prompt")
