"""The tables of states: loss of every group in every state, and verbatim extraction.

Nothing is computed here but means over seeds (see measures.pooled). Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from unmemorize.records import Audit, Extraction, GroupResult, MethodResult, StateResult
from unmemorize.report.measures import Cell, Unit, measure_cell, pooled
from unmemorize.report.tables import Column, Row, Table

GROUPS = {
    "target": "Target",
    "neighbour": "Neighbour",
    "heldout": "Held-out",
    "ordinary": "Ordinary",
}
STATES = {
    "plain": "the model as it is",
    "off": "all sinks closed",
    "own": "each text's own sinks open",
    "foreign": "another text's sinks open",
    "all": "every sink open",
    "exclude": "chosen ids' sinks closed",
    "placebo": "as many random neurons closed",
}


def ordered_methods(audit: Audit, headline: str) -> list[MethodResult]:
    """The headline method first, then the others as listed."""
    return sorted(audit.methods, key=lambda result: result.method != headline)


def states_table(audit: Audit, headline: str, ident: str) -> Table | None:
    """Loss of every group in every state of every method; None when the audit has no states."""
    results = ordered_methods(audit, headline)
    groups = [name for name in GROUPS if any(name in _groups_of(result) for result in results)]
    if not groups:
        return None
    full = max(_all_losses(results), default=0.0)
    rows = []
    for result in results:
        for place, states in enumerate(_states_of(result)):
            cells = [_group_cell(states, group, full) for group in groups]
            rows.append(_state_row(result, states[0], cells, place, headline))
    return Table(
        ident=ident,
        caption="Loss in nats per token, by state and group of text",
        columns=(Column(name="Method and state", is_number=False), *_group_columns(results, groups)),
        rows=tuple(rows),
        note=POOLED_NOTE,
    )


POOLED_NOTE = (
    "Means over seeds; brackets are 95% intervals over documents (with several seeds the widest of theirs)."
)


def _group_columns(results: Sequence[MethodResult], groups: Sequence[str]) -> list[Column]:
    sizes: dict[str, int] = {}
    for result in results:
        for seed in result.seeds:
            for state in seed.states:
                for group in state.groups:
                    sizes.setdefault(group.group, group.num_examples)
    return [Column(name=GROUPS[name], hint=f"{sizes[name]} texts") for name in groups]


def _groups_of(result: MethodResult) -> set[str]:
    return {group.group for seed in result.seeds for state in seed.states for group in state.groups}


def _all_losses(results: Iterable[MethodResult]) -> list[float]:
    groups = [g for r in results for seed in r.seeds for state in seed.states for g in state.groups]
    return [group.loss_nats.value for group in groups if group.loss_nats.value is not None]


def _states_of(result: MethodResult) -> list[list[StateResult]]:
    """For each state, the same state of every seed."""
    if not result.seeds:
        return []
    keys = [(state.state, state.rescaled) for state in result.seeds[0].states]
    return [
        [state for seed in result.seeds for state in seed.states if (state.state, state.rescaled) == key]
        for key in dict.fromkeys(keys)
    ]


def _group_results(states: Sequence[StateResult], group: str) -> list[GroupResult]:
    return [result for state in states for result in state.groups if result.group == group]


def _group_cell(states: Sequence[StateResult], group: str, full: float) -> Cell:
    results = _group_results(states, group)
    if not results:
        return Cell(text="")
    tone = "repeated" if group == "target" else "validation" if group == "ordinary" else ""
    return measure_cell(pooled([result.loss_nats for result in results]), "loss", full=full, tone=tone)


def _state_row(
    result: MethodResult, state: StateResult, cells: Sequence[Cell], place: int, headline: str
) -> Row:
    label = result.label
    name = label if state.state == "plain" else f"{label}, {state.state}"
    hint = state.description or ("" if state.state == "plain" else STATES[state.state])
    if state.rescaled:
        hint = f"{hint}, rescaled".removeprefix(", ")
    return Row(
        name=name,
        hint=hint,
        cells=tuple(cells),
        is_strong=result.method == headline and bool(result.seeds) and state.state == result.seeds[0].state,
        starts_block=place == 0,
    )


def extraction_table(
    audit: Audit, headline: str, ident: str, groups: Sequence[str], caption: str
) -> Table | None:
    """Verbatim extraction by method and state; None when there is none for these groups."""
    rows, pairs = [], _extraction_pairs(audit, groups)
    for result in ordered_methods(audit, headline):
        place = 0
        for states in _states_of(result):
            for group in groups:
                found = _group_results(states, group)
                if not any(one.extraction for one in found):
                    continue
                cells = [cell for pair in pairs for cell in _extraction_cells(found, pair)]
                if len(groups) > 1:
                    cells.insert(0, Cell(text=GROUPS[group], value=group))
                rows.append(_state_row(result, states[0], cells, place, headline))
                place += 1
    if not rows:
        return None
    lead = 2 if len(groups) > 1 else 1
    names = ("Extracted", "Tokens matched", "Next token right", "Edit distance")
    columns = [Column(name="Method and state", is_number=False)]
    columns += [Column(name="Group", is_number=False)] if lead == 2 else []
    columns += [Column(name=name) for _ in pairs for name in names]
    spans = [
        ("", lead),
        *[(f"{prefix} tokens given, next {suffix} generated", len(names)) for prefix, suffix in pairs],
    ]
    return Table(
        ident=ident,
        caption=caption,
        columns=tuple(columns),
        rows=tuple(rows),
        spans=tuple(spans),
        note="Extracted: greedy continuation equal to the training text in every token; Wilson intervals. "
        "Tokens matched: length of the equal beginning. " + POOLED_NOTE,
    )


def _extraction_pairs(audit: Audit, groups: Sequence[str]) -> list[tuple[int, int]]:
    found = [
        (one.prefix_tokens, one.suffix_tokens)
        for result in audit.methods
        for seed in result.seeds
        for state in seed.states
        for group in state.groups
        if group.group in groups
        for one in group.extraction
    ]
    return sorted(set(found))


def _extraction_cells(groups: Sequence[GroupResult], pair: tuple[int, int]) -> list[Cell]:
    found = [
        one for group in groups for one in group.extraction if (one.prefix_tokens, one.suffix_tokens) == pair
    ]
    if not found:
        return [Cell(text="")] * 4
    return [
        _extraction_cell(found, "extraction_rate_frac", "percent", 1.0),
        _extraction_cell(found, "matched_prefix_tokens", "tokens", None),
        _extraction_cell(found, "teacher_forced_accuracy_frac", "percent", None),
        _extraction_cell(found, "edit_distance_frac", "percent", None),
    ]


def _extraction_cell(found: Sequence[Extraction], field: str, unit: Unit, full: float | None) -> Cell:
    return measure_cell(pooled([getattr(one, field) for one in found]), unit, full=full, tone="repeated")
