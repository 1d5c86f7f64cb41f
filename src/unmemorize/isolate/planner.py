"""What a plan promises before anything is trained: overlap, collateral damage, and how many deletions it survives.

For ids that own k of P sinks each, drawn independently (schemes keyed and published, with p = k / P):

    sinks shared by two ids             k * k / P
    share of a survivor's sinks, and of the pool, closed by K deletions      1 - (1 - p) ** K

For disjoint slices both overlaps are 0, K deletions close K * k / P of the pool, and P // k sources fit. Expected
values are exact; `simulate` draws real sinks from a plan, so that the two can be compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from unmemorize.errors import ConfigError, PoolExhausted
from unmemorize.isolate.plan import Scheme, SinkPlan, SinkSite
from unmemorize.neurons import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What to expect of a plan; all values are expectations over the hash.

    Attributes:
        shared_sinks: sinks that two ids have in common, count.
        owners_per_sink: ids that own one sink, count.
        collateral_frac: share of a surviving id's sinks that the deletions close, 0..1.
        pool_lost_frac: share of the pool that the deletions close, 0..1.
        max_safe_deletions: most deletions that keep `collateral_frac` within the tolerance; for disjoint slices the
            number of sources.
        tolerance_frac: that tolerance, 0..1.
    """

    shared_sinks: float
    owners_per_sink: float
    collateral_frac: float
    pool_lost_frac: float
    max_safe_deletions: int
    tolerance_frac: float


def forecast(
    *,
    num_pool: int,
    num_sinks: int,
    num_sources: int,
    num_deletions: int,
    tolerance_frac: float = 0.1,
    scheme: Scheme = "keyed",
) -> Forecast:
    """Work out what a plan of this size does to the sources that stay when some are deleted.

    Args:
        num_pool: sinks per site, P.
        num_sinks: sinks per id and site, k; the expected number under the published scheme.
        num_sources: ids that train.
        num_deletions: ids whose sinks are closed for good, at most `num_sources`.
        tolerance_frac: largest share of a survivor's sinks that may be lost, 0..1.
        scheme: how sinks are drawn.

    Raises:
        ConfigError: if a number is out of range.
        PoolExhausted: if disjoint slices do not fit the pool.

    Source: ours; the 48 % at K = 50 and 99.8 % at K = 500 of the released NULLs pool (P 7692, k 100) agree with it.
    """
    if not 1 <= num_sinks <= num_pool:
        raise ConfigError(
            f"an id cannot own {num_sinks} sinks of a pool of {num_pool}; expected 1 to the pool's size"
        )
    if num_sources < 1 or not 0 <= num_deletions <= num_sources:
        raise ConfigError(
            f"{num_deletions} deletions of {num_sources} sources; expected 0 up to the number of sources"
        )
    if not 0.0 <= tolerance_frac < 1.0:
        raise ConfigError(f"tolerance is {tolerance_frac}, expected a share from 0 to below 1")
    if scheme == "disjoint":
        if num_sources * num_sinks > num_pool:
            raise PoolExhausted(
                f"{num_sources} disjoint slices of {num_sinks} sinks need {num_sources * num_sinks}, the pool has "
                f"{num_pool}: it holds {num_pool // num_sinks} sources; grow the pool or use fewer sinks per id"
            )
        lost = num_deletions * num_sinks / num_pool
        return Forecast(
            shared_sinks=0.0,
            owners_per_sink=num_sources * num_sinks / num_pool,
            collateral_frac=0.0,
            pool_lost_frac=lost,
            max_safe_deletions=num_sources,
            tolerance_frac=tolerance_frac,
        )
    active = num_sinks / num_pool
    closed = 1.0 - (1.0 - active) ** num_deletions
    safe = 0 if active == 1.0 else math.floor(math.log1p(-tolerance_frac) / math.log1p(-active) + 1e-12)
    return Forecast(
        shared_sinks=num_sinks * active,
        owners_per_sink=num_sources * active,
        collateral_frac=closed,
        pool_lost_frac=closed,
        max_safe_deletions=min(safe, num_sources),
        tolerance_frac=tolerance_frac,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """The same quantities counted on drawn sinks, and the unluckiest survivor.

    Attributes:
        shared_sinks, collateral_frac, pool_lost_frac: means, as in `Forecast`.
        worst_collateral_frac: largest share of its sinks that any survivor lost.
        num_survivors: survivors that were looked at.
    """

    shared_sinks: float
    collateral_frac: float
    pool_lost_frac: float
    worst_collateral_frac: float
    num_survivors: int


def simulate(
    *,
    num_pool: int,
    num_sinks: int,
    num_sources: int,
    num_deletions: int,
    scheme: Scheme = "keyed",
    seed: int = 0,
    max_survivors: int = 2000,
) -> Simulation:
    """Draw the sinks of running ids under a plan, delete some, and count.

    Args:
        num_pool: sinks per site, P.
        num_sinks: sinks per id and site, k.
        num_sources: ids that train.
        num_deletions: ids whose sinks are closed for good.
        scheme: how sinks are drawn.
        seed: seed of the plan.
        max_survivors: survivors to look at, to bound the time.
    """
    place = SinkSite(Site("simulated", "in", num_pool), 0, num_sinks)
    plan = SinkPlan("simulated", scheme, seed, (place,), active_frac=num_sinks / num_pool)
    num_survivors = min(num_sources - num_deletions, max_survivors)
    ids = torch.arange(1, num_deletions + num_survivors + 1)
    if scheme == "disjoint":
        plan = plan.with_sources(tuple(ids.tolist()))
    masks = plan.mask(ids)
    closed = masks[:num_deletions].any(0)
    survivors = masks[num_deletions:]
    owned = survivors.sum(1).clamp(min=1)
    lost = (survivors & closed).sum(1) / owned
    common = (masks[:-1] & masks[1:]).sum(1).float() if len(masks) > 1 else torch.zeros(1)
    return Simulation(
        shared_sinks=common.mean().item(),
        collateral_frac=lost.mean().item() if num_survivors else 0.0,
        pool_lost_frac=closed.float().mean().item(),
        worst_collateral_frac=lost.max().item() if num_survivors else 0.0,
        num_survivors=num_survivors,
    )
