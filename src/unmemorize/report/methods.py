"""The table of methods: headline figures over seeds, settings and cost.

Nothing is computed here; a single seed shows its own figures, and the note below the table says so.
Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from unmemorize.records import Audit, Measure, MethodResult
from unmemorize.report.measures import Cell, Unit, measure_cell, over_seeds
from unmemorize.report.tables import Column, Row, Table, count_text, time_text

HEADLINES: dict[str, tuple[str, Unit]] = {
    "validation_loss_nats": ("Validation loss, nats", "loss"),
    "repeated_loss_nats": ("Repeated loss, nats", "loss"),
    "gap_closed_frac": ("Gap closed", "percent"),
    "repetition_benefit_kept_frac": ("Benefit kept", "percent"),
    "extraction_rate_frac": ("Extracted", "percent"),
    "beyond_curve_nats": ("Beyond the curve, nats", "difference"),
}
COSTS = ("Seeds", "Parameters", "Tokens/s", "Training time")


def with_short_labels(audit: Audit) -> Audit:
    """Shorten labels for plots and tables: the words before a bracket, or else what tells methods of a kind apart."""
    heads = [result.label.partition(" (")[0] or result.method for result in audit.methods]
    methods = [
        result.model_copy(update={"label": head if heads.count(head) == 1 else _distinct_name(result, audit)})
        for result, head in zip(audit.methods, heads, strict=True)
    ]
    return audit.model_copy(update={"methods": methods})


def _distinct_name(result: MethodResult, audit: Audit) -> str:
    """`KIND a=1` for `KIND:a=1,b=2` when every other changed method of this kind has b=2 as well."""
    kind, _, changes = result.method.partition(":")
    others = [
        one.method.removeprefix(f"{kind}:") for one in audit.methods if one.method.startswith(f"{kind}:")
    ]
    shared = set.intersection(*(set(one.split(",")) for one in others)) if len(others) > 1 else set()
    return f"{kind} {', '.join(part for part in changes.split(',') if part not in shared)}".strip()


def headline_measure(result: MethodResult, field: str) -> Measure | None:
    """A headline figure of a method, over its seeds; None where it was not measured."""
    return over_seeds(getattr(result.summary, field), [getattr(seed, field) for seed in result.seeds])


def headline_cell(result: MethodResult, field: str, *, full: float | None = None) -> Cell:
    """A headline figure as a cell; empty where it was not measured."""
    measure, unit = headline_measure(result, field), HEADLINES[field][1]
    return Cell(text="") if measure is None else measure_cell(measure, unit, full=full, tone=_tone(field))


def methods_table(audit: Audit, headline: str, ident: str, long_labels: Sequence[str]) -> Table:
    """All methods with their headline figures and cost; a long label stands below the short one."""
    fields = [name for name in HEADLINES if any(headline_measure(one, name) for one in audit.methods)]
    if audit.kind == "model":
        fields = [name for name in fields if name not in ("gap_closed_frac", "repetition_benefit_kept_frac")]
    fulls = {name: _full_bar(audit, name) for name in fields}
    same = _shared_costs(audit)
    rows = []
    for result, long_label in zip(audit.methods, long_labels, strict=True):
        figures = [headline_cell(result, name, full=fulls[name]) for name in fields]
        rows.append(
            Row(
                name=result.label,
                hint=long_label.removeprefix(result.label).strip(" ()"),
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
    if audit.kind == "model":
        return "Brackets: 95% intervals over documents."
    counts = {len(result.seeds) for result in audit.methods}
    if counts == {1}:
        return "Brackets: 95% intervals over documents; one seed, so they say nothing about another training run."
    return "Brackets: 95% intervals over seeds."
