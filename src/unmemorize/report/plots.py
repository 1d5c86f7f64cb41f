"""A small SVG kit: scales, nice ticks, marks that differ in shape, labels that do not overlap.

Text keeps its size because every picture is drawn once for wide and once for narrow screens; colours are
CSS classes, so dark mode and print need no second drawing. It knows nothing about audits.
Source: ours; ticks follow the usual 1-2-5 rule, labels are placed greedily and then improved in turn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup, escape

CHARACTER_WIDTH_EM = 0.62
"""Width of an average character, in em; wide enough for the widest common system fonts."""


class Box(NamedTuple):
    """A rectangle in SVG units, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area, in square SVG units."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return width * height if width > 0 and height > 0 else 0.0

    def attributes(self) -> dict[str, float]:
        """The same as attributes of an SVG rect."""
        width, height = self.right - self.left, self.bottom - self.top
        return {"x": self.left, "y": self.top, "width": width, "height": height}

    def area(self) -> float:
        """Area, in square SVG units."""
        return (self.right - self.left) * (self.bottom - self.top)


def around(x: float, y: float, radius: float) -> Box:
    """The square box around a point."""
    return Box(x - radius, y - radius, x + radius, y + radius)


@dataclass(frozen=True, slots=True)
class Scale:
    """Linear map from data (low, high) to SVG units (start, end)."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Map one value; values outside the range land outside the frame."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def padded_range(values: Sequence[float], pad_frac: float = 0.08) -> tuple[float, float]:
    """Smallest and largest value with some air; never of zero width."""
    low, high = min(values), max(values)
    pad = (high - low) * pad_frac or max(abs(low), 1.0) * 0.05
    return low - pad, high + pad


def nice_ticks(low: float, high: float, target: int = 6) -> list[float]:
    """Round numbers in [low, high] in steps of 1, 2 or 5 times a power of ten; about `target` of them."""
    step = tick_step(low, high, target)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def tick_step(low: float, high: float, target: int) -> float:
    """Step of `nice_ticks`, in data units."""
    rough = (high - low) / max(target, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999))


def tick_text(value: float, step: float) -> str:
    """Word a tick with the decimals its step needs, thousands as k."""
    if value == 0:
        return "0"
    if step >= 1000 or (abs(value) >= 1000 and value % 500 == step % 500 == 0):
        return f"{value / 1000:g}k"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def number(value: float) -> str:
    """A coordinate with one decimal, without needless zeros."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def tag(element: str, content: str | Markup = "", /, **attributes: str | float) -> Markup:
    """One SVG element; content and attributes are escaped, `_` in a name becomes `-`, `class_` is class."""
    parts = []
    for key, value in attributes.items():
        name = "class" if key == "class_" else key.replace("_", "-")
        text = value if isinstance(value, str) else number(value)
        parts.append(f' {name}="{escape(text)}"')
    return Markup(f"<{element}{''.join(parts)}>{escape(content)}</{element}>")


def join(parts: Sequence[Markup]) -> Markup:
    """Concatenate ready pieces of SVG."""
    return Markup("\n").join(parts)


def picture(
    width: float, height: float, body: Markup, *, ident: str, title: str, description: str, class_: str = ""
) -> Markup:
    """A whole SVG with an accessible title and description."""
    head = tag("title", title, id=f"{ident}-t") + tag("desc", description, id=f"{ident}-d")
    markup = tag(
        "svg",
        head + body,
        class_=class_,
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        aria_labelledby=f"{ident}-t {ident}-d",
    )
    return markup


def vertical_grid(scale: Scale, frame: Box, font: float, target: int) -> Markup:
    """Vertical lines at round values of x with their numbers below the frame."""
    step = tick_step(scale.low, scale.high, target)
    parts = []
    for value in nice_ticks(scale.low, scale.high, target):
        x = scale(value)
        parts.append(tag("line", x1=x, x2=x, y1=frame.top, y2=frame.bottom, class_="grid"))
        y = frame.bottom + font * 1.3
        parts.append(tag("text", tick_text(value, step), x=x, y=y, class_="tick middle"))
    return join(parts)


def horizontal_grid(scale: Scale, frame: Box, font: float, target: int, *, gap: float) -> Markup:
    """Horizontal lines at round values of y with their numbers `gap` left of the frame."""
    step = tick_step(scale.low, scale.high, target)
    parts = []
    for value in nice_ticks(scale.low, scale.high, target):
        y = scale(value)
        parts.append(tag("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="grid"))
        text, x = tick_text(value, step), frame.left - gap
        parts.append(tag("text", text, x=x, y=y + font * 0.35, class_="tick end"))
    return join(parts)


def polyline(points: Sequence[tuple[float, float]], class_: str, *, closed: bool = False) -> Markup:
    """A connected line, or a filled shape when `closed`."""
    text = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return tag("polygon" if closed else "polyline", points=text, class_=class_)


def mark(shape: str, x: float, y: float, radius: float, class_: str) -> Markup:
    """A mark of about equal weight in each shape: circle, diamond, triangle, square, wedge, hexagon, plus."""
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=radius, class_=class_)
    return polyline([(x + radius * dx, y + radius * dy) for dx, dy in _SHAPES[shape]], class_, closed=True)


_T = 0.4
_SHAPES: dict[str, list[tuple[float, float]]] = {
    "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
    "triangle": [(0, -1.3), (1.25, 0.9), (-1.25, 0.9)],
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "wedge": [(0, 1.3), (1.25, -0.9), (-1.25, -0.9)],
    "hexagon": [(1.15, 0), (0.58, 1), (-0.58, 1), (-1.15, 0), (-0.58, -1), (0.58, -1)],
    "plus": [
        *[(_T, -1.2), (_T, -_T), (1.2, -_T), (1.2, _T), (_T, _T), (_T, 1.2)],
        *[(-_T, 1.2), (-_T, _T), (-1.2, _T), (-1.2, -_T), (-_T, -_T), (-_T, -1.2)],
    ],
}
SHAPES = tuple(_SHAPES)


class Anchor(NamedTuple):
    """A point that wants a label: its position, text, radius of its mark and CSS class of the label."""

    x: float
    y: float
    text: str
    radius: float
    class_: str


class Label(NamedTuple):
    """A placed label: its box, the anchor it belongs to, and whether it needs a leader line."""

    box: Box
    anchor: Anchor
    is_far: bool


_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (0.7, -0.7), (0.7, 0.7), (-0.7, -0.7), (-0.7, 0.7))
_REACHES = (4, 12, 24, 40, 60)


def _candidates(anchor: Anchor, size: float, frame: Box) -> list[tuple[Box, float, bool]]:
    """Boxes around a mark with their price; those above and below slide sideways to stay in the frame."""
    width = len(anchor.text) * size * CHARACTER_WIDTH_EM
    height = size * 1.15
    boxes = []
    for reach in _REACHES:
        for preference, (dx, dy) in enumerate(_DIRECTIONS):
            x = anchor.x + dx * (anchor.radius + reach)
            y = anchor.y + dy * (anchor.radius + reach)
            left = x if dx > 0 else x - width if dx < 0 else x - width / 2
            if dy:
                left = max(frame.left, min(left, frame.right - width))
            top = y if dy > 0 else y - height if dy < 0 else y - height / 2
            cost = reach * 2.0 + preference * 1.5
            boxes.append((Box(left, top, left + width, top + height), cost, reach > _REACHES[1]))
    return boxes


def place_labels(
    anchors: Sequence[Anchor], obstacles: Sequence[Box], frame: Box, size: float, sweeps: int = 4
) -> list[Label]:
    """Find a place for each label near its mark, clear of marks, lines and other labels.

    Args:
        anchors: the points, most important first.
        obstacles: boxes to keep clear, in SVG units (marks, samples along lines).
        frame: labels stay inside it.
        size: font size, in SVG units.
        sweeps: rounds of improvement after the first placement.

    Returns:
        One label for each anchor, in order. Deterministic.
    """
    options = [
        [
            (box, cost + _fixed_cost(box, obstacles, frame), far)
            for box, cost, far in _candidates(anchor, size, frame)
        ]
        for anchor in anchors
    ]
    chosen: list[tuple[Box, float, bool] | None] = [None] * len(anchors)
    for _ in range(sweeps + 1):
        for index, candidates in enumerate(options):
            others = [option[0] for place, option in enumerate(chosen) if option and place != index]
            chosen[index] = min(candidates, key=_total_cost(others))
    return [
        Label(option[0], anchor, option[2]) for anchor, option in zip(anchors, chosen, strict=True) if option
    ]


def _fixed_cost(box: Box, obstacles: Sequence[Box], frame: Box) -> float:
    covered = sum(box.overlap(obstacle) for obstacle in obstacles)
    outside = box.area() - box.overlap(frame)
    return covered * 2.0 + outside * 50.0


def _total_cost(others: Sequence[Box]) -> Callable[[tuple[Box, float, bool]], float]:
    return lambda option: option[1] + 8.0 * sum(option[0].overlap(other) for other in others)


_MAX_SAMPLES = 256
"""Most boxes along one straight piece; enough for the diagonal of any plot."""


def line_obstacles(points: Sequence[tuple[float, float]], spacing: float = 7, radius: float = 3) -> list[Box]:
    """Small boxes along a connected line, so that labels keep clear of it."""
    boxes = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        # An interval far wider than the axes ends far outside of the plot, and would be sampled there by the million.
        count = max(1, min(_MAX_SAMPLES, int(math.hypot(x1 - x0, y1 - y0) / spacing)))
        for index in range(count + 1):
            boxes.append(around(x0 + (x1 - x0) * index / count, y0 + (y1 - y0) * index / count, radius))
    return boxes


def draw_label(label: Label, size: float) -> Markup:
    """Text of a placed label, with a thin leader line when it stands away from its mark."""
    box, anchor = label.box, label.anchor
    middle = (box.top + box.bottom) / 2
    sides = {"start": box.left, "end": box.right, "middle": (box.left + box.right) / 2}
    side = "start" if box.left >= anchor.x else "end" if box.right <= anchor.x else "middle"
    x = sides[side]
    text = tag(
        "text", anchor.text, x=x, y=middle + size * 0.35, text_anchor=side, class_=f"label {anchor.class_}"
    )
    if not label.is_far:
        return text
    near_y = min(max(anchor.y, box.top), box.bottom)
    return tag("line", x1=anchor.x, y1=anchor.y, x2=x, y2=near_y, class_="leader") + text
