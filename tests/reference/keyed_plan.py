"""Literal reference of the keyed draw: plain Python integers, every 64-bit step written out. Slow on purpose.

    key      = blake2b-64 of "unmemorize.keyed.1:{seed}:{site or nothing}:{pool}:{k}", big-endian
    start    = mix(mix(id xor key) + key)
    h(j)     = mix(start + (j + 1) * 0x9E3779B97F4A7C15) without its highest bit
    Floyd    : for j = pool - k .. pool - 1, take h(j) mod (j + 1), or j if that was taken before

`python -m tests.reference.keyed_plan FILE` writes the golden file; it is pinned, and changing it is a breaking change.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import TypedDict

WORD = 0xFFFFFFFFFFFFFFFF
GOLDEN = Path(__file__).parents[1] / "golden" / "plan_keyed.json"


class Case(TypedDict):
    """One pinned draw; `site` is None when all sites share one."""

    seed: int
    id: int
    site: int | None
    pool: int
    k: int
    sinks: list[int]


def mix(number: int) -> int:
    """Stafford's variant 13 of the 64-bit finalizer."""
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & WORD
    return number ^ (number >> 31)


def draw(seed: int, id: int, site: int | None, pool: int, k: int) -> list[int]:
    """Return the k sinks of an id in drawing order."""
    text = f"unmemorize.keyed.1:{seed}:{'' if site is None else site}:{pool}:{k}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    start = mix((mix(id ^ key) + key) & WORD)
    drawn: list[int] = []
    for j in range(pool - k, pool):
        number = mix((start + (j + 1) * 0x9E3779B97F4A7C15) & WORD) & (WORD >> 1)
        candidate = number % (j + 1)
        drawn.append(j if candidate in drawn else candidate)
    return drawn


def cases() -> list[Case]:
    """Draw the cases that the golden file pins."""
    ids = (1, 2, 3, 65_536, 2**31 - 1, 2**31, 2**32, 2**48 + 1, 0x1234_5678_9ABC_DEF0, 2**63 - 1)
    layouts = ((7, 3), (12, 12), (64, 1), (1229, 8), (3840, 16))
    rows: list[Case] = []
    for seed, site, (pool, k), id in itertools.product((0, 2**40), (None, 5), layouts, ids):
        sinks = draw(seed, id, site, pool, k)
        rows.append({"seed": seed, "id": id, "site": site, "pool": pool, "k": k, "sinks": sinks})
    return rows


if __name__ == "__main__":
    lines = ",\n".join(f"  {json.dumps(row)}" for row in cases())
    Path(sys.argv[1] if len(sys.argv) > 1 else GOLDEN).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
