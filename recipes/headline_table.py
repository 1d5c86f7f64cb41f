"""Print the headline figures of a run's audit as a Markdown table: means over seeds with 95 % intervals.

Usage: python recipes/headline_table.py RUN...
"""

from __future__ import annotations

import sys
from pathlib import Path

from unmemorize import Measure, load_audit

FIGURES = ("validation_loss_nats", "repeated_loss_nats", "gap_closed_frac", "repetition_benefit_kept_frac")


def cell(measure: Measure, digits: int) -> str:
    """Write a figure with its interval, or that it was refused."""
    if measure.value is None or measure.ci95 is None:
        return "refused"
    low, high = measure.ci95
    return f"{measure.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    """Print one row a method."""
    print("| method | seeds | validation, nats | repeated, nats | gap closed | benefit kept | extracted |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for run in sys.argv[1:]:
        for method in load_audit(Path(run) / "audit.json").methods:
            figures = [cell(getattr(method.summary, name), 2) for name in FIGURES]
            extracted = cell(method.summary.extraction_rate_frac, 2)
            print(f"| `{method.method}` | {len(method.seeds)} | {' | '.join(figures)} | {extracted} |")


if __name__ == "__main__":
    main()
