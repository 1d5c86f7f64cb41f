"""The tables of a picture audit's figures: copies, change and variety by state, and quality of whole sets.

Figures that no group has are left out, column and all. Nothing is computed here. Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from unmemorize.records import Measure, PictureAudit, PictureGroup, PictureState, Similarity
from unmemorize.report.measures import Cell, Unit, measure_cell
from unmemorize.report.states import GROUPS
from unmemorize.report.tables import Column, Row, Table, clip


class Quantity(NamedTuple):
    """How a figure of a record is shown; a `tone` draws a bar from 0 to 1."""

    name: str
    hint: str
    unit: Unit
    tone: str | None = None


COPIES: dict[str, Quantity] = {
    "copy_rate_frac": Quantity("Copied", "of prompts", "percent", "repeated"),
    "copy_rate_change_frac": Quantity("Change", "of copied, points", "points"),
    "copy_rate_per_picture_frac": Quantity("Pictures copied", "", "percent", "repeated"),
    "copy_similarity": Quantity("Similarity", "to training picture", "similarity", "repeated"),
    "copy_similarity_change": Quantity("Similarity change", "from before", "difference"),
    "typical_copy_similarity": Quantity("Median seed", "similarity", "similarity", "repeated"),
}
CHANGES: dict[str, Quantity] = {
    "kept_similarity": Quantity("Kept", "to before, same seed", "similarity", "validation"),
    "kept_beyond_placebo": Quantity("Beyond placebo", "difference of kept", "difference"),
    "seed_similarity": Quantity("Between seeds", "lower is more varied", "similarity", ""),
}
QUALITIES: dict[str, Quantity] = {
    "alignment": Quantity("Alignment", "", "similarity"),
    "alignment_change": Quantity("Change of alignment", "", "difference"),
    "denoising_loss": Quantity("Denoising loss", "", "distance"),
    "denoising_loss_change": Quantity("Change of loss", "", "distance"),
    "fid": Quantity("FID", "", "distance"),
    "kid": Quantity("KID", "", "distance"),
}
Found = tuple[PictureState, PictureGroup, Similarity]


def copies_table(audit: PictureAudit, result_state: str, ident: str) -> Table | None:
    """How much of the training pictures comes out, by state, group and measure; None when nothing was measured."""
    return _similarity_table(audit, result_state, ident, COPIES, "Likeness to the training pictures")


def changes_table(audit: PictureAudit, result_state: str, ident: str) -> Table | None:
    """How pictures change and how varied they are, by state, group and measure; None when nothing was measured."""
    return _similarity_table(audit, result_state, ident, CHANGES, "Change of the pictures, and their variety")


def _similarity_table(
    audit: PictureAudit, result_state: str, ident: str, quantities: Mapping[str, Quantity], caption: str
) -> Table | None:
    """One row for each state, group and measure that has any of the figures; the first measure's rows come first."""
    every = [
        (state, group, one)
        for state in audit.states
        for group in state.groups
        for one in group.similarities
        if any(_measure(one, name) is not None for name in quantities)
    ]
    if not every:
        return None
    names = list(dict.fromkeys([*audit.measures, *(one.measure for _, _, one in every)]))
    found: list[Found] = sorted(every, key=lambda row: names.index(row[2].measure))
    fields = [name for name in quantities if any(_measure(one, name) is not None for _, _, one in found)]
    measures = [one.measure for _, _, one in found]
    has_measures = len(set(measures)) > 1
    rows = []
    for place, (state, group, one) in enumerate(found):
        cells = [Cell(text=GROUPS[group.group], value=group.group)]
        cells += [Cell(text=clip(one.measure, 40), value=one.measure)] if has_measures else []
        cells += [_cell(one, name, quantities[name]) for name in fields]
        cells.append(Cell(text=str(group.num_prompts), value=group.num_prompts))
        starts = not place or found[place - 1][0] is not state or measures[place - 1] != one.measure
        rows.append(_state_row(state, cells, result_state, starts))
    heads = ("State", "Group", "Measure") if has_measures else ("State", "Group")
    return Table(
        ident=ident,
        caption=caption + ("" if has_measures else f", by {clip(measures[0], 60)}"),
        columns=(
            *[Column(name=name, is_number=False) for name in heads],
            *[Column(name=quantities[name].name, hint=quantities[name].hint) for name in fields],
            Column(name="Prompts"),
        ),
        rows=tuple(rows),
        is_sortable=True,
        shown_rows=measures.count(measures[0]),
        note="Brackets: 95% intervals over prompts.",
    )


def _measure(record: Similarity | PictureGroup, name: str) -> Measure | None:
    """A figure of a record by name; None where it was not measured."""
    found: Measure | None = getattr(record, name, None)
    return found


def _cell(record: Similarity | PictureGroup | None, name: str, quantity: Quantity) -> Cell:
    measure = _measure(record, name) if record else None
    if measure is None:
        return Cell(text="")
    full = None if quantity.tone is None else 1.0
    return measure_cell(measure, quantity.unit, full=full, tone=quantity.tone or "")


def _state_row(state: PictureState, cells: Sequence[Cell], result_state: str, starts: bool) -> Row:
    return Row(
        name=clip(state.label, 80),
        cells=tuple(cells),
        is_strong=state.state == result_state,
        starts_block=starts,
    )


def quality_table(audit: PictureAudit, result_state: str, ident: str) -> Table | None:
    """Alignment with prompts, denoising loss, distances between sets of pictures, by state; None without any."""
    found: dict[tuple[str, str], PictureGroup] = {
        (state.state, group.group): group for state in audit.states for group in state.groups
    }
    columns = [
        (name, group)
        for name in QUALITIES
        for group in GROUPS
        if any(_measure(one, name) is not None for (_, member), one in found.items() if member == group)
    ]
    if not columns:
        return None
    rows = []
    for state in audit.states:
        cells = [_cell(found.get((state.state, group)), name, QUALITIES[name]) for name, group in columns]
        rows.append(_state_row(state, cells, result_state, False))
    spans = [(QUALITIES[field].name, [name for name, _ in columns].count(field)) for field in QUALITIES]
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
        note="Alignment: similarity of prompt and picture, higher is better. Denoising loss: error on the group's own "
        "pictures; of ordinary pictures it is the validation loss, lower is better. FID and KID: distance of two sets, "
        "lower is better.",
    )
