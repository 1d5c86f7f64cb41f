"""The frontier plot: validation loss against loss on repeated text, nats per token.

A method earns its keep only above and to the left of the cap curve (see points). Marks are means over seeds
with their intervals, small dots single seeds, and every mark carries its own label. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from unmemorize.report import plots
from unmemorize.report.measures import number_text
from unmemorize.report.plots import Anchor, Box, Scale, tag
from unmemorize.report.points import Point, curve_of


class Layout(NamedTuple):
    """Size of a picture in SVG units, which are CSS pixels at its natural size."""

    width: float
    height: float
    font: float
    radius: float
    is_narrow: bool


class Canvas(NamedTuple):
    """Scales from losses in nats to SVG units, and the frame they fill."""

    x: Scale
    y: Scale
    frame: Box
    layout: Layout


WIDE = Layout(1040, 580, 15, 7, False)
NARROW = Layout(352, 460, 12, 5, True)


def frontier(points: Sequence[Point], layout: Layout, *, ident: str, description: str) -> Markup:
    """Draw the frontier plot.

    Args:
        points: the methods of one or several runs; not empty.
        layout: size, `WIDE` or `NARROW`.
        ident: unique id of the picture in its page.
        description: what a reader who cannot see it should know.
    """
    canvas = _canvas(points, layout)
    runs = sorted({point.run for point in points})
    inside = [_dominated(points, canvas), _diagonal(canvas)]
    inside += [_curve_line(points, run, canvas) for run in runs]
    inside += [_gain_line(point, canvas) for point in points if len(runs) == 1]
    inside += [_cross(point, canvas) for point in points]
    inside += [_seed_dots(point, canvas) for point in points if len(point.seeds) > 1]
    clip = tag("clipPath", tag("rect", **canvas.frame.attributes()), id=f"{ident}-clip")
    parts = [
        clip,
        _axes(canvas),
        tag("g", plots.join([part for part in inside if part]), clip_path=f"url(#{ident}-clip)"),
        *[_mark(point, canvas) for point in sorted(points, key=lambda point: point.is_headline)],
        _words_on_plot(points, canvas),
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


def _canvas(points: Sequence[Point], layout: Layout) -> Canvas:
    """Scales that show every mark, every seed and the line of no memorization; intervals may be cut off."""
    frame = Box(layout.font * 3.1, layout.font * 2.6, layout.width - 8, layout.height - layout.font * 3.4)
    xs = [value for point in points for value in (point.x, *(seed[0] for seed in point.seeds))]
    ys = [value for point in points for value in (point.y, *(seed[1] for seed in point.seeds))]
    low, high = plots.padded_range(ys)
    return Canvas(
        x=Scale(*plots.padded_range(xs, 0.09), frame.left, frame.right),
        y=Scale(low, max(high, min(xs) + 0.06 * (high - low)), frame.bottom, frame.top),
        frame=frame,
        layout=layout,
    )


def _axes(canvas: Canvas) -> Markup:
    """Grid, tick labels and axis titles; both titles lie flat so that they can be read."""
    x_target, y_target = (4, 6) if canvas.layout.is_narrow else (8, 7)
    parts = [
        plots.vertical_grid(canvas.x, canvas.frame, canvas.layout.font, x_target),
        plots.horizontal_grid(canvas.y, canvas.frame, canvas.layout.font, y_target, gap=7),
    ]
    y_title = "Loss on repeated text, nats" + (
        "" if canvas.layout.is_narrow else " (higher = less memorized)"
    )
    x_title = "Validation loss, nats" + ("" if canvas.layout.is_narrow else " (lower = better model)")
    parts.append(tag("text", y_title, x=2, y=canvas.layout.font * 1.2, class_="axis"))
    parts.append(tag("text", x_title, x=canvas.frame.right, y=canvas.layout.height - 5, class_="axis end"))
    return plots.join(parts)


def _dominated(points: Sequence[Point], canvas: Canvas) -> Markup:
    """The area below and right of the first run's cap curve: what capping repeats gives for free."""
    curve = curve_of(points, min(point.run for point in points))
    if len(curve) < 2:
        return Markup("")
    line = [(canvas.x(point.x), canvas.y(point.y)) for point in curve]
    corners = [
        (line[-1][0], canvas.frame.bottom),
        (canvas.frame.right, canvas.frame.bottom),
        (canvas.frame.right, line[0][1]),
    ]
    return plots.polyline([*line, *corners], "dominated", closed=True)


def _diagonal(canvas: Canvas) -> Markup:
    """Where repeated text is exactly as hard as new text: nothing memorized."""
    ends = [(canvas.x(value), canvas.y(value)) for value in (canvas.x.low, canvas.x.high)]
    return plots.polyline(ends, "diagonal")


def _curve_line(points: Sequence[Point], run: int, canvas: Canvas) -> Markup:
    curve = [(canvas.x(point.x), canvas.y(point.y)) for point in curve_of(points, run)]
    return plots.polyline(curve, "cap-line hollow" if run else "cap-line") if len(curve) > 1 else Markup("")


def _gain(point: Point) -> tuple[float, float] | None:
    """Loss at the mark and at the curve below (or above) it, for the headline method."""
    return (point.y, point.y - point.beyond) if point.is_headline and point.beyond is not None else None


def _gain_line(point: Point, canvas: Canvas) -> Markup:
    ends = _gain(point)
    if ends is None:
        return Markup("")
    x, (high, low) = canvas.x(point.x), (canvas.y(end) for end in ends)
    return tag("line", x1=x, x2=x, y1=high, y2=low, class_=f"gain {point.class_}")


def _cross(point: Point, canvas: Canvas) -> Markup:
    x, y = canvas.x(point.x), canvas.y(point.y)
    lines = []
    if point.x_interval:
        low, high = (canvas.x(bound) for bound in point.x_interval)
        lines.append(tag("line", x1=low, x2=high, y1=y, y2=y, class_=f"cross {point.class_}"))
    if point.y_interval:
        low, high = (canvas.y(bound) for bound in point.y_interval)
        lines.append(tag("line", x1=x, x2=x, y1=low, y2=high, class_=f"cross {point.class_}"))
    return plots.join(lines)


def _seed_dots(point: Point, canvas: Canvas) -> Markup:
    radius = canvas.layout.radius * 0.42
    return plots.join(
        [
            tag("circle", cx=canvas.x(x), cy=canvas.y(y), r=radius, class_=f"seed {point.class_}")
            for x, y in point.seeds
        ]
    )


def _mark_radius(point: Point, canvas: Canvas) -> float:
    scale = 1.0 if point.repeats is None else 0.85 if point.repeats in (1, math.inf) else 0.62
    return canvas.layout.radius * scale * (1.15 if point.is_headline else 1.0)


def _mark(point: Point, canvas: Canvas) -> Markup:
    radius = _mark_radius(point, canvas)
    shape = plots.mark(point.shape, canvas.x(point.x), canvas.y(point.y), radius, f"mark {point.class_}")
    return tag("g", tag("title", point.words) + shape)


def _label_text(point: Point, num_runs: int, canvas: Canvas) -> str:
    on_curve = point.repeats is not None and math.isfinite(point.repeats) and point.repeats > 1
    text = f"{point.repeats:.0f}\N{MULTIPLICATION SIGN}" if on_curve else point.label
    limit = 22 if canvas.layout.is_narrow else 32
    text = text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return f"{text} {point.letter}" if num_runs > 1 else text


def _words_on_plot(points: Sequence[Point], canvas: Canvas) -> Markup:
    """Direct labels, the note about the diagonal and the arrow that says where better is."""
    marks = [plots.around(canvas.x(p.x), canvas.y(p.y), _mark_radius(p, canvas) + 2) for p in points]
    lines = [_screen_line(curve_of(points, run), canvas) for run in {p.run for p in points}]
    lines += [line for p in points for line in _thin_lines(p, canvas)]
    obstacles = marks + [box for line in lines for box in plots.line_obstacles(line)]
    obstacles += [
        plots.around(canvas.x(x), canvas.y(y), canvas.layout.radius / 2) for p in points for x, y in p.seeds
    ]
    arrow, arrow_box = _better_arrow(obstacles, canvas)
    note, note_box = _diagonal_note(obstacles, canvas)
    num_runs = len({point.run for point in points})
    ranked = sorted(points, key=lambda p: (not p.is_headline, p.repeats is not None, p.run, p.x, p.y))
    anchors = [
        Anchor(
            canvas.x(p.x),
            canvas.y(p.y),
            _label_text(p, num_runs, canvas),
            _mark_radius(p, canvas),
            f"{p.class_} strong" if p.is_headline else p.class_,
        )
        for p in ranked
    ]
    if num_runs == 1:
        anchors += [anchor for p in points if (anchor := _gain_anchor(p, canvas))]
    reach, reach_box = _reach_note(points, [*obstacles, arrow_box], canvas)
    labels = plots.place_labels(
        anchors, [*obstacles, arrow_box, note_box, reach_box], canvas.frame, canvas.layout.font
    )
    return plots.join(
        [arrow, note, reach, *[plots.draw_label(label, canvas.layout.font) for label in labels]]
    )


def _gain_anchor(point: Point, canvas: Canvas) -> Anchor | None:
    """The label of the dashed line between the headline method and the curve, if there is room for it."""
    ends = _gain(point)
    if ends is None or abs(canvas.y(ends[0]) - canvas.y(ends[1])) < canvas.layout.font * 2.5:
        return None
    text = number_text(ends[0] - ends[1], "difference") + ("" if canvas.layout.is_narrow else " nats")
    return Anchor(canvas.x(point.x), canvas.y(sum(ends) / 2), text, 2, f"note-label {point.class_}")


def _reach_note(points: Sequence[Point], obstacles: Sequence[Box], canvas: Canvas) -> tuple[Markup, Box]:
    """Words in the shaded area, where nothing is in the way."""
    nothing = (Markup(""), Box(0, 0, 0, 0))
    if len(curve_of(points, min(point.run for point in points))) < 2:
        return nothing
    text = "capping is enough here"
    width, height = len(text) * canvas.layout.font * 0.55, canvas.layout.font * 1.2
    left = canvas.frame.right - width - canvas.layout.font
    tops = [
        canvas.frame.top + (canvas.frame.bottom - canvas.frame.top) * share
        for share in (0.5, 0.58, 0.42, 0.66)
    ]
    boxes = [Box(left, top, left + width, top + height) for top in tops]
    free = [box for box in boxes if not any(box.overlap(obstacle) for obstacle in obstacles)]
    if not free:
        return nothing
    box = free[0]
    words = tag("text", text, x=box.right, y=box.bottom - canvas.layout.font * 0.3, class_="note end")
    return words, box


def _thin_lines(point: Point, canvas: Canvas) -> list[list[tuple[float, float]]]:
    """The cross of a mark and its drop to the curve, as lines that labels keep clear of."""
    x, y = canvas.x(point.x), canvas.y(point.y)
    lines = [[(x, canvas.y(end)) for end in ends] for ends in (point.y_interval, _gain(point)) if ends]
    return lines + ([[(canvas.x(end), y) for end in point.x_interval]] if point.x_interval else [])


def _screen_line(curve: Sequence[Point], canvas: Canvas) -> list[tuple[float, float]]:
    return [(canvas.x(point.x), canvas.y(point.y)) for point in curve]


def _better_arrow(obstacles: Sequence[Box], canvas: Canvas) -> tuple[Markup, Box]:
    """An arrow to the upper left with its note, in the emptiest corner."""
    size, gap = canvas.layout.font * 2.4, canvas.layout.font * 0.9
    text = "better: left and up"
    width = len(text) * canvas.layout.font * plots.CHARACTER_WIDTH_EM
    height = size + canvas.layout.font * 1.4
    lefts = (canvas.frame.right - gap - width, canvas.frame.left + gap)
    tops = (canvas.frame.bottom - gap - height, canvas.frame.top + gap + canvas.layout.font * 1.6)
    boxes = [Box(left, top, left + width, top + height) for top in tops for left in lefts]
    box = min(boxes, key=lambda corner: sum(corner.overlap(obstacle) for obstacle in obstacles))
    middle = (box.left + box.right) / 2
    tip = (middle - size / 2, box.top)
    tail = (middle + size / 2, box.top + size)
    head = [tip, (tip[0] + size * 0.36, tip[1] + size * 0.06), (tip[0] + size * 0.06, tip[1] + size * 0.36)]
    shaft = tag("line", x1=tip[0] + 3, y1=tip[1] + 3, x2=tail[0], y2=tail[1], class_="arrow")
    words = tag("text", text, x=middle, y=box.bottom, class_="note middle")
    return shaft + plots.polyline(head, "arrow-head", closed=True) + words, box


def _diagonal_note(obstacles: Sequence[Box], canvas: Canvas) -> tuple[Markup, Box]:
    """Words on the diagonal, just above it, where the fewest marks are in the way."""
    text = (
        "repeated = new text"
        if canvas.layout.is_narrow
        else "repeated text as hard as new text: nothing memorized"
    )
    width = len(text) * canvas.layout.font * 0.55
    places = []
    for left in (
        canvas.frame.left + 6,
        (canvas.frame.left + canvas.frame.right - width) / 2,
        canvas.frame.right - width - 6,
    ):
        values = [
            canvas.x.low
            + (x - canvas.frame.left)
            / (canvas.frame.right - canvas.frame.left)
            * (canvas.x.high - canvas.x.low)
            for x in (left, left + width)
        ]
        top = min(canvas.y(value) for value in values) - canvas.layout.font * 1.3
        places.append(Box(left, top, left + width, top + canvas.layout.font * 1.2))
    allowed = [
        box
        for box in places
        if box.top >= canvas.frame.top - canvas.layout.font * 0.4 and box.bottom < canvas.frame.bottom
    ]
    if not allowed:
        return Markup(""), Box(0, 0, 0, 0)
    box = min(allowed, key=lambda place: sum(place.overlap(obstacle) for obstacle in obstacles))
    return tag(
        "text", text, x=box.left, y=box.bottom - canvas.layout.font * 0.2, class_="note diagonal-note"
    ), box
