"""The tables of a picture audit: figures by state, quality of whole sets, cost, prompts and neurons.

Nothing is computed here but medians and sums of what was counted. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from unmemorize.records import LocalizedPrompt, Measure, PictureAudit, PictureGroup, PictureState, Similarity
from unmemorize.report.measures import Cell, Unit, measure_cell, number_text
from unmemorize.report.states import GROUPS
from unmemorize.report.tables import Column, Row, Table, clip, time_text

SHOWN_ROWS = 50
MAX_PROMPT_ROWS = 2000
SIMILARITIES: dict[str, tuple[str, str, Unit, str]] = {
    "copy_rate_frac": ("Copied", "", "percent", "repeated"),
    "copy_similarity": ("Copy similarity", "to training picture", "similarity", "repeated"),
    "kept_similarity": ("Kept", "same seed, to before", "similarity", "validation"),
    "seed_similarity": ("Between seeds", "low: varied", "similarity", ""),
}
QUALITIES: dict[str, tuple[str, Unit]] = {
    "alignment": ("Alignment", "similarity"),
    "fid": ("FID", "distance"),
    "kid": ("KID", "distance"),
}


def similarity_table(audit: PictureAudit, result_state: str, ident: str) -> Table | None:
    """Copies, change and variety by state, group and measure; None when nothing was measured."""
    every = [
        (state, group, one) for state in audit.states for group in state.groups for one in group.similarities
    ]
    if not every:
        return None
    names = list(dict.fromkeys([*audit.measures, *(one.measure for _, _, one in every)]))
    found = sorted(every, key=lambda row: names.index(row[2].measure))
    fields = [name for name in SIMILARITIES if any(getattr(one, name) is not None for _, _, one in found)]
    has_measures = len({one.measure for _, _, one in found}) > 1
    rows = []
    for place, (state, group, one) in enumerate(found):
        starts = place == 0 or found[place - 1][0] is not state or found[place - 1][2].measure != one.measure
        cells = [Cell(text=GROUPS[group.group], value=group.group)]
        cells += [Cell(text=clip(one.measure, 40), value=one.measure)] if has_measures else []
        cells += [_similarity_cell(one, name) for name in fields]
        cells.append(Cell(text=str(group.num_prompts), value=group.num_prompts))
        rows.append(_state_row(state, cells, result_state, starts))
    columns = [Column(name="State", is_number=False), Column(name="Group", is_number=False)]
    columns += [Column(name="Measure", is_number=False)] if has_measures else []
    columns += [
        Column(name=SIMILARITIES[name][0], hint=SIMILARITIES[name][1]) for name in fields
    ] + [Column(name="Prompts")]  # fmt: skip
    return Table(
        ident=ident,
        caption="Similarity by state and group"
        + ("" if has_measures else f", by {clip(found[0][2].measure, 60)}"),
        columns=tuple(columns),
        rows=tuple(rows),
        is_sortable=True,
        shown_rows=sum(one.measure == found[0][2].measure for _, _, one in found),
        note="Brackets: 95% intervals over prompts. Empty cells: the training picture is not known, or there is "
        "nothing before to compare with.",
    )


def _similarity_cell(one: Similarity, name: str) -> Cell:
    measure: Measure | None = getattr(one, name)
    _, _, unit, tone = SIMILARITIES[name]
    return Cell(text="") if measure is None else measure_cell(measure, unit, full=1.0, tone=tone)


def _state_row(state: PictureState, cells: Sequence[Cell], result_state: str, starts: bool) -> Row:
    return Row(
        name=clip(state.label, 80),
        cells=tuple(cells),
        is_strong=state.state == result_state,
        starts_block=starts,
    )


def quality_table(audit: PictureAudit, result_state: str, ident: str) -> Table | None:
    """Alignment with the prompt and distances between sets of pictures, by state; None when none was asked for."""
    found: dict[tuple[str, str], PictureGroup] = {
        (state.state, group.group): group for state in audit.states for group in state.groups
    }
    columns = [
        (name, group)
        for name in QUALITIES
        for group in GROUPS
        if any(getattr(one, name) is not None for (_, member), one in found.items() if member == group)
    ]
    if not columns:
        return None
    rows = []
    for state in audit.states:
        cells = [_quality_cell(found.get((state.state, group)), name) for name, group in columns]
        rows.append(_state_row(state, cells, result_state, False))
    spans = [(QUALITIES[field][0], [name for name, _ in columns].count(field)) for field in QUALITIES]
    return Table(
        ident=ident,
        caption="Quality by state",
        columns=(
            Column(name="State", is_number=False),
            *[Column(name=GROUPS[group]) for _, group in columns],
        ),
        rows=tuple(rows),
        spans=(("", 1), *[(name, count) for name, count in spans if count]),
        is_sortable=True,
        note="Alignment: similarity of prompt and picture, higher is better. FID and KID: distance of two sets, lower "
        "is better.",
    )


def _quality_cell(group: PictureGroup | None, name: str) -> Cell:
    measure: Measure | None = getattr(group, name) if group else None
    return Cell(text="") if measure is None else measure_cell(measure, QUALITIES[name][1])


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
