"""Ids: 63-bit integers that content, near-duplicate groups and named sources own. Torch-free.

    id = blake2b_64(namespace, content) with the sign bit cleared

so exact duplicates share an id without bookkeeping, on any machine, for ever. Ids fit signed 64-bit tensors; 0 is
never an id: it means "none" (padding, sinks off).
"""

from __future__ import annotations

import hashlib

ID_MAX = 2**63 - 1


def content_id(text: str, *, namespace: str = "") -> int:
    """Return the id of a text: 1 .. 2**63 - 1, equal for equal text in the same namespace."""
    head = namespace.encode("utf-8")
    data = len(head).to_bytes(8, "big") + head + text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") & ID_MAX or 1


def source_id(name: str) -> int:
    """Return the id of a named source (book, customer, site)."""
    return content_id(name, namespace="source")
