"""How figures are worded and pooled for the report: measures become table cells.

Losses are shown in nats with two decimals, fractions as whole per cents, similarities without a unit, and an
interval always stands beside its figure. Several seeds are pooled as mean(value) with the envelope of their
intervals, which is never narrower than any of them; proper intervals over seeds are the audit's work
(`MethodSummary`) and are shown as they are. A refused measure becomes its reason; nothing here estimates or
repairs a number. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from unmemorize.records import Measure

Unit = Literal[
    "loss", "difference", "percent", "points", "tokens", "similarity", "score", "distance", "perplexity"
]
MINUS = "\N{MINUS SIGN}"
_FORMATS = {
    "loss": ".2f",
    "difference": "+.2f",
    "percent": ".0f",
    "points": "+.0f",
    "tokens": ".1f",
    "similarity": ".2f",
    "score": ".3f",
    "distance": ".4g",
    "perplexity": ".2f",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One table cell: what is read (`text`, `detail`), what is sorted and exported (`value`, `low`, `high`).

    `bar_frac` in 0..1 draws a thin bar under the figure; `tone` picks its colour ("" is neutral).
    """

    text: str
    detail: str = ""
    value: float | str | None = None
    low: float | None = None
    high: float | None = None
    bar_frac: float | None = None
    tone: str = ""
    is_refused: bool = False


def number_text(value: float, unit: Unit) -> str:
    """Word a number: losses and similarities in 2 decimals, differences signed, fractions in per cent.

    Tokens have 1 decimal, scores that are compared with a threshold 3, distances between sets of pictures 4 digits,
    perplexities none from 100.
    """
    style = ".0f" if unit == "perplexity" and abs(value) >= 100 else _FORMATS[unit]
    text = f"{100 * value if unit in ('percent', 'points') else value:{style}}"
    if float(text) == 0:
        text = text.lstrip("-+")
    return text.replace("-", MINUS) + ("%" if unit == "percent" else "")


def interval_text(ci95: tuple[float, float] | None, unit: Unit) -> str:
    """Word a 95 % interval as `[low, high]` in the figure's own unit; empty without one."""
    if ci95 is None:
        return ""
    low, high = (number_text(bound, unit).removesuffix("%") for bound in ci95)
    return f"[{low}, {high}]"


def is_given(measure: Measure) -> bool:
    """Whether a measure holds a finite value."""
    return measure.value is not None and math.isfinite(measure.value)


def measure_cell(measure: Measure, unit: Unit, *, full: float | None = None, tone: str = "") -> Cell:
    """Turn a measure into a cell.

    Args:
        measure: the figure.
        unit: how to word it.
        full: value of a full bar, in the figure's unit; None draws no bar.
        tone: colour of the bar.
    """
    if measure.value is None or not is_given(measure):
        return Cell(text=measure.refused or "not a finite number", is_refused=True)
    low, high = measure.ci95 or (None, None)
    bar_frac = None if not full else min(max(measure.value / full, 0.0), 1.0)
    return Cell(
        text=number_text(measure.value, unit),
        detail="" if measure.method == "exact" else interval_text(measure.ci95, unit),
        value=measure.value,
        low=low,
        high=high,
        bar_frac=bar_frac,
        tone=tone,
    )


def pooled(measures: Sequence[Measure]) -> Measure:
    """Mean over seeds with the envelope of the seeds' intervals; refused as soon as one seed is.

    Args:
        measures: the same figure for each seed; not empty.
    """
    refused = next((measure for measure in measures if not is_given(measure)), None)
    if refused is not None:
        return refused
    values = [measure.value for measure in measures if measure.value is not None]
    intervals = [measure.ci95 for measure in measures if measure.ci95 is not None]
    envelope = None
    if len(intervals) == len(measures):
        envelope = (min(low for low, _ in intervals), max(high for _, high in intervals))
    return Measure(
        value=sum(values) / len(values),
        ci95=envelope,
        num=measures[0].num,
        method=measures[0].method,
    )


def over_seeds(summary: Measure | None, seeds: Sequence[Measure | None]) -> Measure | None:
    """The audit's figure over seeds, or the only seed's own figure when there is just one.

    With one seed the interval is over documents; the report says so where it matters.
    """
    only = seeds[0] if len(seeds) == 1 else None
    if only is not None and is_given(only) and (summary is None or not is_given(summary)):
        return only
    return summary
