"""Two charts of localization's scores: which prompts pass the gate, and what switching neurons off does to them.

The gate compares the pictures of one prompt with each other, so a high score means that different noise leads to
the same picture. After that the score compares a prompt's start with neurons off and on: low means that the memory
is broken. Both are unitless similarities with one threshold each. Nothing is computed here. Source: ours; the score
is that of NeMo, arXiv 2406.02366.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from unmemorize.records import LocalizedPrompt, PictureAudit
from unmemorize.report import plots, rows
from unmemorize.report.measures import number_text
from unmemorize.report.page import Plot
from unmemorize.report.plots import tag
from unmemorize.report.rows import RowLayout, Rows
from unmemorize.report.states import GROUPS
from unmemorize.report.tables import clip

MAX_EFFECT_ROWS = 30
MAX_TITLES = 400


def gate_plot(audit: PictureAudit, ident: str) -> Plot | None:
    """The gate's scores by group, one dot a prompt, with its threshold; None without scores."""
    found = [one for one in audit.localized if math.isfinite(one.best_pair)]
    if not found:
        return None
    groups = {name: [one for one in found if one.group == name] for name in GROUPS}
    groups = {name: sorted(prompts, key=_best_pair) for name, prompts in groups.items() if prompts}
    pictures = tuple(
        _gate_picture(groups, audit.gate_threshold, layout, f"{ident}-{place}")
        for place, layout in enumerate((rows.WIDE._replace(label_width=140), rows.NARROW))
    )
    note = (
        "One dot is one prompt; its score is the largest similarity between two of its samples after the first step "
        "of denoising. Filled dots passed the gate and were localized."
    )
    return Plot(pictures=pictures, note=note)


def _best_pair(one: LocalizedPrompt) -> float:
    return one.best_pair


def _gate_picture(
    groups: dict[str, list[LocalizedPrompt]], threshold: float | None, layout: RowLayout, ident: str
) -> Markup:
    gate = [threshold] if threshold is not None and math.isfinite(threshold) else []
    scores = [one.best_pair for prompts in groups.values() for one in prompts]
    low, high = rows.unit_range([*scores, *gate])
    passed = {name: sum(one.is_memorized for one in prompts) for name, prompts in groups.items()}
    notes = tuple(f"{passed[name]} of {len(prompts)} passed" for name, prompts in groups.items())
    chart = Rows(
        layout=layout,
        labels=tuple(GROUPS[name] for name in groups),
        notes=notes,
        row_height=64,
        low=low,
        high=high,
    )
    has_titles = len(scores) <= MAX_TITLES and not layout.is_narrow
    members = list(groups.items())

    def marks(row: int) -> Markup:
        name, prompts = members[row]
        return _dots(prompts, chart, row, name, has_titles)

    return rows.draw(
        chart,
        marks,
        ident=ident,
        title="Scores of the gate by group of prompts",
        description="; ".join(f"{GROUPS[name]}: {note}" for name, note in zip(groups, notes, strict=True)),
        over=lambda chart: plots.join(
            [rows.threshold_line(chart, value, f"gate {number_text(value, 'score')}") for value in gate]
        ),
    )


def _dots(prompts: Sequence[LocalizedPrompt], chart: Rows, row: int, group: str, has_titles: bool) -> Markup:
    """Dots stacked where they would cover each other; a crowd is pressed together until it fits its row."""
    radius = 3.4 if chart.layout.is_narrow else 4.6
    box, pitch = chart.box(row), 2 * radius + 1
    columns: dict[int, list[LocalizedPrompt]] = {}
    for one in prompts:
        columns.setdefault(round(chart.scale(one.best_pair) / pitch), []).append(one)
    highest = max(map(len, columns.values()))
    rise = min(pitch, (box.bottom - box.top - pitch - 4) / max(highest - 1, 1))
    parts = [tag("line", x1=box.left, x2=box.right, y1=box.bottom - 2, y2=box.bottom - 2, class_="base")]
    for column, stack in columns.items():
        for place, one in enumerate(stack):
            words = f"{number_text(one.best_pair, 'score')}: {clip(one.prompt, 100)}"
            dot = tag(
                "circle",
                tag("title", words) if has_titles else "",
                cx=column * pitch,
                cy=box.bottom - 3 - radius - place * rise,
                r=radius,
                class_=f"dot g-{group}{'' if one.is_memorized else ' open'}",
            )
            parts.append(dot)
    return plots.join(parts)


def effect_plot(audit: PictureAudit, ident: str) -> Plot | None:
    """Each memorized prompt's score: as it is, with all candidates off, with the chosen neurons off."""
    found = [one for one in audit.localized if one.is_memorized and _is_finite(one)]
    if not found:
        return None
    found.sort(key=lambda one: (one.threshold - one.refined_score, one.prompt))
    shown = found[:MAX_EFFECT_ROWS]
    pictures = tuple(
        _effect_picture(shown, audit.gate_threshold, layout, f"{ident}-{place}")
        for place, layout in enumerate((rows.WIDE._replace(label_width=330), rows.NARROW))
    )
    broken = sum(one.refined_score < one.threshold and not one.is_replaced for one in found)
    notes = [f"With the chosen neurons off {broken} of {len(found)} scores are below the threshold."]
    replaced = sum(one.is_replaced for one in found)
    if replaced:
        notes.append(
            f"For {replaced} no candidate set got there; the score reached took the threshold's place (short line)."
        )
    if len(shown) < len(found):
        notes.append(f"Shown are the {len(shown)} that come off worst; the table has all.")
    return Plot(pictures=pictures, note=" ".join(notes))


def _is_finite(one: LocalizedPrompt) -> bool:
    scores = (one.best_pair, one.initial_score, one.refined_score, one.threshold)
    return all(map(math.isfinite, scores))


def _effect_picture(
    shown: Sequence[LocalizedPrompt], threshold: float | None, layout: RowLayout, ident: str
) -> Markup:
    gate = [threshold] if threshold is not None and math.isfinite(threshold) else []
    scores = [
        value for one in shown for value in (one.best_pair, one.initial_score, one.refined_score, one.threshold)
    ]  # fmt: skip
    low, high = rows.unit_range([*scores, *gate])
    chart = Rows(
        layout=layout,
        labels=tuple(one.prompt for one in shown),
        notes=("",) * len(shown),
        row_height=22 if layout.is_narrow else 27,
        low=low,
        high=high,
    )
    return rows.draw(
        chart,
        lambda row: _effect_marks(shown[row], chart, row, gate),
        ident=ident,
        title="Score of each memorized prompt before and after neurons are off",
        description="; ".join(_effect_words(one) for one in shown),
        over=lambda chart: plots.join(
            [rows.threshold_line(chart, value, f"threshold {number_text(value, 'score')}") for value in gate]
        ),
    )


def _effect_words(one: LocalizedPrompt) -> str:
    before, initial, refined = (
        number_text(value, "score") for value in (one.best_pair, one.initial_score, one.refined_score)
    )
    return (
        f"{clip(one.prompt, 60)}: {before}, {initial} with {one.num_initial} candidates off, "
        f"{refined} with {one.num_refined} chosen off"
    )


def _effect_marks(one: LocalizedPrompt, chart: Rows, row: int, gate: Sequence[float]) -> Markup:
    box, radius = chart.box(row), 4.2 if chart.layout.is_narrow else 5.2
    y = (box.top + box.bottom) / 2
    before, initial, refined, own = (
        chart.scale(value) for value in (one.best_pair, one.initial_score, one.refined_score, one.threshold)
    )
    tone = "broken" if one.refined_score < one.threshold and not one.is_replaced else "kept"
    parts = [tag("line", x1=before, x2=refined, y1=y, y2=y, class_=f"effect {tone}")]
    if one.is_replaced or not gate or abs(one.threshold - gate[0]) > 5e-4:
        parts.append(tag("line", x1=own, x2=own, y1=y - 8, y2=y + 8, class_="threshold own"))
    parts += [
        plots.mark("circle", before, y, radius, "mark-was"),
        plots.mark("triangle", initial, y, radius * 0.8, "candidates"),
        plots.mark("diamond", refined, y, radius, f"chosen {tone}"),
    ]
    return tag("g", tag("title", _effect_words(one)) + plots.join(parts))
