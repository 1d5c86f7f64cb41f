"""What a report says about one audit of neurons that hold texts: figures, states, curves, map, continuations.

The result is the state named by `settings["headline_state"]`, else "after". Nothing is computed here but logarithms of
perplexities, so that both losses of a curve share one axis. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from unmemorize.records import DeletionPoint, GroupResult, Measure, NeuronAudit, NeuronState
from unmemorize.report import plots
from unmemorize.report.documents import Example, example_of
from unmemorize.report.measures import Unit
from unmemorize.report.neuron_map import neuron_plot, neuron_table
from unmemorize.report.neuron_tables import (
    CONTROLS,
    agreement_table,
    curve_table,
    localized_table,
    states_table,
    text_cell,
)
from unmemorize.report.page import (
    Beside,
    Fact,
    Figure,
    Panel,
    Part,
    Plot,
    embedded,
    run_letter,
    settings_pairs,
)
from unmemorize.report.plots import Box, Scale, tag
from unmemorize.report.states import GROUPS
from unmemorize.report.tables import Table, clip, flatten, settings_table, time_text
from unmemorize.report.words import NEURON_WORDS


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronRun(Part):
    """One audit of neurons as the template sees it; what the audit lacks is None or empty."""

    states: Table
    panels: tuple[Panel, ...]
    curve: Table | None
    neurons: Plot | None
    neurons_table: Table | None
    localized: Table | None
    agreement: Table | None
    examples: tuple[Example, ...]

    @property
    def family(self) -> str:
        """Which template draws it."""
        return "neurons"


def run_of(audit: NeuronAudit, config: Mapping[str, Any] | None, index: int, num_runs: int) -> NeuronRun:
    """Everything the template shows of one run.

    Args:
        audit: the audit.
        config: the run's `config.json`, or None.
        index: place of the run in the report, from 0.
        num_runs: number of runs in the report.
    """
    ident = f"r{index + 1}"
    labels = {one.state: clip(one.label, 40) for one in audit.states}
    return NeuronRun(
        ident=ident,
        letter=run_letter(index) if num_runs > 1 else "",
        title=audit.title,
        verdict=audit.verdict,
        figures=_figures(audit),
        fine="Brackets: 95% intervals over texts; those of rates are Wilson intervals.",
        done=_done(audit),
        facts=tuple(
            Fact(name=labels[one.state], text=clip(one.description, 300))
            for one in audit.states
            if one.description
        ),
        words=NEURON_WORDS,
        states=states_table(audit, f"{ident}-states"),
        panels=_panels(audit, ident),
        curve=curve_table(audit, f"{ident}-curve"),
        neurons=neuron_plot(audit, f"{ident}-map"),
        neurons_table=neuron_table(audit, f"{ident}-sites"),
        localized=localized_table(audit, f"{ident}-localized"),
        agreement=agreement_table(audit, f"{ident}-agreement"),
        examples=tuple(example_of(one, labels) for one in audit.continuations),
        settings=settings_table(
            settings_pairs(audit.settings, [("config", config or {})]), f"{ident}-settings", "Settings"
        ),
        environment=settings_table(flatten(audit.environment), f"{ident}-versions", "Versions and machine"),
        limits=tuple(audit.limits),
        audit_json=embedded(audit),
    )


def _group(state: NeuronState, name: str = "target") -> GroupResult | None:
    return next((one for one in state.groups if one.group == name), None)


def _rate(state: NeuronState) -> Measure | None:
    group = _group(state)
    return group.extraction[0].extraction_rate_frac if group and group.extraction else None


def _loss(state: NeuronState) -> Measure | None:
    group = _group(state)
    return group.loss_nats if group else None


def _perplexity(state: NeuronState) -> Measure | None:
    return state.ordinary_perplexity


def _figures(audit: NeuronAudit) -> tuple[Figure, ...]:
    """Three large numbers: targets repeated, their loss, ordinary perplexity; each beside its placebo."""
    named = {one.state: one for one in audit.states}
    result = named.get(str(audit.settings.get("headline_state"))) or named.get("after")
    before = named.get("before")
    if result is None or before is None:
        return ()
    others = [one for one in audit.states if one not in (before, result)]
    kinds: tuple[tuple[Any, Unit, str, str], ...] = (
        (
            _rate,
            "percent",
            "of targets repeated verbatim",
            "What should go, given the beginning of each text.",
        ),
        (_loss, "loss", "nats of loss on targets", "A text that is only hidden keeps a low loss."),
        (_perplexity, "perplexity", "perplexity of ordinary text", "What should stay as it was."),
    )
    figures = []
    for read, unit, title, explanation in kinds:
        cells = [text_cell(read(one), unit) for one in (result, before)]
        beside = tuple(Beside(name=clip(one.label, 40), cell=text_cell(read(one), unit)) for one in others)
        figures.append(
            Figure(
                cell=cells[0],
                name=title,
                title=title,
                explanation=explanation,
                before=None if cells[1].is_refused else cells[1],
                beside=beside,
            )
        )
    return tuple(figures)


def _done(audit: NeuronAudit) -> tuple[str, ...]:
    first = audit.states[0] if audit.states else None
    counts = [f"{one.num_examples:,} {GROUPS[one.group].lower()}" for one in first.groups] if first else []
    lengths = (
        f"{audit.settings.get('prefix_tokens', '?')} tokens given, {audit.settings.get('suffix_tokens', '?')}"
    )
    sentences = [
        f"Texts: {', '.join(counts)}. Each was continued in {len(audit.states)} states: {lengths} to repeat."
    ]
    if audit.localized:
        seconds = sum(one.seconds for one in audit.localized)
        passes = sum(one.forward_equivalents for one in audit.localized)
        sentences.append(f"Localizing took {passes:,.0f} forward-equivalents and {time_text(seconds)}.")
    search = audit.settings.get("search")
    if search:
        sentences.append(
            f"The neurons that are off were searched for along the ranking by {search['method']}, until no target kept "
            f"more than {search['leave_frac']:.0%} of its likelihood."
        )
    return tuple(sentences)


def _panels(audit: NeuronAudit, ident: str) -> tuple[Panel, ...]:
    """One small picture a method: losses of targets and of ordinary text over the share that is off."""
    methods = list(dict.fromkeys(point.method for point in audit.curve))
    lines = {name: [one for one in audit.curve if one.method == name] for name in methods}
    values = [value for point in audit.curve for value in _losses(point) if value is not None]
    if not values:
        return ()
    losses = plots.padded_range(values)
    headline = audit.localized[0].method if audit.localized else ""
    return tuple(
        Panel(
            title=f"{name} (control)" if name in CONTROLS else name,
            picture=_panel(name, points, losses, f"{ident}-share{number}"),
            is_headline=name == headline,
        )
        for number, (name, points) in enumerate(lines.items())
    )


def _losses(point: DeletionPoint) -> tuple[float | None, float | None]:
    perplexity = point.ordinary_perplexity.value
    return point.target_loss_nats.value, math.log(perplexity) if perplexity else None


def _panel(name: str, points: Sequence[DeletionPoint], losses: tuple[float, float], ident: str) -> Markup:
    width, height, font = 236.0, 168.0, 12.0
    frame = Box(28, 8, width - 10, height - 22)
    x_scale = Scale(0.0, float(max(1, len(points) - 1)), frame.left + 8, frame.right - 8)
    y_scale = Scale(*losses, frame.bottom, frame.top)
    parts = [plots.horizontal_grid(y_scale, frame, font, 4, gap=5)]
    for place, point in enumerate(points):
        if place % 2 == 0:
            text = f"{100 * point.share_frac:g}%"
            parts.append(
                tag("text", text, x=x_scale(place), y=frame.bottom + font * 1.3, class_="tick middle")
            )
    for number, kind in enumerate(("repeated", "validation")):
        found = [(place, _losses(point)[number]) for place, point in enumerate(points)]
        line = [(x_scale(place), y_scale(value)) for place, value in found if value is not None]
        if line:
            parts.append(plots.polyline(line, f"line {kind}"))
    words = "; ".join(
        f"{100 * one.share_frac:g}%: targets {_losses(one)[0] or 0:.2f}, ordinary {_losses(one)[1] or 0:.2f} nats"
        for one in points
    )
    title = f"Losses by share of neurons off: {name}"
    return plots.picture(width, height, plots.join(parts), ident=ident, title=title, description=words)
