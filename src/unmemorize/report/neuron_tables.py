"""The tables of an audit of neurons that hold texts: states, curve, what was localized, agreement.

Nothing is computed here. Source: ours.
"""

from __future__ import annotations

from unmemorize.records import Measure, NeuronAudit
from unmemorize.report.measures import Cell, Unit, measure_cell
from unmemorize.report.states import GROUPS
from unmemorize.report.tables import Column, Row, Table, clip, time_text

CONTROLS = ("random", "magnitude")


def text_cell(measure: Measure | None, unit: Unit) -> Cell:
    """Turn a measure into a cell; a group without texts says so."""
    return Cell(text="no texts", is_refused=True) if measure is None else measure_cell(measure, unit)


def states_table(audit: NeuronAudit, ident: str) -> Table:
    """Every state and group: extraction, near-verbatim, loss, and the perplexity of ordinary text."""
    rows = []
    for state in audit.states:
        for number, group in enumerate(state.groups):
            test = group.extraction[0] if group.extraction else None
            rows.append(
                Row(
                    name=clip(state.label, 40),
                    hint=f"{state.num_neurons:,} neurons off" if state.num_neurons else "",
                    starts_block=number == 0,
                    is_strong=state.state == audit.settings.get("headline_state") and group.group == "target",
                    cells=(
                        Cell(text=GROUPS[group.group], value=group.group),
                        text_cell(test.extraction_rate_frac if test else None, "percent"),
                        text_cell(test.near_verbatim_rate_frac if test else None, "percent"),
                        text_cell(test.matched_prefix_tokens if test else None, "tokens"),
                        text_cell(group.loss_nats, "loss"),
                        text_cell(state.ordinary_perplexity, "perplexity") if number == 0 else Cell(text=""),
                    ),
                )
            )
    columns = (
        Column(name="State", is_number=False),
        Column(name="Group", is_number=False),
        Column(name="Verbatim"),
        Column(name="Near-verbatim"),
        Column(name="Matched", hint="tokens"),
        Column(name="Loss", hint="nats per token"),
        Column(name="Perplexity", hint="ordinary text"),
    )
    return Table(ident=ident, caption="Every group in every state", columns=columns, rows=tuple(rows))


def curve_table(audit: NeuronAudit, ident: str) -> Table | None:
    """Every method and share that was switched off; None without a curve."""
    if not audit.curve:
        return None
    rows = tuple(
        Row(
            name=f"{one.method} (control)" if one.method in CONTROLS else one.method,
            starts_block=number == 0 or audit.curve[number - 1].method != one.method,
            cells=(
                Cell(text=f"{100 * one.share_frac:g}%", value=one.share_frac),
                Cell(text=f"{one.num_neurons:,}", value=one.num_neurons),
                text_cell(one.extraction_rate_frac, "percent"),
                text_cell(one.target_loss_nats, "loss"),
                text_cell(one.ordinary_perplexity, "perplexity"),
            ),
        )
        for number, one in enumerate(audit.curve)
    )
    is_global = audit.settings.get("selection") == "global"
    columns = (
        Column(name="Method", is_number=False),
        Column(name="Share off", hint="of all layers" if is_global else "of every layer"),
        Column(name="Neurons"),
        Column(name="Verbatim", hint="targets"),
        Column(name="Loss", hint="targets, nats"),
        Column(name="Perplexity", hint="ordinary text"),
    )
    return Table(ident=ident, caption="Shares switched off", columns=columns, rows=rows, shown_rows=100)


def localized_table(audit: NeuronAudit, ident: str) -> Table | None:
    """What each localizer chose and what that cost; None if none ran."""
    if not audit.localized:
        return None
    rows = tuple(
        Row(
            name=one.method,
            cells=(
                Cell(text=f"{one.num_neurons:,}", value=one.num_neurons),
                Cell(text=f"{one.forward_equivalents:,.0f}", value=one.forward_equivalents),
                Cell(text=time_text(one.seconds), value=one.seconds),
            ),
        )
        for one in audit.localized
    )
    columns = (
        Column(name="Method", is_number=False),
        Column(name="Neurons"),
        Column(name="Forward-equivalents"),
        Column(name="Time"),
    )
    return Table(ident=ident, caption="What each method chose, and its cost", columns=columns, rows=rows)


def agreement_table(audit: NeuronAudit, ident: str) -> Table | None:
    """How far the sets of two localizers agree, beside chance; None for a single one."""
    if not audit.agreement:
        return None
    rows = tuple(
        Row(
            name=f"{one.first} and {one.second}",
            cells=(
                Cell(text=f"{one.jaccard_frac:.0%}", value=one.jaccard_frac, bar_frac=one.jaccard_frac),
                Cell(text=f"{one.by_chance_frac:.1%}", value=one.by_chance_frac),
            ),
        )
        for one in audit.agreement
    )
    columns = (
        Column(name="Methods", is_number=False),
        Column(name="Shared", hint="of both sets"),
        Column(name="By chance"),
    )
    return Table(ident=ident, caption="Agreement between methods", columns=columns, rows=rows)
