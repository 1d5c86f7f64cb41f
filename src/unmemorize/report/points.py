"""Where every method of an audit stands on the frontier, before anything is drawn.

`dedup` (each document once), `cap:R` (at most R times) and `standard` (every repeat) are one curve, because
they are one knob. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unmemorize.records import Audit, Measure, MethodResult
from unmemorize.report.measures import is_given
from unmemorize.report.methods import headline_cell, headline_measure

Interval = tuple[float, float] | None
SERIES = {"sinks": 0, "gradient-masking": 1, "goldfish": 2}
SERIES_SHAPES = ("diamond", "triangle", "square", "hexagon", "wedge", "plus")


def repeats_of(method: str) -> float | None:
    """How often a document may be seen: 1 for dedup, R for cap:R, any for standard; None off the curve."""
    if method == "standard":
        return math.inf
    name, _, count = method.partition(":")
    if name == "dedup":
        return 1
    return float(count) if name == "cap" and count.isdigit() else None


def series_of(audit: Audit) -> dict[str, int]:
    """Colour and shape number of each method off the curve; the same for all settings of one method."""
    series = dict(SERIES)
    for result in audit.methods:
        if repeats_of(result.method) is None:
            series.setdefault(result.method.partition(":")[0], len(series))
    return series


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One method on the frontier; losses in nats per token."""

    method: str
    label: str
    run: int
    letter: str
    x: float
    y: float
    x_interval: Interval
    y_interval: Interval
    seeds: tuple[tuple[float, float], ...]
    repeats: float | None
    series: int
    is_headline: bool
    beyond: float | None
    words: str

    @property
    def class_(self) -> str:
        """CSS classes: colour, and hollow marks from the second run on."""
        color = "curve" if self.repeats is not None else f"s{self.series % len(SERIES_SHAPES)}"
        return f"{color} hollow" if self.run else color

    @property
    def shape(self) -> str:
        """Shape of the mark."""
        return "circle" if self.repeats is not None else SERIES_SHAPES[self.series % len(SERIES_SHAPES)]


def frontier_points(audit: Audit, run: int = 0, headline: str = "", letter: str = "") -> list[Point]:
    """Where each method of an audit stands; methods without both losses are left out.

    Args:
        audit: the audit.
        run: its place among the runs drawn, from 0; those after the first have hollow marks.
        headline: name of the method that the report is about.
        letter: short name of the run in labels, if several are drawn.
    """
    series = series_of(audit)
    points = []
    for result in audit.methods:
        seeds = tuple(
            (seed.validation_loss_nats.value, seed.repeated_loss_nats.value)
            for seed in result.seeds
            if seed.validation_loss_nats.value is not None and seed.repeated_loss_nats.value is not None
        )
        if not seeds or not all(math.isfinite(value) for pair in seeds for value in pair):
            continue
        x = headline_measure(result, "validation_loss_nats")
        y = headline_measure(result, "repeated_loss_nats")
        points.append(
            Point(
                method=result.method,
                label=result.label,
                run=run,
                letter=letter,
                x=_value_or_mean(x, [seed[0] for seed in seeds]),
                y=_value_or_mean(y, [seed[1] for seed in seeds]),
                x_interval=x.ci95 if x else None,
                y_interval=y.ci95 if y else None,
                seeds=seeds,
                repeats=repeats_of(result.method),
                series=series.get(result.method.partition(":")[0], 0),
                is_headline=result.method == headline,
                beyond=_value(headline_measure(result, "beyond_curve_nats")),
                words=_words(result),
            )
        )
    return points


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _value(measure: Measure | None) -> float | None:
    return measure.value if measure and is_given(measure) else None


def _value_or_mean(measure: Measure | None, seeds: Sequence[float]) -> float:
    """Where the mark stands; two seeds have a mean but no interval."""
    value = _value(measure)
    return _mean(seeds) if value is None else value


def _words(result: MethodResult) -> str:
    """What the tooltip of a mark says."""
    cells = [
        (name, headline_cell(result, field))
        for name, field in (
            ("validation loss", "validation_loss_nats"),
            ("loss on repeated text", "repeated_loss_nats"),
        )
    ]
    parts = [f"{name} {cell.text} {cell.detail}".strip() for name, cell in cells if not cell.is_refused]
    figures = f"{', '.join(parts)} nats, " if parts else ""
    count = len(result.seeds)
    return f"{result.label}: {figures}{count} seed{'s' if count != 1 else ''}"


def curve_of(points: Sequence[Point], run: int) -> list[Point]:
    """The points of one run on the cap curve, from dedup to standard."""
    on_curve = [point for point in points if point.run == run and point.repeats is not None]
    return sorted(on_curve, key=lambda point: (point.repeats or 0.0, point.x))
