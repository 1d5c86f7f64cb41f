"""Charts made of rows on one x axis: a label for each row, marks beside it on wide and below it on narrow screens.

Text keeps its size because every chart is drawn once for each width. It knows nothing about audits. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from unmemorize.report import plots
from unmemorize.report.plots import CHARACTER_WIDTH_EM, Box, Scale, tag


class RowLayout(NamedTuple):
    """Size in SVG units, which are CSS pixels at natural size; `label_width` 0 puts labels above their rows."""

    width: float
    font: float
    label_width: float
    right: float
    is_narrow: bool

    @property
    def class_(self) -> str:
        """CSS classes of the picture: which of the two screens shows it."""
        return "rows narrow" if self.is_narrow else "rows wide"


WIDE = RowLayout(1040, 14, 250, 16, False)
NARROW = RowLayout(352, 12, 0, 10, True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Where everything of a chart stands."""

    layout: RowLayout
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    row_height: float
    low: float
    high: float
    top: float = 22.0

    @property
    def label_height(self) -> float:
        """Room that a label takes above its row."""
        return 0.0 if self.layout.label_width else self.layout.font * 1.9

    @property
    def frame(self) -> Box:
        """The box of all rows, beside the labels."""
        height = (self.row_height + self.label_height) * len(self.labels)
        left = self.layout.label_width or 8
        return Box(left, self.top, self.layout.width - self.layout.right, self.top + height)

    @property
    def scale(self) -> Scale:
        """Data to SVG units along x."""
        return Scale(self.low, self.high, self.frame.left, self.frame.right)

    def box(self, row: int) -> Box:
        """The box of one row's marks, without its label."""
        top = self.top + (self.row_height + self.label_height) * row + self.label_height
        return Box(self.frame.left, top, self.frame.right, top + self.row_height)


def draw(
    rows: Rows,
    marks: Callable[[int], Markup],
    *,
    ident: str,
    title: str,
    description: str,
    over: Callable[[Rows], Markup] | None = None,
    has_numbers: bool = True,
) -> Markup:
    """Draw a chart of rows.

    Args:
        rows: its measures and labels.
        marks: gives what stands in a row, by its number.
        ident: unique id of the picture in its page.
        title: what it shows.
        description: what a reader who cannot see it should know.
        over: gives what is drawn between grid and marks, such as a threshold.
        has_numbers: whether the x axis has lines and numbers.
    """
    layout, frame = rows.layout, rows.frame
    target = 5 if layout.is_narrow else 10
    parts = [plots.vertical_grid(rows.scale, frame, layout.font, target)] if has_numbers else []
    parts += [over(rows)] if over else []
    for row in range(len(rows.labels)):
        parts += [*_label(rows, row), marks(row)]
    height = frame.bottom + layout.font * 1.8
    return plots.picture(
        layout.width,
        height,
        plots.join([part for part in parts if part]),
        ident=ident,
        title=title,
        description=description,
        class_=layout.class_,
    )


def _label(rows: Rows, row: int) -> list[Markup]:
    """Label and quiet note of a row: left of it, or above it with the note at the right end."""
    layout, box, note = rows.layout, rows.box(row), rows.notes[row]
    space = (layout.label_width - 14) if layout.label_width else layout.width - 20
    note_space = (len(note) + 2) * layout.font * CHARACTER_WIDTH_EM if note and not layout.label_width else 0
    text = clipped(rows.labels[row], space - note_space, layout.font)
    if layout.label_width:
        middle = (box.top + box.bottom) / 2 + layout.font * 0.35
        y = middle - (layout.font * 0.6 if note else 0)
        parts = [tag("text", text, x=0, y=y, class_="row-label")]
        return [*parts, tag("text", note, x=0, y=y + layout.font * 1.25, class_="note")] if note else parts
    y = box.top - layout.font * 0.4
    parts = [tag("text", text, x=0, y=y, class_="row-label")]
    return [*parts, tag("text", note, x=layout.width - 2, y=y, class_="note end")] if note else parts


def clipped(text: str, width: float, font: float) -> str:
    """The beginning of a text that surely fits, by the width of an average character."""
    room = max(4, int(width / (font * 0.56)))
    return text if len(text) <= room else text[: room - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def threshold_line(rows: Rows, value: float, words: str) -> Markup:
    """A vertical line through all rows with its words above the frame."""
    x, font = rows.scale(value), rows.layout.font
    width = len(words) * font * CHARACTER_WIDTH_EM
    side = "end" if x + width / 2 > rows.layout.width else "middle"
    line = tag("line", x1=x, x2=x, y1=rows.frame.top - 4, y2=rows.frame.bottom, class_="threshold")
    return line + tag("text", words, x=x, y=rows.frame.top - 9, class_=f"threshold-label {side}")


def unit_range(values: Sequence[float]) -> tuple[float, float]:
    """0 to 1 where similarities stay in it, so that charts compare at a glance; else the padded range."""
    if all(-0.001 <= value <= 1.001 for value in values):
        return 0.0, 1.0
    return plots.padded_range([*values, 0.0, 1.0], 0.04)
