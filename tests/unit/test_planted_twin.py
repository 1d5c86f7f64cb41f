"""The recipe that compares edits on models of known memory: what its table chooses and what its picture draws."""

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

RECIPE = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "planted_twin_table.py"))


def line(seed: int, edit: str, strength: float, recited: int, perplexity_frac: float) -> dict[str, Any]:
    nats = 3.0 + math.log1p(perplexity_frac)
    return {
        "seed": seed,
        "edit": edit,
        "strength": strength,
        "target_exact": [1] * recited + [0] * (4 - recited),
        "watched_nats": nats,
        "reported_nats": nats,
    }


LINES = [
    line(0, "standard", 0, 4, 0),
    line(1, "standard", 0, 4, 0),
    line(0, "sinks, closed", 0, 0, 0.2),
    line(0, "fold", 0.1, 2, 0.01),
    line(0, "fold", 0.2, 0, 0.05),
    line(1, "fold", 0.1, 4, 0.04),
]
BEFORE = {one["seed"]: one for one in LINES if one["edit"] == "standard"}


@pytest.mark.parametrize(
    ("name", "budget", "expected"),
    [
        ("fold", 0.02, [("fold", 0.1), ("standard", 0)]),
        ("fold", 0.1, [("fold", 0.2), ("fold", 0.1)]),
        ("sinks, closed", 0.02, [("sinks, closed", 0)]),
    ],
)
def test_table_takes_strongest_edit_within_budget(
    name: str, budget: float, expected: list[tuple[str, float]]
) -> None:
    chosen = RECIPE["within"](LINES, BEFORE, name, budget)
    assert [(one["edit"], one["strength"]) for one in chosen] == expected


def test_curve_draws_only_strengths_of_every_seed() -> None:
    ((rise, drop),) = RECIPE["curve"](LINES, BEFORE, "fold")
    assert rise == pytest.approx(0.025) and drop == pytest.approx(0.25)
