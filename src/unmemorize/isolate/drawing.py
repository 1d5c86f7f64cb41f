"""How sinks are drawn for an id: integers only, so that device, dtype, process and batch layout cannot matter.

`draw` (scheme `keyed`) draws exactly k of the P sinks of a site for every id, all subsets equally likely, with Floyd's
algorithm for sampling without replacement: for j = P-k .. P-1, take t = h(id, j) mod (j + 1), or j itself if t was
taken before. h is a 64-bit mixer under a key made from the seed. The cost is k draws, whatever the pool's size.

`published_mask` is the hash of the MemSinks release (arXiv 2507.09937; facts in words only), kept for parity.

Source: Floyd's algorithm, Bentley and Floyd 1987; mixer constants, Stafford's variant 13; scheme `keyed` is ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from unmemorize.errors import IdError
from unmemorize.ids import ID_MAX

_PUBLISHED_BASE = 1588635695
_PUBLISHED_PRIME = 4294967291


def draw(ids: Tensor, key: int, num_pool: int, num_sinks: int) -> Tensor:
    """Draw `num_sinks` distinct sinks of `num_pool` for every id.

    Args:
        ids: shape (N,), int64.
        key: 64-bit key, as a signed integer.
        num_pool: sinks to draw from.
        num_sinks: sinks per id, at most `num_pool`.

    Returns:
        Shape (N, num_sinks), int64, in drawing order. All subsets are equally likely over keys and ids, up to the
        modulo bias of a 63-bit number (below 2**-40 for pools under 2**23).
    """
    start = mix(mix(ids ^ key) + key)
    steps = torch.arange(num_pool - num_sinks, num_pool, device=ids.device)
    numbers = (mix(start[:, None] + (steps + 1) * -0x61C8864680B583EB) & ID_MAX) % (steps + 1)
    drawn = torch.full_like(numbers, -1)
    for column, step in enumerate(range(num_pool - num_sinks, num_pool)):
        candidate = numbers[:, column]
        taken = (drawn[:, :column] == candidate[:, None]).any(1)
        drawn[:, column] = torch.where(taken, step, candidate)
    return drawn


def published_mask(
    ids: Tensor, num_pool: int, active_frac: float, *, id_bits: Literal[32, 64] = 64
) -> Tensor:
    """Compute the published MemSinks mask, defects included.

    Args:
        ids: shape (N,), int64.
        num_pool: sinks in the pool.
        active_frac: probability that a sink is on, 0..1.
        id_bits: integer width in which the release multiplies the id by 65,536.

    Returns:
        Shape (N, num_pool), bool.

    Source: the MemSinks release as described in words by third parties; checked against published digests.
    """
    powers: list[int] = []
    power = 1
    for _ in range(num_pool):
        powers.append(power % _PUBLISHED_PRIME)
        power = _signed64(power * _PUBLISHED_BASE)
    scaled = ids.to(torch.int32) * 65536 if id_bits == 32 else ids * 65536
    table = torch.tensor(powers, dtype=torch.int64, device=ids.device)
    numbers = (scaled.to(torch.int64)[:, None] * table).remainder(_PUBLISHED_PRIME)
    return numbers.to(torch.float64) / _PUBLISHED_PRIME < active_frac


def _signed64(number: int) -> int:
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def mix(numbers: Tensor) -> Tensor:
    """Mix 64-bit integers; multiplication wraps, and shifts are made logical by masking the sign bits."""
    numbers = (numbers ^ ((numbers >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ ((numbers >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return numbers ^ ((numbers >> 31) & 0x1FFFFFFFF)


def require_ids(ids: Tensor) -> None:
    """Refuse what is no ids: int64, shape (N,), each 1 or more.

    Raises:
        IdError: if they are not.
    """
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise IdError(f"ids are {ids.dtype} of shape {tuple(ids.shape)}, expected int64 of shape (N,)")
    if len(ids) and int(ids.min()) < 1:
        raise IdError(f"id {int(ids.min())} is out of range, expected 1 to 2**63 - 1; 0 means no id")


def require_sound_published_ids(ids: Tensor, id_bits: int) -> None:
    """Refuse ids at which the published hash wraps or gives every sink the same answer.

    Raises:
        IdError: if there is one.
    """
    limit = 1 << 15 if id_bits == 32 else 1 << 47
    bad = (ids >= limit) | (ids % _PUBLISHED_PRIME == 0)
    if bool(bad.any()):
        raise IdError(
            f"id {int(ids[bad][0])} wraps or is degenerate under the published hash with {id_bits}-bit ids, "
            f"expected 1 to {limit - 1}; use running indices, scheme keyed, or allow_degenerate"
        )
