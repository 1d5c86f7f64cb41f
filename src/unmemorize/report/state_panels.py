"""States side by side, in small panels: copies of targets, memory that should stay, change of ordinary pictures.

A panel is one figure with its interval for every state, so the result, its placebo and its rivals compare at a glance.
Every figure is by the audit's first measure. Nothing is computed here. Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from unmemorize.records import Group, Measure, PictureAudit, PictureState, Similarity
from unmemorize.report import plots
from unmemorize.report.measures import Cell, Unit, is_given, measure_cell
from unmemorize.report.plots import Box, Scale, tag
from unmemorize.report.rows import clipped, unit_range

MAX_STATES = 16
BEFORE = "before"


@dataclass(frozen=True, slots=True, kw_only=True)
class Aspect:
    """One figure of one group that decides about a removal; `wish` says which way is better."""

    group: Group
    field: str
    unit: Unit
    title: str
    wish: str


ASPECTS = (
    Aspect(
        group="target",
        field="copy_rate_frac",
        unit="percent",
        title="Targets copied",
        wish="what should go: lower is better",
    ),
    Aspect(
        group="neighbour",
        field="copy_rate_frac",
        unit="percent",
        title="Neighbours copied",
        wish="other memory: should stay as before",
    ),
    Aspect(
        group="heldout",
        field="copy_rate_frac",
        unit="percent",
        title="Held-out copied",
        wish="memory of another origin: should stay as before",
    ),
    Aspect(
        group="ordinary",
        field="kept_similarity",
        unit="similarity",
        title="Ordinary pictures kept",
        wish="similarity to before, same seed: higher is better",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePanel:
    """One panel with its heading."""

    title: str
    wish: str
    picture: Markup


def result_state(audit: PictureAudit) -> str:
    """The state that the report is about: the one named in the settings, else "after", else the first other result."""
    names = [state.state for state in audit.states]
    named = audit.settings.get("headline_state")
    if isinstance(named, str) and named in names:
        return named
    if "after" in names:
        return "after"
    others = [state.state for state in audit.states if not state.is_rival and not _is_control(state.state)]
    return others[0] if others else ""


def _is_control(name: str) -> bool:
    return name == BEFORE or name.startswith(("placebo", "twin"))


def first_similarity(audit: PictureAudit, state: PictureState, group: str) -> Similarity | None:
    """A group's figures by the audit's first measure, or by the first there is; None where there are none."""
    first = next(iter(audit.measures), "")
    found = [one for member in state.groups if member.group == group for one in member.similarities]
    return next((one for one in found if one.measure == first), found[0] if found else None)


def aspect_measure(audit: PictureAudit, state: PictureState, aspect: Aspect) -> Measure | None:
    """The figure of an aspect in a state; None where it was not measured."""
    found = first_similarity(audit, state, aspect.group)
    measure: Measure | None = getattr(found, aspect.field) if found else None
    return measure


def aspects_of(audit: PictureAudit) -> tuple[Aspect, ...]:
    """The aspects; a share that is refused in every state, for too few prompts, gives way to the mean similarity."""

    def shown(aspect: Aspect) -> Aspect:
        found = [aspect_measure(audit, state, aspect) for state in audit.states]
        by_similarity = replace(
            aspect,
            field="copy_similarity",
            unit="similarity",
            title=aspect.title.replace("copied", "like their training picture"),
        )
        known = [aspect_measure(audit, state, by_similarity) for state in audit.states]
        is_refused = any(found) and not any(measure and is_given(measure) for measure in found)
        is_better = is_refused and any(measure and is_given(measure) for measure in known)
        return by_similarity if aspect.field == "copy_rate_frac" and is_better else aspect

    return tuple(shown(aspect) for aspect in ASPECTS)


def aspect_cell(audit: PictureAudit, state: PictureState, aspect: Aspect) -> Cell | None:
    """The same as a cell; None where it was not measured."""
    measure = aspect_measure(audit, state, aspect)
    return None if measure is None else measure_cell(measure, aspect.unit)


def state_panels(audit: PictureAudit, ident: str) -> tuple[StatePanel, ...]:
    """A panel for each aspect that two states or more were measured in."""
    panels: list[StatePanel] = []
    for aspect in aspects_of(audit):
        found = [(state, aspect_measure(audit, state, aspect)) for state in audit.states[:MAX_STATES]]
        if sum(measure is not None for _, measure in found) > 1:
            picture = _panel(found, aspect, result_state(audit), f"{ident}-{len(panels)}")
            panels.append(StatePanel(title=aspect.title, wish=aspect.wish, picture=picture))
    return tuple(panels)


def _panel(
    found: Sequence[tuple[PictureState, Measure | None]], aspect: Aspect, result: str, ident: str
) -> Markup:
    width, font, row_height = 320.0, 13.0, 40.0
    frame = Box(6, 4, width - 6, 4 + row_height * len(found))
    values = [
        bound
        for _, measure in found
        if measure is not None and is_given(measure)
        for bound in (measure.value or 0.0, *(measure.ci95 or ()))
    ]
    scale = Scale(*unit_range(values), frame.left, frame.right)
    parts = [_axis(scale, frame, aspect, font)]
    words = []
    for place, (state, measure) in enumerate(found):
        cell = Cell(text="\N{EM DASH}") if measure is None else measure_cell(measure, aspect.unit)
        parts.append(_state_row(state, measure, cell, scale, frame.top + row_height * place, result, font))
        words.append(
            f"{state.label}: {'refused, ' if cell.is_refused else ''}{cell.text} {cell.detail}".strip()
        )
    return plots.picture(
        width,
        frame.bottom + font * 1.8,
        plots.join(parts),
        ident=ident,
        title=f"{aspect.title} by state",
        description="; ".join(words),
    )


def _axis(scale: Scale, frame: Box, aspect: Aspect, font: float) -> Markup:
    """Grid and numbers; in per cent where the figure is a fraction."""
    factor = 100.0 if aspect.unit == "percent" else 1.0
    shown = Scale(scale.low * factor, scale.high * factor, scale.start, scale.end)
    parts = []
    step = plots.tick_step(shown.low, shown.high, 4)
    for value in plots.nice_ticks(shown.low, shown.high, 4):
        x = shown(value)
        sign = "%" if aspect.unit == "percent" else ""
        side = "end" if x > frame.right - 12 else "start" if x < frame.left + 12 else "middle"
        parts.append(tag("line", x1=x, x2=x, y1=frame.top, y2=frame.bottom, class_="grid"))
        text = f"{plots.tick_text(value, step)}{sign}"
        parts.append(tag("text", text, x=x, y=frame.bottom + font * 1.3, class_=f"tick {side}"))
    return plots.join(parts)


def _state_row(
    state: PictureState,
    measure: Measure | None,
    cell: Cell,
    scale: Scale,
    top: float,
    result: str,
    font: float,
) -> Markup:
    """Label and figure on one line, mark and interval below them."""
    tone = "result" if state.state == result else "was" if state.state == BEFORE else "other"
    figure = "refused" if cell.is_refused else f"{cell.text} {cell.detail}".strip()
    room = scale.end - scale.start - (len(figure) + 2) * font * 0.56
    y, line = top + font * 1.15, top + 28
    parts = [
        tag("title", f"{state.label}: {figure if not cell.is_refused else cell.text}"),
        tag("text", clipped(state.label, room, font), x=scale.start, y=y, class_=f"row-label {tone}"),
        tag("text", figure, x=scale.end, y=y, class_=f"row-figure {tone} end"),
    ]
    if measure is not None and measure.value is not None and is_given(measure):
        if measure.ci95 and measure.method != "exact":
            low, high = (scale(bound) for bound in measure.ci95)
            parts.append(tag("line", x1=low, x2=high, y1=line, y2=line, class_=f"whisker {tone}"))
        parts.append(plots.mark("circle", scale(measure.value), line, 5, f"state-mark {tone}"))
    return tag("g", plots.join(parts))
