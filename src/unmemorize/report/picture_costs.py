"""The tables of what a picture audit cost, and what localization found for every prompt.

Nothing is computed here but medians and sums of what was counted. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from unmemorize.records import LocalizedPrompt, PictureAudit
from unmemorize.report.measures import Cell, number_text
from unmemorize.report.states import GROUPS
from unmemorize.report.tables import Column, Row, Table, clip, time_text

SHOWN_ROWS = 50
MAX_PROMPT_ROWS = 2000


def cost_table(audit: PictureAudit, ident: str) -> Table | None:
    """What localization cost, as medians and sums; None when nothing was localized."""
    kinds: list[tuple[str, Callable[[LocalizedPrompt], bool]]] = [
        ("Memorized prompts", lambda one: one.is_memorized),
        ("Other prompts", lambda one: not one.is_memorized),
    ]
    rows = []
    for name, belongs in kinds:
        prompts = [one for one in audit.localized if belongs(one)]
        if prompts:
            rows.append(Row(name=name, hint=f"{len(prompts)} prompts", cells=tuple(_cost_cells(prompts))))
    if not rows:
        return None
    names = ("median", "in all", "median", "in all")
    return Table(
        ident=ident,
        caption="Localizing",
        spans=(("", 1), ("Sample-forwards", 2), ("Seconds", 2)),
        columns=(Column(name="Prompts", is_number=False), *[Column(name=name) for name in names]),
        rows=tuple(rows),
        note="A sample-forward is one pass of the denoiser for one sample. Brackets: smallest and largest.",
    )


def _cost_cells(prompts: Sequence[LocalizedPrompt]) -> list[Cell]:
    forwards = [one.sample_forwards for one in prompts]
    seconds = [one.seconds for one in prompts if math.isfinite(one.seconds)] or [0.0]
    return [
        Cell(
            text=f"{median(forwards):,.0f}",
            value=median(forwards),
            detail=f"[{min(forwards):,}, {max(forwards):,}]",
        ),
        Cell(text=f"{sum(forwards):,}", value=sum(forwards)),
        Cell(
            text=f"{median(seconds):.3g}\N{NO-BREAK SPACE}s",
            value=median(seconds),
            detail=f"[{min(seconds):.3g}, {max(seconds):.3g}]",
        ),
        Cell(text=time_text(sum(seconds)), value=sum(seconds)),
    ]


def generation_table(audit: PictureAudit, ident: str) -> Table | None:
    """Neurons off, pictures and time of each state; None without states."""
    if not audit.states:
        return None
    rows = []
    for state in audit.states:
        count = sum(group.num_prompts * group.pictures_per_prompt for group in state.groups)
        each = state.seconds / count if count else 0.0
        rows.append(
            Row(
                name=clip(state.label, 80),
                cells=(
                    Cell(text=f"{state.num_neurons:,}", value=state.num_neurons),
                    Cell(text=f"{count:,}", value=count),
                    _time_cell(state.seconds, time_text(state.seconds)),
                    _time_cell(each, f"{each:.3g}\N{NO-BREAK SPACE}s"),
                ),
            )
        )
    names = ("Neurons off", "Pictures", "Time", "Per picture")
    return Table(
        ident=ident,
        caption="Making the pictures",
        columns=(Column(name="State", is_number=False), *[Column(name=name) for name in names]),
        rows=tuple(rows),
    )


def _time_cell(seconds: float, text: str) -> Cell:
    return Cell(text=text, value=seconds) if seconds > 0 and math.isfinite(seconds) else Cell(text="")


def prompts_table(audit: PictureAudit, ident: str) -> Table | None:
    """One row for each prompt that was localized or passed through the gate; None when there is none."""
    shown = audit.localized[:MAX_PROMPT_ROWS]
    if not shown:
        return None
    columns = (
        Column(name="Prompt", is_number=False),
        Column(name="Group", is_number=False),
        Column(name="Memorized", is_number=False),
        Column(name="Found"),
        Column(name="Chosen"),
        Column(name="Gate"),
        Column(name="Found off"),
        Column(name="Chosen off"),
        Column(name="Threshold"),
        Column(name="Forwards"),
        Column(name="Seconds"),
    )
    left_out = len(audit.localized) - len(shown)
    notes = [
        "Found: candidates that broke the memory together; chosen: those left. Scores are similarities, unitless. "
        "Forwards: passes of the denoiser times samples."
    ]
    if any(one.is_replaced for one in shown):
        notes.append("A star: no candidate set got below the threshold, so the score reached took its place.")
    if left_out:
        notes.append(f"{left_out:,} more prompts are in audit.json.")
    return Table(
        ident=ident,
        caption="Localization of each prompt",
        columns=columns,
        spans=(("", 3), ("Neurons", 2), ("Score", 4), ("Cost", 2)),
        rows=tuple(Row(name=clip(one.prompt), cells=tuple(_prompt_cells(one))) for one in shown),
        is_sortable=True,
        shown_rows=SHOWN_ROWS,
        note=" ".join(notes),
    )


def _prompt_cells(one: LocalizedPrompt) -> list[Cell]:
    nothing = Cell(text="")
    memorized = Cell(text="yes" if one.is_memorized else "no", value="yes" if one.is_memorized else "no")
    cells = [Cell(text=GROUPS[one.group], value=one.group), memorized]
    if one.is_memorized:
        threshold = _score_cell(one.threshold, "*" if one.is_replaced else "")
        counts = [Cell(text=f"{count:,}", value=count) for count in (one.num_initial, one.num_refined)]
        cells += [*counts, _score_cell(one.best_pair)]
        cells += [_score_cell(one.initial_score), _score_cell(one.refined_score), threshold]
    else:
        cells += [nothing, nothing, _score_cell(one.best_pair), nothing, nothing, nothing]
    cells.append(Cell(text=f"{one.sample_forwards:,}", value=one.sample_forwards))
    cells.append(_time_cell(one.seconds, f"{one.seconds:.3g}"))
    return cells


def _score_cell(value: float, mark: str = "") -> Cell:
    if not math.isfinite(value):
        return Cell(text="not a finite number", is_refused=True)
    return Cell(text=f"{number_text(value, 'score')}{mark}", value=value)
