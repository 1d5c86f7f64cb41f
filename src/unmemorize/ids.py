"""Ids: 63-bit integers that content, near-duplicate groups and named sources own. Torch-free.

    id = blake2b(digest_size=8, length of namespace, namespace, text) without its highest bit

so exact duplicates share an id without bookkeeping, on any machine, for ever. Ids fit signed 64-bit tensors; 0 is
never an id: it means "none" (padding, sinks off). Texts are hashed as they are: no normalization of Unicode, case or
white space, except where near duplicates are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from unmemorize.errors import ConfigError, missing_extra

ID_MAX = 2**63 - 1

_ROWS_PER_BAND = 4


def content_id(text: str, *, namespace: str = "") -> int:
    """Return the id of a text: 1 .. 2**63 - 1, equal for equal text in the same namespace."""
    head = namespace.encode("utf-8")
    data = len(head).to_bytes(8, "big") + head + text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") & ID_MAX or 1


def source_id(name: str) -> int:
    """Return the id of a named source (book, customer, site)."""
    return content_id(name, namespace="source")


def near_duplicate_ids(
    texts: Sequence[str],
    *,
    threshold_frac: float = 0.7,
    num_permutations: int = 128,
    shingle_words: int = 5,
    seed: int = 0,
) -> list[int]:
    """Give near duplicates one id: that of the group's member with the smallest content id.

    Texts are compared as sets of runs of `shingle_words` whitespace-separated words, case folded and otherwise
    unchanged (digits and punctuation count). Candidates come from MinHash with banding; groups are the connected
    components of pairs whose estimated Jaccard similarity reaches the threshold, so that its two most distant members
    may be less alike than the threshold.

    Args:
        texts: N documents.
        threshold_frac: Jaccard similarity from which two texts count as the same, 0..1; estimated with a standard
            error of about 0.5 / sqrt(num_permutations). Below about 0.4 some pairs are never compared.
        num_permutations: length of a signature; a multiple of 4.
        shingle_words: words per shingle; a shorter text is one shingle.
        seed: seed of the permutations.

    Returns:
        N ids, the same in any order of the texts.

    Raises:
        ConfigError: if a setting is out of range.
        MissingExtra: if rensa is not installed.

    Source: MinHash, Broder 1997; signatures and index by rensa. Grouping ours.
    """
    if not 0.0 < threshold_frac <= 1.0:
        raise ConfigError(f"threshold_frac is {threshold_frac}, expected above 0 and at most 1")
    if num_permutations < _ROWS_PER_BAND or num_permutations % _ROWS_PER_BAND:
        raise ConfigError(f"num_permutations is {num_permutations}, expected a multiple of {_ROWS_PER_BAND}")
    if shingle_words < 1:
        raise ConfigError(f"shingle_words is {shingle_words}, expected 1 or more")
    try:
        from rensa import RMinHash, RMinHashLSH
    except ImportError:
        raise missing_extra("rensa", "data") from None
    owns = [content_id(text) for text in texts]
    different = dict(zip(owns, texts, strict=True))
    index = RMinHashLSH(
        threshold=threshold_frac, num_perm=num_permutations, num_bands=num_permutations // _ROWS_PER_BAND
    )
    groups = Groups(different)
    signatures: dict[int, Any] = {}
    keys = list(different)
    for number, (key, text) in enumerate(different.items()):
        signature = RMinHash(num_perm=num_permutations, seed=seed)
        signature.update(_shingles(text, shingle_words))
        for other in map(keys.__getitem__, index.query(signature)):
            is_new = groups.canonical(key) != groups.canonical(other)
            if is_new and signature.jaccard(signatures[other]) >= threshold_frac:
                groups.join(key, other)
        index.insert(number, signature)
        signatures[key] = signature
    return [groups.canonical(own) for own in owns]


def _shingles(text: str, num_words: int) -> list[str]:
    words = text.casefold().split()
    return [" ".join(words[i : i + num_words]) for i in range(max(1, len(words) - num_words + 1))]


class Groups:
    """Disjoint sets of ids, each named by its smallest member."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._parent = {key: key for key in ids}

    def canonical(self, key: int) -> int:
        """Return the smallest id of the set that an id is in."""
        parent = self._parent
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    def join(self, first: int, second: int) -> None:
        """Unite the sets of two ids."""
        low, high = sorted((self.canonical(first), self.canonical(second)))
        self._parent[high] = low
