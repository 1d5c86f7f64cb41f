"""What remains of planted texts within a budget of perplexity: table and picture of what `planted_twin.py` measured.

    python recipes/planted_twin_table.py table RUN
    python recipes/planted_twin_table.py plot RUN [--only "random;gradient;contrast"] > curves.svg

An edit's row is, for each seed, the strongest removal whose perplexity on the watched half of the ordinary texts rises
by at most the budget; the rise shown is that of the other half.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from unmemorize.audit.statistics import bootstrap_mean, mean_over_seeds, wilson
from unmemorize.files import read_json_lines
from unmemorize.report import plots

BUDGETS = (0.02, 0.10)
CLOSED = ", closed"  # ends the rows of models with sinks
WORDS = "Drop of target extraction over rise of perplexity, means over seeds"


def is_trained(name: str) -> bool:
    """Tell rows of trained models from edits of the standard one."""
    return name in ("standard", "dedup") or name.endswith(CLOSED)


def rise(line: dict[str, Any], before: dict[str, Any], half: str) -> float:
    """Rise of perplexity on one half of the ordinary texts, as a share."""
    return math.expm1(line[f"{half}_nats"] - before[f"{half}_nats"])


def within(
    lines: list[dict[str, Any]], before: dict[int, dict[str, Any]], name: str, budget: float
) -> list[dict[str, Any]]:
    """Return one line for each seed that has this edit: the strongest removal in the budget, else the model before."""
    chosen = []
    for seed, start in before.items():
        mine = [line for line in lines if (line["seed"], line["edit"]) == (seed, name)]
        if not is_trained(name):
            fitting = [line for line in mine if rise(line, start, "watched") <= budget]
            mine = fitting or [start] * bool(mine)
        if mine:
            chosen.append(min(mine, key=lambda line: (sum(line["target_exact"]), line["watched_nats"])))
    return chosen


def table(run: Path) -> None:
    """Print the headline: for each budget and edit the strongest removal within it, pooled over seeds."""
    lines = read_json_lines(run / "edits.jsonl")
    before = {line["seed"]: line for line in lines if line["edit"] == "standard"}
    for budget in BUDGETS:
        print(f"\n### Perplexity of watched ordinary texts up by at most {budget:.0%}\n")
        heads = "edit | seeds | strengths | perplexity | target | over seeds | target, near | neighbour | held-out"
        print(f"| {heads} | target loss, nats | seconds | forward-equivalents |")
        print("| --- " * 12 + "|")
        for name in dict.fromkeys(line["edit"] for line in lines):
            chosen = within(lines, before, name, budget)
            if chosen:
                print(f"| {name} | {len(chosen)} | {cells(chosen, before)} |")
    print(
        "\n`dedup` is the twin that saw the repeated texts once; it and the model with sinks have no budget."
    )


def cells(chosen: list[dict[str, Any]], before: dict[int, dict[str, Any]]) -> str:
    """Write one row's figures: rates pooled over seeds with Wilson intervals, the rest as means over seeds."""

    def rate(key: str) -> str:
        flags = [flag for line in chosen for flag in line[key]]
        found = wilson(sum(flags), len(flags))
        low, high = found.ci95 or (math.nan, math.nan)
        return f"{sum(flags) / len(flags):.2f} [{low:.2f}, {high:.2f}]"

    strengths = ", ".join(
        "none" if line["edit"] == "standard" else f"{line['strength']:g}" for line in chosen
    )
    nats = bootstrap_mean([value for line in chosen for value in line["target_nats"]]).value
    rises = [rise(line, before[line["seed"]], "reported") for line in chosen]
    seconds = np.mean([line.get("seconds", 0.0) for line in chosen])
    passes = np.mean([line.get("forward_equivalents", 0.0) for line in chosen])
    counts = ", ".join(str(sum(line["target_exact"])) for line in chosen)
    over = mean_over_seeds([float(np.mean(line["target_exact"])) for line in chosen]).ci95
    spread = f"{counts} [{over[0]:.2f}, {over[1]:.2f}]" if over else counts
    near, neighbour, heldout = (rate(key) for key in ("target_near", "neighbour_exact", "heldout_exact"))
    rates = f"{rate('target_exact')} | {spread} | {near} | {neighbour} | {heldout}"
    return f"{strengths} | {np.mean(rises):+.1%} | {rates} | {nats:.2f} | {seconds:.1f} | {passes:,.0f}"


def curve(
    lines: list[dict[str, Any]], before: dict[int, dict[str, Any]], name: str
) -> list[tuple[float, float]]:
    """Return (rise of reported perplexity, drop of target extraction) by strength, means over seeds."""
    points = []
    for strength in sorted({line["strength"] for line in lines if line["edit"] == name}):
        mine = [line for line in lines if (line["edit"], line["strength"]) == (name, strength)]
        if {line["seed"] for line in mine} == set(before):
            drops = [
                np.mean(before[line["seed"]]["target_exact"]) - np.mean(line["target_exact"]) for line in mine
            ]
            rises = [rise(line, before[line["seed"]], "reported") for line in mine]
            points.append((float(np.mean(rises)), float(np.mean(drops))))
    return points


def plot(run: Path, only: Collection[str] = ()) -> str:
    """Draw the drop of extraction over the rise of perplexity: a line for each edit, a mark for each trained model.

    Only strengths that every seed has are drawn, and of edits only those named, if any are. Beyond 30 % of perplexity
    nothing is.
    """
    lines = read_json_lines(run / "edits.jsonl")
    before = {line["seed"]: line for line in lines if line["edit"] == "standard"}
    frame = plots.Box(52, 12, 470, 330)
    across = plots.Scale(-25, 30, frame.left, frame.right)
    up = plots.Scale(-0.05, 1.05, frame.bottom, frame.top)
    parts = [plots.vertical_grid(across, frame, 12, 6), plots.horizontal_grid(up, frame, 12, 6, gap=6)]
    names = [name for name in dict.fromkeys(line["edit"] for line in lines) if name != "standard"]
    names = [name for name in names if not only or is_trained(name) or name in only]
    row = 0
    for name in names:
        points = [(across(100 * x), up(y)) for x, y in curve(lines, before, name) if -0.25 <= x <= 0.3]
        if not points:
            continue
        color = f"hsl({360 * row / len(names):.0f} 70% {(32, 48)[row % 2]}%)"
        drawn = [plots.mark("diamond" if is_trained(name) else "circle", x, y, 3.5, "") for x, y in points]
        if not is_trained(name):
            drawn.append(plots.polyline([(across(0), up(0)), *points], "line"))
        y = frame.top + 14 + 20 * row
        drawn.append(plots.mark("circle", frame.right + 18, y - 4, 4, ""))
        drawn.append(plots.tag("text", name, x=frame.right + 28, y=y))
        parts.append(plots.tag("g", plots.join(drawn), style=f"fill:{color};stroke:{color}", class_="method"))
        row += 1
    parts.append(plots.tag("text", "rise of perplexity, %", x=190, y=frame.bottom + 38))
    parts.append(plots.tag("text", "drop of targets recited", x=-240, y=14, transform="rotate(-90)"))
    style = plots.tag(
        "style",
        "text{font:12px sans-serif;stroke:none}.line{fill:none}.grid{stroke:#ddd}"
        ".end{text-anchor:end}.middle{text-anchor:middle}",
    )
    svg = plots.picture(
        650, 380, plots.join([style, *parts]), ident="curves", title="Removal at a price", description=WORDS
    )
    return str(svg).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)


def main() -> None:
    """Print the tables or the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("table", "plot"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", default="", help="edits to draw, separated by semicolons")
    arguments = parser.parse_args()
    if arguments.command == "plot":
        print(plot(arguments.run, [name.strip() for name in arguments.only.split(";") if name.strip()]))
    else:
        table(arguments.run)


if __name__ == "__main__":
    main()
