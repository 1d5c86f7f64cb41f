"""The report's two pictures, drawn from audits: the frontier and the learning curves.

Frontier: x = validation loss, y = loss on repeated text, both in nats per token. `dedup` (each document
once), `cap:R` (at most R times) and `standard` (every repeat) are one curve, because they are one knob;
a method earns its keep only above and to the left of it. Means over seeds with their intervals, each seed
as a small dot. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from unmemorize.records import Audit, CurvePoint, Measure, MethodResult
from unmemorize.report import plots
from unmemorize.report.measures import is_given, number_text
from unmemorize.report.plots import Anchor, Box, Scale, tag
from unmemorize.report.tables import headline_cell, headline_measure

Interval = tuple[float, float] | None
SERIES = {"sinks": 0, "gradient-masking": 1, "goldfish": 2}
SERIES_SHAPES = ("diamond", "triangle", "square", "hexagon", "wedge", "plus")


def repeats_of(method: str) -> float | None:
    """How often a document may be seen: 1 for dedup, R for cap:R, infinity for standard; None off the curve."""
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


class Layout(NamedTuple):
    """Size of a picture in SVG units, which are CSS pixels at its natural size."""

    width: float
    height: float
    font: float
    radius: float
    is_narrow: bool


WIDE = Layout(1040, 580, 15, 7, False)
NARROW = Layout(352, 460, 12, 5, True)


def frontier_points(audit: Audit, run: int = 0, headline: str = "") -> list[Point]:
    """Where each method of an audit stands; methods without both losses are left out."""
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
                label=result.label or result.method,
                run=run,
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
    count = len(result.seeds)
    return f"{result.label}: {', '.join(parts) + ' nats, ' if parts else ''}{count} seed{'s' if count != 1 else ''}"


def curve_of(points: Sequence[Point], run: int) -> list[Point]:
    """The points of one run on the cap curve, from dedup to standard."""
    on_curve = [point for point in points if point.run == run and point.repeats is not None]
    return sorted(on_curve, key=lambda point: (point.repeats or 0.0, point.x))


def frontier(points: Sequence[Point], layout: Layout, *, ident: str, description: str) -> Markup:
    """Draw the frontier plot.

    Args:
        points: the methods of one or several runs; not empty.
        layout: size, `WIDE` or `NARROW`.
        ident: unique id of the picture in its page.
        description: what a reader who cannot see it should know.
    """
    frame = Box(layout.font * 3.1, layout.font * 2.6, layout.width - 8, layout.height - layout.font * 3.4)
    xs = [value for point in points for value in (point.x, *(seed[0] for seed in point.seeds))]
    ys = [value for point in points for value in (point.y, *(seed[1] for seed in point.seeds))]
    x_scale = Scale(*plots.padded_range(xs, 0.09), frame.left, frame.right)
    y_low, y_high = plots.padded_range(ys)
    y_scale = Scale(y_low, max(y_high, min(xs) + 0.06 * (y_high - y_low)), frame.bottom, frame.top)
    clip = tag("clipPath", tag("rect", **_rectangle(frame)), id=f"{ident}-clip")
    inside = [_dominated(points, x_scale, y_scale, frame), _diagonal(x_scale, y_scale, frame)]
    inside += [_curve_line(points, run, x_scale, y_scale) for run in sorted({point.run for point in points})]
    if len({point.run for point in points}) == 1:
        inside += [_gain_line(point, x_scale, y_scale) for point in points]
    inside += [_cross(point, x_scale, y_scale) for point in points]
    inside += [_seed_dots(point, x_scale, y_scale, layout) for point in points if len(point.seeds) > 1]
    parts = [
        clip,
        _axes(x_scale, y_scale, frame, layout),
        tag("g", plots.join([part for part in inside if part]), clip_path=f"url(#{ident}-clip)"),
        *[_mark(point, x_scale, y_scale, layout) for point in points],
        _words_on_plot(points, x_scale, y_scale, frame, layout),
    ]
    return plots.picture(
        layout.width,
        layout.height,
        plots.join(parts),
        ident=ident,
        title="Validation loss against loss on repeated text",
        description=description,
        class_="frontier narrow" if layout.is_narrow else "frontier wide",
    )


def _rectangle(box: Box) -> dict[str, float]:
    return {"x": box.left, "y": box.top, "width": box.right - box.left, "height": box.bottom - box.top}


def _axes(x_scale: Scale, y_scale: Scale, frame: Box, layout: Layout) -> Markup:
    """Grid, tick labels and axis titles; both titles lie flat so that they can be read."""
    x_target, y_target = (4, 6) if layout.is_narrow else (8, 7)
    x_step = plots.tick_step(x_scale.low, x_scale.high, x_target)
    y_step = plots.tick_step(y_scale.low, y_scale.high, y_target)
    parts = []
    for value in plots.nice_ticks(x_scale.low, x_scale.high, x_target):
        x = x_scale(value)
        parts.append(tag("line", x1=x, x2=x, y1=frame.top, y2=frame.bottom, class_="grid"))
        y = frame.bottom + layout.font * 1.3
        parts.append(tag("text", plots.tick_text(value, x_step), x=x, y=y, class_="tick middle"))
    for value in plots.nice_ticks(y_scale.low, y_scale.high, y_target):
        y = y_scale(value)
        parts.append(tag("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="grid"))
        x = frame.left - 7
        text = plots.tick_text(value, y_step)
        parts.append(tag("text", text, x=x, y=y + layout.font * 0.35, class_="tick end"))
    y_title = "Loss on repeated text, nats" + ("" if layout.is_narrow else " (higher = less memorized)")
    x_title = "Validation loss, nats" + ("" if layout.is_narrow else " (lower = better model)")
    parts.append(tag("text", y_title, x=2, y=layout.font * 1.2, class_="axis"))
    parts.append(tag("text", x_title, x=frame.right, y=layout.height - 5, class_="axis end"))
    return plots.join(parts)


def _dominated(points: Sequence[Point], x_scale: Scale, y_scale: Scale, frame: Box) -> Markup:
    """The area below and right of the first run's cap curve: what capping repeats gives for free."""
    curve = curve_of(points, min(point.run for point in points))
    if len(curve) < 2:
        return Markup("")
    line = [(x_scale(point.x), y_scale(point.y)) for point in curve]
    corners = [(line[-1][0], frame.bottom), (frame.right, frame.bottom), (frame.right, line[0][1])]
    return plots.polyline([*line, *corners], "dominated", closed=True)


def _diagonal(x_scale: Scale, y_scale: Scale, frame: Box) -> Markup:
    """Where repeated text is exactly as hard as new text: nothing memorized."""
    ends = [(x_scale(value), y_scale(value)) for value in (x_scale.low, x_scale.high)]
    return plots.polyline(ends, "diagonal")


def _curve_line(points: Sequence[Point], run: int, x_scale: Scale, y_scale: Scale) -> Markup:
    curve = [(x_scale(point.x), y_scale(point.y)) for point in curve_of(points, run)]
    return plots.polyline(curve, "cap-line hollow" if run else "cap-line") if len(curve) > 1 else Markup("")


def _gain(point: Point) -> tuple[float, float] | None:
    """Loss at the mark and at the curve below (or above) it, for the headline method."""
    return (point.y, point.y - point.beyond) if point.is_headline and point.beyond is not None else None


def _gain_line(point: Point, x_scale: Scale, y_scale: Scale) -> Markup:
    ends = _gain(point)
    if ends is None:
        return Markup("")
    x, (high, low) = x_scale(point.x), (y_scale(end) for end in ends)
    return tag("line", x1=x, x2=x, y1=high, y2=low, class_=f"gain {point.class_}")


def _cross(point: Point, x_scale: Scale, y_scale: Scale) -> Markup:
    x, y = x_scale(point.x), y_scale(point.y)
    lines = []
    if point.x_interval:
        low, high = (x_scale(bound) for bound in point.x_interval)
        lines.append(tag("line", x1=low, x2=high, y1=y, y2=y, class_=f"cross {point.class_}"))
    if point.y_interval:
        low, high = (y_scale(bound) for bound in point.y_interval)
        lines.append(tag("line", x1=x, x2=x, y1=low, y2=high, class_=f"cross {point.class_}"))
    return plots.join(lines)


def _seed_dots(point: Point, x_scale: Scale, y_scale: Scale, layout: Layout) -> Markup:
    radius = layout.radius * 0.42
    return plots.join(
        [
            tag("circle", cx=x_scale(x), cy=y_scale(y), r=radius, class_=f"seed {point.class_}")
            for x, y in point.seeds
        ]
    )


def _mark_radius(point: Point, layout: Layout) -> float:
    scale = 1.0 if point.repeats is None else 0.85 if point.repeats in (1, math.inf) else 0.62
    return layout.radius * scale * (1.15 if point.is_headline else 1.0)


def _mark(point: Point, x_scale: Scale, y_scale: Scale, layout: Layout) -> Markup:
    radius = _mark_radius(point, layout)
    shape = plots.mark(point.shape, x_scale(point.x), y_scale(point.y), radius, f"mark {point.class_}")
    return tag("g", tag("title", point.words) + shape)


def _label_text(point: Point, num_runs: int, layout: Layout) -> str:
    on_curve = point.repeats is not None and math.isfinite(point.repeats) and point.repeats > 1
    text = f"{point.repeats:.0f}\N{MULTIPLICATION SIGN}" if on_curve else point.label
    limit = 16 if layout.is_narrow else 32
    text = text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return f"{text} {run_letter(point.run)}" if num_runs > 1 else text


def run_letter(run: int) -> str:
    """Short name of a run in a combined report: A, B, ..."""
    return chr(ord("A") + run) if run < 26 else str(run + 1)


def _words_on_plot(
    points: Sequence[Point], x_scale: Scale, y_scale: Scale, frame: Box, layout: Layout
) -> Markup:
    """Direct labels, the note about the diagonal and the arrow that says where better is."""
    marks = [plots.around(x_scale(p.x), y_scale(p.y), _mark_radius(p, layout) + 2) for p in points]
    lines = [_screen_line(curve_of(points, run), x_scale, y_scale) for run in {p.run for p in points}]
    lines += [line for p in points for line in _thin_lines(p, x_scale, y_scale)]
    obstacles = marks + [box for line in lines for box in plots.line_obstacles(line)]
    obstacles += [plots.around(x_scale(x), y_scale(y), layout.radius / 2) for p in points for x, y in p.seeds]
    arrow, arrow_box = _better_arrow(obstacles, frame, layout)
    note, note_box = _diagonal_note(obstacles, x_scale, y_scale, frame, layout)
    num_runs = len({point.run for point in points})
    ranked = sorted(points, key=lambda p: (not p.is_headline, p.repeats is not None, p.run, p.x, p.y))
    anchors = [
        Anchor(
            x_scale(p.x),
            y_scale(p.y),
            _label_text(p, num_runs, layout),
            _mark_radius(p, layout),
            f"{p.class_} strong" if p.is_headline else p.class_,
        )
        for p in ranked
    ]
    if num_runs == 1:
        anchors += [anchor for p in points if (anchor := _gain_anchor(p, x_scale, y_scale, layout))]
    reach, reach_box = _reach_note(points, [*obstacles, arrow_box], frame, layout)
    labels = plots.place_labels(anchors, [*obstacles, arrow_box, note_box, reach_box], frame, layout.font)
    return plots.join([arrow, note, reach, *[plots.draw_label(label, layout.font) for label in labels]])


def _gain_anchor(point: Point, x_scale: Scale, y_scale: Scale, layout: Layout) -> Anchor | None:
    """The label of the dashed line between the headline method and the curve, if there is room for it."""
    ends = _gain(point)
    if ends is None or abs(y_scale(ends[0]) - y_scale(ends[1])) < layout.font * 2.5:
        return None
    text = number_text(ends[0] - ends[1], "difference") + ("" if layout.is_narrow else " nats")
    return Anchor(x_scale(point.x), y_scale(sum(ends) / 2), text, 2, f"note-label {point.class_}")


def _reach_note(
    points: Sequence[Point], obstacles: Sequence[Box], frame: Box, layout: Layout
) -> tuple[Markup, Box]:
    """Words in the shaded area, where nothing is in the way."""
    nothing = (Markup(""), Box(0, 0, 0, 0))
    if len(curve_of(points, min(point.run for point in points))) < 2:
        return nothing
    text = "capping is enough here"
    width, height = len(text) * layout.font * 0.55, layout.font * 1.2
    left = frame.right - width - layout.font
    tops = [frame.top + (frame.bottom - frame.top) * share for share in (0.5, 0.58, 0.42, 0.66)]
    boxes = [Box(left, top, left + width, top + height) for top in tops]
    free = [box for box in boxes if not any(box.overlap(obstacle) for obstacle in obstacles)]
    if not free:
        return nothing
    box = free[0]
    words = tag("text", text, x=box.right, y=box.bottom - layout.font * 0.3, class_="note end")
    return words, box


def _thin_lines(point: Point, x_scale: Scale, y_scale: Scale) -> list[list[tuple[float, float]]]:
    """The cross of a mark and its drop to the curve, as lines that labels keep clear of."""
    x, y = x_scale(point.x), y_scale(point.y)
    lines = [[(x, y_scale(end)) for end in ends] for ends in (point.y_interval, _gain(point)) if ends]
    return lines + ([[(x_scale(end), y) for end in point.x_interval]] if point.x_interval else [])


def _screen_line(curve: Sequence[Point], x_scale: Scale, y_scale: Scale) -> list[tuple[float, float]]:
    return [(x_scale(point.x), y_scale(point.y)) for point in curve]


def _better_arrow(obstacles: Sequence[Box], frame: Box, layout: Layout) -> tuple[Markup, Box]:
    """An arrow to the upper left with its note, in the emptiest corner."""
    size, gap = layout.font * 2.4, layout.font * 0.9
    text = "better: left and up"
    width = len(text) * layout.font * plots.CHARACTER_WIDTH_EM
    height = size + layout.font * 1.4
    lefts = (frame.right - gap - width, frame.left + gap)
    tops = (frame.bottom - gap - height, frame.top + gap + layout.font * 1.6)
    boxes = [Box(left, top, left + width, top + height) for top in tops for left in lefts]
    box = min(boxes, key=lambda corner: sum(corner.overlap(obstacle) for obstacle in obstacles))
    middle = (box.left + box.right) / 2
    tip = (middle - size / 2, box.top)
    tail = (middle + size / 2, box.top + size)
    head = [tip, (tip[0] + size * 0.36, tip[1] + size * 0.06), (tip[0] + size * 0.06, tip[1] + size * 0.36)]
    shaft = tag("line", x1=tip[0] + 3, y1=tip[1] + 3, x2=tail[0], y2=tail[1], class_="arrow")
    words = tag("text", text, x=middle, y=box.bottom, class_="note middle")
    return shaft + plots.polyline(head, "arrow-head", closed=True) + words, box


def _diagonal_note(
    obstacles: Sequence[Box], x_scale: Scale, y_scale: Scale, frame: Box, layout: Layout
) -> tuple[Markup, Box]:
    """Words on the diagonal, just above it, where the fewest marks are in the way."""
    text = "repeated = new text" if layout.is_narrow else "repeated text as hard as new text: nothing memorized"
    width = len(text) * layout.font * 0.55
    places = []
    for left in (frame.left + 6, (frame.left + frame.right - width) / 2, frame.right - width - 6):
        values = [
            x_scale.low + (x - frame.left) / (frame.right - frame.left) * (x_scale.high - x_scale.low)
            for x in (left, left + width)
        ]
        top = min(y_scale(value) for value in values) - layout.font * 1.3
        places.append(Box(left, top, left + width, top + layout.font * 1.2))
    allowed = [box for box in places if box.top >= frame.top - layout.font * 0.4 and box.bottom < frame.bottom]
    if not allowed:
        return Markup(""), Box(0, 0, 0, 0)
    box = min(allowed, key=lambda place: sum(place.overlap(obstacle) for obstacle in obstacles))
    return tag("text", text, x=box.left, y=box.bottom - layout.font * 0.2, class_="note diagonal-note"), box


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
    return [(step, _mean([table[step] for table in tables])) for step in steps]


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
    clip = tag("clipPath", tag("rect", **_rectangle(frame)), id=f"{ident}-clip")
    inside = tag("g", plots.join(parts), clip_path=f"url(#{ident}-clip)")
    body = plots.join([clip, _panel_axes(x_scale, y_scale, frame, font), inside])
    ends = {name: number_text(mean_line(getattr(curves, name))[-1][1], "loss") for name in means if means[name]}
    words = "; ".join(f"{name} loss ends at {text} nats" for name, text in ends.items())
    return plots.picture(
        width, height, body, ident=ident, title=f"Learning curves: {result.label}", description=words
    )


def _panel_axes(x_scale: Scale, y_scale: Scale, frame: Box, font: float) -> Markup:
    parts = []
    y_step = plots.tick_step(y_scale.low, y_scale.high, 4)
    for value in plots.nice_ticks(y_scale.low, y_scale.high, 4):
        y = y_scale(value)
        parts.append(tag("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="grid"))
        text = plots.tick_text(value, y_step)
        parts.append(tag("text", text, x=frame.left - 5, y=y + font * 0.35, class_="tick end"))
    x_step = plots.tick_step(x_scale.low, x_scale.high, 3)
    for value in plots.nice_ticks(x_scale.low, x_scale.high, 3):
        x = min(x_scale(value), frame.right - 6)
        text = plots.tick_text(value, x_step)
        parts.append(tag("text", text, x=x, y=frame.bottom + font * 1.3, class_="tick middle"))
    return plots.join(parts)
