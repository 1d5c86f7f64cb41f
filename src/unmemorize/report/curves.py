"""Learning curves as small multiples: validation and repeated loss over steps, one panel a method.

All panels share their axes, so they compare at a glance; the shaded gap is memorization. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from unmemorize.records import CurvePoint, MethodResult
from unmemorize.report import plots
from unmemorize.report.measures import number_text
from unmemorize.report.plots import Box, Scale, tag


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Both losses of one method over steps: mean over seeds, and each seed."""

    validation: list[list[tuple[float, float]]]
    repeated: list[list[tuple[float, float]]]

    @property
    def everything(self) -> list[tuple[float, float]]:
        """All (step, loss) points."""
        return [point for line in (*self.validation, *self.repeated) for point in line]


def curves_of(result: MethodResult) -> Curves:
    """The learning curves of one method; points without a finite loss are left out."""
    return Curves(
        validation=[_line(seed.curve, "validation_loss_nats") for seed in result.seeds],
        repeated=[_line(seed.curve, "repeated_loss_nats") for seed in result.seeds],
    )


def _line(curve: Sequence[CurvePoint], field: str) -> list[tuple[float, float]]:
    values = [(point.step, getattr(point, field)) for point in curve]
    return [(float(step), loss) for step, loss in values if loss is not None and math.isfinite(loss)]


def mean_line(lines: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean over seeds at the steps that every seed has."""
    tables = [dict(line) for line in lines if line]
    if not tables:
        return []
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, sum(table[step] for table in tables) / len(tables)) for step in steps]


def learning_panel(
    result: MethodResult, *, steps: tuple[float, float], losses: tuple[float, float], ident: str
) -> Markup:
    """One small picture: validation and repeated loss over steps, the gap between them shaded.

    Args:
        result: the method.
        steps: range of the x axis, shared by all panels.
        losses: range of the y axis in nats, shared by all panels.
        ident: unique id of the picture in its page.
    """
    curves, width, height, font = curves_of(result), 236.0, 168.0, 12.0
    frame = Box(28, 8, width - 10, height - 22)
    x_scale = Scale(*steps, frame.left, frame.right)
    y_scale = Scale(*losses, frame.bottom, frame.top)
    screen = {
        name: [[(x_scale(x), y_scale(y)) for x, y in line] for line in lines]
        for name, lines in (("validation", curves.validation), ("repeated", curves.repeated))
    }
    means = {name: mean_line(lines) for name, lines in screen.items()}
    parts = []
    if means["validation"] and means["repeated"]:
        parts.append(plots.polyline([*means["validation"], *reversed(means["repeated"])], "gap", closed=True))
    for name, lines in screen.items():
        if len(lines) > 1:
            parts += [plots.polyline(line, f"line thin {name}") for line in lines if line]
        parts.append(plots.polyline(means[name], f"line {name}"))
    clip = tag("clipPath", tag("rect", **frame.attributes()), id=f"{ident}-clip")
    inside = tag("g", plots.join(parts), clip_path=f"url(#{ident}-clip)")
    body = plots.join([clip, _panel_axes(x_scale, y_scale, frame, font), inside])
    ends = {
        name: number_text(mean_line(getattr(curves, name))[-1][1], "loss") for name in means if means[name]
    }
    words = "; ".join(f"{name} loss ends at {text} nats" for name, text in ends.items())
    return plots.picture(
        width, height, body, ident=ident, title=f"Learning curves: {result.label}", description=words
    )


def _panel_axes(x_scale: Scale, y_scale: Scale, frame: Box, font: float) -> Markup:
    parts = [plots.horizontal_grid(y_scale, frame, font, 4, gap=5)]
    x_step = plots.tick_step(x_scale.low, x_scale.high, 3)
    for value in plots.nice_ticks(x_scale.low, x_scale.high, 3):
        x = min(x_scale(value), frame.right - 6)
        text = plots.tick_text(value, x_step)
        parts.append(tag("text", text, x=x, y=frame.bottom + font * 1.3, class_="tick middle"))
    return plots.join(parts)
