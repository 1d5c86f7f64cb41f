"""Tables of what `picture_sinks.py` measured: means over testbeds with t intervals.

    python recipes/picture_sinks_table.py RUNS                 a row a model and state
    python recipes/picture_sinks_table.py RUNS --by variant    a row a variant of sinks: open, closed, another's

Validation losses are compared with the standard model of the same testbed, over all four quarters of the noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unmemorize.audit.statistics import mean_over_seeds
from unmemorize.files import read_json_lines
from unmemorize.testbeds.verification import COPY_ERROR

Line = dict[str, Any]


def copies(line: Line, kind: str = "errors") -> float:
    """Share of the pictures made whose error is that of a copy."""
    return float(np.mean(np.array(line[kind]) <= COPY_ERROR))


def similarity(line: Line) -> float:
    """Mean similarity of the best of four pictures."""
    return float(np.mean(line["similarity"]))


def attacked(lines: Sequence[Line]) -> str:
    """Similarity of what the attack found, over the testbeds where one was made."""
    return over([float(np.mean(line["attacked"])) for line in lines if line["attacked"]])


def validation(lines: Sequence[Line], standard: dict[str, Line]) -> str:
    """Change of the validation loss against standard training, percent."""
    pairs = [(line["validation_losses"], standard[line["testbed"]]["validation_losses"]) for line in lines]
    return over([100 * float(np.mean(own) / np.mean(other) - 1) for own, other in pairs], 1, " %")


def by_state(lines: Sequence[Line]) -> None:
    """Print a row for every model and state."""
    standard = standard_of(lines)
    heads = "model | state | testbeds | copies | copies, guidance 3 | similarity | attacked"
    print(f"| {heads} | target loss, high noise | validation loss |")
    print("| --- " * 9 + "|")
    for model, state in dict.fromkeys((line["model"], line["state"]) for line in lines):
        mine = [line for line in lines if (line["model"], line["state"]) == (model, state)]
        cells = [
            over([copies(line) for line in mine]),
            over([copies(line, "guided_errors") for line in mine]),
            over([similarity(line) for line in mine]),
            attacked(mine),
            over([line["target_losses"][3] for line in mine], 3),
            validation(mine, standard),
        ]
        print(f"| {model} | {state} | {len(mine)} | {' | '.join(cells)} |")


def by_variant(lines: Sequence[Line]) -> None:
    """Print a row for every variant of sinks, and for models without."""
    standard = standard_of(lines)
    heads = "own: copies | own, guidance 3 | own: similarity | closed: copies | closed: similarity | closed: attacked"
    print(
        f"| sinks | testbeds | {heads} | another's: similarity | validation loss, closed | closing multiplies loss |"
    )
    print("| --- " * 11 + "|")
    for model in dict.fromkeys(line["model"] for line in lines):

        def state(name: str, model: str = model) -> list[Line]:
            return [line for line in lines if (line["model"], line["state"]) == (model, name)]

        def mean(of: Callable[[Line], float], some: Sequence[Line]) -> str:
            return over([of(line) for line in some])

        own, off, foreign, plain = (state(name) for name in ("own", "off", "foreign", "as trained"))
        rows = off or plain
        cells = [mean(copies, own or plain), over([copies(line, "guided_errors") for line in own or plain])]
        cells += [mean(similarity, own or plain), mean(copies, off), mean(similarity, off), attacked(rows)]
        cells += [mean(similarity, foreign), validation(rows, standard)]
        opened = {line["testbed"]: line["target_losses"] for line in own}
        times = [
            over(
                [line["target_losses"][quarter] / opened[line["testbed"]][quarter] for line in off if own], 1
            )
            for quarter in (0, 3)
        ]
        print(f"| {model} | {len(rows)} | {' | '.join(cells)} | {', '.join(times) if off else '-'} |")


def standard_of(lines: Sequence[Line]) -> dict[str, Line]:
    """Return the lines of the standard models by testbed."""
    return {
        line["testbed"]: line
        for line in lines
        if (line["model"], line["state"]) == ("standard", "as trained")
    }


def over(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Write a mean over testbeds with its interval; without one where there are fewer than three."""
    if not values:
        return "-"
    found = mean_over_seeds(values)
    if found.ci95 is None:
        return f"{np.mean(values):.{digits}f}{unit}"
    low, high = found.ci95
    return f"{found.value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--by", choices=("state", "variant"), default="state")
    chosen = parser.parse_args()
    lines = read_json_lines(chosen.runs / "sinks.jsonl")
    by_variant(lines) if chosen.by == "variant" else by_state(lines)


if __name__ == "__main__":
    main()
