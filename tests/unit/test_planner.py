"""The planner's formulas against counting drawn sinks, and its refusals."""

from __future__ import annotations

import pytest

from unmemorize.errors import ConfigError, PoolExhausted
from unmemorize.isolate.planner import forecast, simulate


@pytest.mark.parametrize(
    ("num_pool", "num_sinks", "num_deletions"),
    [(7692, 100, 50), (2000, 64, 5), (500, 150, 3), (64, 64, 1)],
)
def test_formula_agrees_with_counting(num_pool: int, num_sinks: int, num_deletions: int) -> None:
    sizes = {
        "num_pool": num_pool,
        "num_sinks": num_sinks,
        "num_sources": 3000,
        "num_deletions": num_deletions,
    }
    expected = forecast(**sizes)
    counted = simulate(**sizes, seed=3)
    assert counted.shared_sinks == pytest.approx(expected.shared_sinks, rel=0.05)
    assert counted.collateral_frac == pytest.approx(expected.collateral_frac, abs=0.02)
    assert counted.pool_lost_frac == pytest.approx(expected.pool_lost_frac, abs=0.03)
    assert counted.worst_collateral_frac >= counted.collateral_frac


def test_formula_agrees_with_the_published_hash() -> None:
    sizes = {"num_pool": 1229, "num_sinks": 369, "num_sources": 2000, "num_deletions": 2}
    expected = forecast(**sizes, scheme="published")
    counted = simulate(**sizes, scheme="published")
    assert counted.shared_sinks == pytest.approx(expected.shared_sinks, rel=0.05)


def test_released_pool_saturates_as_reported() -> None:
    """The released NULLs pool: 12 % lost after 10 deletions, 48 % after 50, 73 % after 100, 99.8 % after 500."""
    for deletions, lost in ((10, 0.12), (50, 0.48), (100, 0.73), (500, 0.998)):
        result = forecast(num_pool=7692, num_sinks=100, num_sources=6_407_814, num_deletions=deletions)
        assert result.pool_lost_frac == pytest.approx(lost, abs=0.006)


def test_largest_safe_number_is_the_last_within_tolerance() -> None:
    sizes = {"num_pool": 4096, "num_sinks": 64, "num_sources": 10_000}
    safe = forecast(**sizes, num_deletions=0, tolerance_frac=0.1).max_safe_deletions
    assert forecast(**sizes, num_deletions=safe).collateral_frac <= 0.1
    assert forecast(**sizes, num_deletions=safe + 1).collateral_frac > 0.1


def test_disjoint_slices_never_touch_survivors() -> None:
    sizes = {"num_pool": 4000, "num_sinks": 20, "num_sources": 200, "num_deletions": 20}
    expected = forecast(**sizes, scheme="disjoint")
    counted = simulate(**sizes, scheme="disjoint")
    assert expected.max_safe_deletions == 200
    assert counted.worst_collateral_frac == expected.collateral_frac == 0.0
    assert counted.pool_lost_frac == pytest.approx(expected.pool_lost_frac)
    with pytest.raises(PoolExhausted, match="it holds 200 sources"):
        forecast(**{**sizes, "num_sources": 201}, scheme="disjoint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_sinks": 5000}, "an id cannot own 5000 sinks of a pool of 4096"),
        ({"num_deletions": 11}, "11 deletions of 10 sources"),
        ({"num_sources": 0}, "deletions of 0 sources"),
        ({"tolerance_frac": 1.0}, "tolerance is 1.0"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, float], message: str) -> None:
    sizes = {"num_pool": 4096, "num_sinks": 64, "num_sources": 10, "num_deletions": 1}
    with pytest.raises(ConfigError, match=message):
        forecast(**{**sizes, **change})
