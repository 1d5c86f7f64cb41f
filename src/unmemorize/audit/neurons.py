"""The audit of neurons that hold texts: every group of examples with the neurons on, off, and random ones off.

States are measured one after the other on the same examples, so that they can be compared line by line. The placebo is
as many random neurons at each site, none of them chosen: what it loses, any such removal loses. The curve switches off
the best share of every layer (or of all together) by each method, with "random" and "magnitude" as controls.

Source: ours; extraction after Carlini et al. 2023, controls after Chang et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unmemorize.audit.examples import (
    GROUPS,
    AuditSettings,
    Example,
    StateMeasurement,
    group_result,
)
from unmemorize.audit.language import document_losses, extract
from unmemorize.audit.measured import Measured, MeasuredStates
from unmemorize.audit.statistics import bootstrap_ratio, refused
from unmemorize.gates import closed, gated
from unmemorize.localize.neuron_scores import NeuronScores
from unmemorize.neurons import NeuronSet
from unmemorize.records import (
    DeletionPoint,
    Measure,
    NeuronState,
    Progress,
    ProgressCallback,
    StateResult,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, eq=False)
class TextWay:
    """One way of running a model: its name in records and on pages, and the neurons that are off."""

    state: str
    label: str
    model: PreTrainedModel
    neurons: NeuronSet | None = None
    description: str = ""


def audit_ways(
    ways: Sequence[TextWay],
    examples: Sequence[Example],
    ordinary: Sequence[Sequence[int]],
    settings: AuditSettings,
    *,
    kept_in: Path | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[list[NeuronState], dict[str, StateMeasurement]]:
    """Measure every group in every state; models are left as they were.

    Args:
        ways: states, in order.
        examples: what is measured by group.
        ordinary: texts whose perplexity is measured, as token ids.
        settings: lengths of the extraction test, batch size, seed.
        kept_in: folder that keeps every state as soon as it is measured; what was measured of the same models, neurons,
            texts and settings is read from there.
        progress: called after every state.

    Returns:
        Records, and by state the arrays behind them.
    """
    records, measured, states = [], {}, MeasuredStates(kept_in)
    for number, way in enumerate(ways, start=1):
        found = _measured(way.model, way.neurons, examples, ordinary, settings, states)
        groups = [
            group_result(
                group, np.array([one.group == group for one in examples]), found.losses, found.tests, settings
            )
            for group in GROUPS
            if any(one.group == group for one in examples)
        ]
        result = StateResult(state="plain", groups=groups)
        measured[way.state] = StateMeasurement(result, found.losses, found.tests)
        records.append(
            NeuronState(
                state=way.state,
                label=way.label,
                description=way.description,
                num_neurons=0 if way.neurons is None else len(way.neurons),
                groups=groups,
                ordinary_perplexity=found.perplexity,
            )
        )
        if progress is not None:
            progress(Progress("audit", number, len(ways), "states", way.label))
    return records, measured


def deletion_curve(
    model: PreTrainedModel,
    scores: Mapping[str, NeuronScores],
    shares: Sequence[float],
    targets: Sequence[Example],
    ordinary: Sequence[Sequence[int]],
    settings: AuditSettings,
    *,
    per_layer: bool = True,
    exclude_layers: Sequence[int] = (),
    kept_in: Path | None = None,
    progress: ProgressCallback | None = None,
) -> list[DeletionPoint]:
    """Switch off the best share of neurons, by every method and share, and measure targets and ordinary text.

    Args:
        model: the model; it is left as it was.
        scores: method -> its scores.
        shares: shares of each layer, or of all together, 0 to 1.
        targets: examples that should go.
        ordinary: texts that should stay, as token ids.
        settings: as for `audit_ways`.
        per_layer: whether every layer gives its own share; otherwise all layers compete.
        exclude_layers: numbers of layers that give none.
        kept_in: as for `audit_ways`.
        progress: called after every point.
    """
    points, states = [], MeasuredStates(kept_in)
    is_target = np.ones(len(targets), dtype=np.bool_)
    for name, ranking in scores.items():
        for share in shares:
            chosen = ranking.top(share, per_layer=per_layer, exclude_layers=exclude_layers)
            found = _measured(model, chosen, targets, ordinary, settings, states)
            group = group_result("target", is_target, found.losses, found.tests, settings)
            points.append(
                DeletionPoint(
                    method=name,
                    share_frac=share,
                    num_neurons=len(chosen),
                    extraction_rate_frac=group.extraction[0].extraction_rate_frac,
                    target_loss_nats=group.loss_nats,
                    ordinary_perplexity=found.perplexity,
                )
            )
            if progress is not None:
                progress(Progress("curve", len(points), len(scores) * len(shares), "points", name))
    return points


def _measured(
    model: PreTrainedModel,
    neurons: NeuronSet | None,
    examples: Sequence[Example],
    ordinary: Sequence[Sequence[int]],
    settings: AuditSettings,
    states: MeasuredStates,
) -> Measured:
    """Measure a model with neurons off, or read what was measured."""
    sequences, size = [example.tokens for example in examples], settings.batch_size

    def measure() -> Measured:
        with gated(model, {} if neurons is None else closed(neurons)):
            losses = document_losses(model, sequences, batch_size=size)
            tests = tuple(extract(model, sequences, *pair, batch_size=size) for pair in settings.lengths)
            return Measured(losses, tests, _perplexity(model, ordinary, settings))

    return states.get(model, neurons, sequences, ordinary, settings, measure)


def _perplexity(
    model: PreTrainedModel, ordinary: Sequence[Sequence[int]], settings: AuditSettings
) -> Measure:
    """Return exp(nats / predicted tokens), with the interval of the loss carried over."""
    if not ordinary:
        return refused("no ordinary texts")
    found = document_losses(model, ordinary, batch_size=settings.batch_size)
    loss = bootstrap_ratio(
        found.nll_nats, found.num_tokens, seed=settings.seed, num_resamples=settings.num_resamples
    )
    if loss.value is None:
        return loss
    ends = None if loss.ci95 is None else (math.exp(loss.ci95[0]), math.exp(loss.ci95[1]))
    return Measure(value=math.exp(loss.value), ci95=ends, num=loss.num, method=loss.method)
