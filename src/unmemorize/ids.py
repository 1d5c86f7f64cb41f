"""Ids: 63-bit integers that content, near-duplicate groups and named sources own. Torch-free.

    id = blake2b_64(namespace, content) with the sign bit cleared

so exact duplicates share an id without bookkeeping, on any machine, for ever. Ids fit signed 64-bit tensors; 0 is
never an id: it means "none" (padding, sinks off).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from unmemorize.errors import ConfigError, missing_extra

ID_MAX = 2**63 - 1


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
    unchanged (digits and punctuation count). Candidates come from MinHash with banding (rensa); groups are connected
    components of pairs whose estimated Jaccard similarity reaches the threshold.

    Args:
        texts: N documents.
        threshold_frac: Jaccard similarity from which two texts count as the same, 0..1.
        num_permutations: length of a signature; divisible by 16.
        shingle_words: words per shingle; shorter texts are one shingle.
        seed: seed of the permutations.

    Returns:
        N ids, independent of the order of the texts.

    Raises:
        ConfigError: if the threshold is not in (0, 1].
        MissingExtra: if rensa is not installed.
    """
    if not 0.0 < threshold_frac <= 1.0:
        raise ConfigError(f"threshold_frac is {threshold_frac}, expected above 0 and at most 1")
    try:
        from rensa import RMinHash, RMinHashLSH
    except ImportError:
        raise missing_extra("rensa", "data") from None
    index = RMinHashLSH(threshold=threshold_frac, num_perm=num_permutations, num_bands=num_permutations // 4)
    parent = list(range(len(texts)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    signatures = []
    for number, text in enumerate(texts):
        signature = RMinHash(num_perm=num_permutations, seed=seed)
        signature.update(_shingles(text, shingle_words))
        for other in index.query(signature):
            if signature.jaccard(signatures[other]) >= threshold_frac:
                parent[root(number)] = root(other)
        index.insert(number, signature)
        signatures.append(signature)
    smallest: dict[int, int] = {}
    for number, text in enumerate(texts):
        group = root(number)
        smallest[group] = min(smallest.get(group, ID_MAX), content_id(text))
    return [smallest[root(number)] for number in range(len(texts))]


def _shingles(text: str, num_words: int) -> list[str]:
    words = text.casefold().split()
    return [" ".join(words[i : i + num_words]) for i in range(max(1, len(words) - num_words + 1))]
