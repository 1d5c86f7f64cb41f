"""The states in which a model with sinks is measured or generates: off, own, foreign, all.

    off       the pool is closed
    own       each row's own sinks are open
    foreign   the sinks of another id, the placebo of own
    all       every sink at the share of ids that own it (its expected value in training)

A state becomes a table of gates per site; which rows of a batch use which row of the table is left to the payload.
Nothing here knows a model.

Source: MemSinks release as described in words by third parties (`all`, rescaling); foreign and exclusion are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, IdsMissing
from unmemorize.isolate.layers import Gates, check_ids, distinct, pool_gates
from unmemorize.isolate.plan import SinkPlan

State = Literal["off", "own", "foreign", "all"]
Rescale = Literal["none", "published", "mass"]


def state_gates(
    plan: SinkPlan,
    state: State,
    fixed: Tensor | None,
    exclude: tuple[int, ...],
    candidates: Tensor | None,
    rescale: Rescale,
) -> Callable[[Tensor | None, bool], Gates]:
    """Return the function that turns a call's sink ids into the gates of a state.

    Args:
        plan: the plan.
        state: off, own, foreign or all.
        fixed: ids for calls that carry none, shape (B,) or (B, T), int64.
        exclude: ids whose sinks are closed on top of the state, also where another id shares them.
        candidates: for foreign: ids to choose from, shape (M,).
        rescale: multiplier of shared neurons, see `rescale_factor`.

    Returns:
        (ids of the call or None, whether the model trains) -> gates. It raises `IdsMissing` if the state needs ids.

    Raises:
        ConfigError: if the state is unknown.
    """
    if state not in ("off", "own", "foreign", "all"):
        raise ConfigError(f"unknown state {state!r}; expected off, own, foreign or all")

    def encode(ids: Tensor | None, training: bool) -> Gates:
        ids = fixed if ids is None else ids
        if state in ("off", "all"):
            owners, index = torch.zeros(1, dtype=torch.int64), None
        elif ids is None:
            raise IdsMissing(f"state {state!r} needs ids; pass ids= to sink_state or sink_ids= to the call")
        else:
            owners, index = distinct(check_ids(ids))
            if state == "foreign":
                owners = torch.where(owners > 0, plan.foreign_ids(owners.clamp(min=1), candidates), 0)
        return Gates(_tables(plan, state, owners, exclude, rescale), index)

    return encode


def rescale_factor(plan: SinkPlan, rescale: Rescale) -> float:
    """Return the multiplier of shared neurons, unitless (g and p are those of the plan's first site).

    "none" is 1, "published" (g + p) / g as in the release's state off, "mass" (g + (1 - g) p) / g.

    Raises:
        ConfigError: if the name is unknown.
    """
    place = plan.sites[0]
    share = place.num_shared / place.site.width
    active = plan.active_frac if plan.active_frac is not None else place.num_sinks / place.num_pool
    factors = {"none": 1.0, "published": (share + active) / share if share else 1.0}
    factors["mass"] = (share + (1 - share) * active) / share if share else 1.0
    if rescale not in factors:
        raise ConfigError(f"unknown rescale {rescale!r}; expected none, published or mass")
    return factors[rescale]


def _tables(
    plan: SinkPlan, state: State, owners: Tensor, exclude: tuple[int, ...], rescale: Rescale
) -> list[Tensor]:
    tables = pool_gates(plan, owners, shared_scale=rescale_factor(plan, rescale))
    closed_ids = torch.tensor(exclude, dtype=torch.int64, device=owners.device)
    for number, place in enumerate(plan.sites):
        if number and tables[number] is tables[0]:
            continue
        pool = tables[number][:, place.num_shared :]
        if state == "all":
            pool.copy_(plan.ownership_frac(number))
        if exclude:
            pool[:, plan.mask(closed_ids, number).any(0)] = 0.0
    return tables
