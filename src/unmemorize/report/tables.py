"""The report's tables: audits become rows of cells, ready for the template and for CSV export.

Every table is the same value, so one template macro draws, sorts, filters and exports all of them. Nothing
is computed here but means over seeds (see measures.pooled). Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unmemorize.records import (
    Audit,
    Extraction,
    GroupResult,
    Measure,
    MethodResult,
    StateResult,
)
from unmemorize.report.measures import Cell, Unit, measure_cell, over_seeds, pooled

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
HEADLINES: dict[str, tuple[str, Unit]] = {
    "validation_loss_nats": ("Validation loss, nats", "loss"),
    "repeated_loss_nats": ("Repeated loss, nats", "loss"),
    "gap_closed_frac": ("Gap closed", "percent"),
    "repetition_benefit_kept_frac": ("Benefit kept", "percent"),
    "extraction_rate_frac": ("Extracted", "percent"),
    "beyond_curve_nats": ("Beyond the curve, nats", "difference"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column: its heading, an optional second line, and whether it holds numbers."""

    name: str
    hint: str = ""
    is_number: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: a heading with an optional quiet second line, then one cell for each further column."""

    name: str
    hint: str = ""
    cells: tuple[Cell, ...]
    is_strong: bool = False
    starts_block: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with its caption; `spans` is an upper row of headings over several columns each."""

    ident: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    spans: tuple[tuple[str, int], ...] = ()
    is_sortable: bool = False
    shown_rows: int = 0
    note: str = ""


COSTS = ("Seeds", "Parameters", "Tokens/s", "Time a seed")


def settings_text(settings: Mapping[str, Any]) -> str:
    """One line of `name value` pairs."""
    pairs = flatten(settings)
    return ", ".join(f"{name} {value}" for name, value in pairs)


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and worded values, in the order given."""
    pairs: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            pairs += flatten(item, f"{name}.")
        elif item is not None and item != "":
            pairs.append((name, _plain(item)))
    return pairs


def _plain(item: Any) -> str:  # noqa: ANN401 - settings hold any JSON value
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int):
        return f"{item:,}" if abs(item) >= 10_000 else str(item)
    if isinstance(item, float):
        return f"{item:g}"
    return ", ".join(_plain(part) for part in item) if isinstance(item, list) else str(item)


def count_text(count: float) -> str:
    """Word a large count: 1.9 M, 640 k, 950."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}\N{NO-BREAK SPACE}{letter}"
    return f"{count:.3g}"


def time_text(seconds: float) -> str:
    """Word a duration: 45 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f}\N{NO-BREAK SPACE}s"
    if seconds < 5400:
        return f"{seconds / 60:.0f}\N{NO-BREAK SPACE}min"
    return f"{seconds / 3600:.1f}\N{NO-BREAK SPACE}h"


def headline_measure(result: MethodResult, field: str) -> Measure | None:
    """A headline figure of a method, over its seeds; None where it was not measured."""
    return over_seeds(getattr(result.summary, field), [getattr(seed, field) for seed in result.seeds])


def headline_cell(result: MethodResult, field: str, *, full: float | None = None) -> Cell:
    """A headline figure as a cell; empty where it was not measured."""
    measure, unit = headline_measure(result, field), HEADLINES[field][1]
    return Cell(text="") if measure is None else measure_cell(measure, unit, full=full, tone=_tone(field))


def methods_table(audit: Audit, headline: str, ident: str) -> Table:
    """All methods with their five headline figures, settings and cost."""
    fields = [name for name in HEADLINES if any(headline_measure(one, name) for one in audit.methods)]
    fulls = {name: _full_bar(audit, name) for name in fields}
    same = _shared_costs(audit)
    rows = []
    for result in audit.methods:
        figures = [headline_cell(result, name, full=fulls[name]) for name in fields]
        rows.append(
            Row(
                name=result.label or result.method,
                hint=settings_text(result.settings),
                cells=(*figures, *[cell for name, cell in _costs(result).items() if name not in same]),
                is_strong=result.method == headline,
            )
        )
    columns = [Column(name="Method", is_number=False)]
    columns += [Column(name=HEADLINES[name][0]) for name in fields]
    columns += [Column(name=name) for name in COSTS if name not in same]
    return Table(
        ident=ident,
        caption="Methods and their headline figures",
        columns=tuple(columns),
        rows=tuple(rows),
        is_sortable=len(rows) > 1,
        note=_seed_note(audit),
    )


def _tone(field: str) -> str:
    tones = {"validation_loss_nats": "validation", "extraction_rate_frac": "repeated"}
    return tones.get(field, "repeated" if field == "repeated_loss_nats" else "good")


def _full_bar(audit: Audit, field: str) -> float | None:
    """What a full bar stands for: 100 %, or the largest loss; a difference has no bar."""
    unit = HEADLINES[field][1]
    if unit != "loss":
        return 1.0 if unit == "percent" else None
    measures = [headline_measure(result, field) for result in audit.methods]
    return max((one.value for one in measures if one is not None and one.value is not None), default=None)


def _costs(result: MethodResult) -> dict[str, Cell]:
    count = len(result.seeds)
    parameters = max((seed.num_parameters for seed in result.seeds), default=0)
    speed = sum(seed.tokens_per_s for seed in result.seeds) / count if count else 0.0
    seconds = sum(seed.train_s for seed in result.seeds) / count if count else 0.0
    texts = (str(count), count_text(parameters), count_text(speed), time_text(seconds))
    values = (count, parameters, speed, seconds)
    return {
        name: Cell(text=text, value=value) if value else Cell(text="")
        for name, text, value in zip(COSTS, texts, values, strict=True)
    }


def _shared_costs(audit: Audit) -> set[str]:
    """Seeds and parameters when all methods have the same; the story above the tables names them."""
    costs = [_costs(result) for result in audit.methods]
    return {name for name in ("Seeds", "Parameters") if len({cost[name].value for cost in costs}) == 1}


def _seed_note(audit: Audit) -> str:
    counts = {len(result.seeds) for result in audit.methods}
    if counts == {1}:
        return "One seed: intervals are over documents, and say nothing about another training run."
    return "Intervals in brackets are 95%, over seeds."


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
    sizes = {
        group.group: group.num_examples
        for result in results
        for seed in result.seeds
        for state in seed.states
        for group in state.groups
    }
    return [Column(name=GROUPS[name], hint=f"{sizes[name]} texts") for name in groups]  # type: ignore[index]


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
    label = result.label or result.method
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
    spans = [("", lead), *[(f"{k} tokens given, next {l} generated", len(names)) for k, l in pairs]]
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


def settings_table(pairs: Sequence[tuple[str, str]], ident: str, caption: str) -> Table:
    """Names and values."""
    return Table(
        ident=ident,
        caption=caption,
        columns=(Column(name="Name", is_number=False), Column(name="Value", is_number=False)),
        rows=tuple(Row(name=name, cells=(Cell(text=value, value=value),)) for name, value in pairs),
    )


def clip(text: str, limit: int = 160) -> str:
    """The beginning of a long text."""
    return text if len(text) <= limit else text[:limit] + "\N{HORIZONTAL ELLIPSIS}"
