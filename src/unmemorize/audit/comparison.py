"""From one result per trained model to the audit of a comparison: fractions, the cap:R curve, and a verdict.

Group `ordinary` is text never trained on (validation), group `target` is the repeated text. Methods are
paired by
seed: a seed's runs share data, order and, as far as they can, initial weights, so their differences are
steadier than their values. Within a seed, intervals come from resampling the documents of all its runs
together.

Pure: knows no model and touches no file. Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unmemorize.audit.fractions import (
    benefit_kept_in_one_run,
    gap_closed_frac,
    gap_closed_in_one_run,
    repetition_benefit_kept_frac,
)
from unmemorize.audit.frontier import (
    DEDUP,
    MIN_CURVE_POINTS,
    STANDARD,
    beyond_curve_in_one_run,
    beyond_curve_nats,
    curve_methods,
    curve_repeats,
)
from unmemorize.audit.statistics import (
    MIN_SEEDS,
    NUM_RESAMPLES,
    Floats,
    LossDraws,
    exact,
    loss_draws,
    mean_over_seeds,
    refused,
)
from unmemorize.audit.verdict import verdict
from unmemorize.errors import ConfigError, DataError
from unmemorize.records import (
    Audit,
    Continuation,
    CurvePoint,
    DocumentResult,
    Group,
    GroupResult,
    Measure,
    MethodResult,
    MethodSummary,
    SeedResult,
    StateName,
    StateResult,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One trained model as it was measured; what `compare` turns into a `SeedResult`.

    Attributes:
        method: `standard`, `dedup`, `cap:R`, or any other name.
        label: what reports call the method.
        seed: training seed; equal seeds are paired.
        state: the state it would be shipped in, one of `states`.
        states: groups `target` and `ordinary` in every state measured.
        documents: loss of every document by state, needed for intervals within a seed; the same documents for
            all methods of a seed.
        settings: the method's settings.
        continuations: illustrations.
        curve: logged points of training.
        num_parameters: of the trained model.
        train_s: training time, seconds.
        tokens_per_s: training throughput.
    """

    method: str
    label: str
    seed: int
    state: StateName
    states: Sequence[StateResult]
    documents: Sequence[DocumentResult] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    continuations: Sequence[Continuation] = ()
    curve: Sequence[CurvePoint] = ()
    num_parameters: int = 0
    train_s: float = 0.0
    tokens_per_s: float = 0.0


def compare(
    runs: Sequence[RunResult],
    *,
    title: str,
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
    limits: Sequence[str] = (),
    headline: str | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Audit:
    """Assemble the audit of a training comparison.

    Args:
        runs: one per method and seed, in the order in which methods are to be shown.
        title: what the comparison is called.
        settings: the run's settings, stored as they are.
        environment: versions and machine.
        limits: what the reader should know; limits that follow from the runs are added.
        headline: method that the verdict is about; by default the first one that is not on the cap:R curve.
        seed: seed of the bootstrap.
        num_resamples: resamples of the bootstrap.

    Raises:
        DataError: if there are no runs, a method has two runs of one seed, a run lacks its shipped state or
            one of the two groups, or the methods of a seed were measured on different documents.
        ConfigError: if a method's name is malformed, or the headline is not among the methods.
    """
    table = _table(runs)
    results: dict[str, list[SeedResult]] = {method: [] for method in table}
    for number in sorted({run.seed for run in runs}):
        present = {method: by_seed[number] for method, by_seed in table.items() if number in by_seed}
        for method, result in _seed_results(present, seed, num_resamples).items():
            results[method].append(result)
    methods = [
        MethodResult(
            method=method,
            label=next(iter(by_seed.values())).label,
            settings=dict(next(iter(by_seed.values())).settings),
            seeds=results[method],
            summary=_summary(method, results),
        )
        for method, by_seed in table.items()
    ]
    if headline is not None and headline not in table:
        raise ConfigError(f"headline {headline!r} is not among the methods; choose from {', '.join(table)}")
    chosen = headline or next((method for method in table if curve_repeats(method) is None), None)
    return Audit(
        kind="training",
        title=title,
        verdict=verdict(methods, chosen),
        settings=dict(settings),
        environment=dict(environment),
        methods=methods,
        limits=[*limits, *_own_limits(methods)],
    )


def _table(runs: Sequence[RunResult]) -> dict[str, dict[int, RunResult]]:
    """Sort runs by method, in order of appearance, and seed."""
    if not runs:
        raise DataError("there are no runs to compare; train at least one method")
    table: dict[str, dict[int, RunResult]] = {}
    for run in runs:
        curve_repeats(run.method)
        by_seed = table.setdefault(run.method, {})
        if run.seed in by_seed:
            raise DataError(f"method {run.method} has two runs with seed {run.seed}; keep one")
        by_seed[run.seed] = run
    return table


def _seed_results(runs: Mapping[str, RunResult], seed: int, num_resamples: int) -> dict[str, SeedResult]:
    """Fill in the figures that compare the methods of one seed."""
    order = list(runs)
    validation = _draws(runs, "ordinary", 2 * seed, num_resamples)
    repeated = _draws(runs, "target", 2 * seed + 1, num_resamples)
    results = {}
    for method, run in runs.items():
        target = _group(run, "target")
        results[method] = SeedResult(
            seed=run.seed,
            state=run.state,
            validation_loss_nats=_group(run, "ordinary").loss_nats,
            repeated_loss_nats=target.loss_nats,
            gap_closed_frac=_gap_closed(method, order, validation, repeated),
            repetition_benefit_kept_frac=_benefit_kept(method, order, validation),
            extraction_rate_frac=(
                target.extraction[0].extraction_rate_frac if target.extraction else refused("not measured")
            ),
            beyond_curve_nats=_beyond_curve(method, order, validation, repeated),
            states=list(run.states),
            documents=list(run.documents),
            continuations=list(run.continuations),
            curve=list(run.curve),
            num_parameters=run.num_parameters,
            train_s=run.train_s,
            tokens_per_s=run.tokens_per_s,
        )
    return results


def _draws(runs: Mapping[str, RunResult], group: Group, seed: int, num_resamples: int) -> LossDraws | None:
    """Resample one group's documents for all methods of a seed together; None if a run has none."""
    tables = {
        method: {
            document.example: (document.num_tokens, document.loss_nats[run.state])
            for document in run.documents
            if document.group == group and run.state in document.loss_nats
        }
        for method, run in runs.items()
    }
    if not all(tables.values()):
        return None
    first = next(iter(tables))
    tokens = {example: num for example, (num, _) in tables[first].items()}
    for method, table in tables.items():
        if {example: num for example, (num, _) in table.items()} != tokens:
            raise DataError(
                f"seed {runs[method].seed}: {method} and {first} were measured on different {group} "
                "documents; measure them on the same ones"
            )
    nll = [[table[example][1] * num for example, num in tokens.items()] for table in tables.values()]
    return loss_draws(nll, list(tokens.values()), seed=seed, num_resamples=num_resamples)


def _group(run: RunResult, group: Group) -> GroupResult:
    """Find a group's result in the state that the run would be shipped in."""
    for state in run.states:
        if state.state == run.state:
            for result in state.groups:
                if result.group == group:
                    return result
    raise DataError(
        f"{run.method} with seed {run.seed} has no {group} group in state {run.state!r}; "
        "audit it in that state"
    )


_NO_DOCUMENTS = refused("no per-document losses, so there is no interval within a seed")


def _gap_closed(
    method: str, order: list[str], validation: LossDraws | None, repeated: LossDraws | None
) -> Measure:
    if method == STANDARD:
        return exact(0.0)
    if STANDARD not in order:
        return refused("no standard run with this seed")
    if validation is None or repeated is None:
        return _NO_DOCUMENTS
    return gap_closed_in_one_run(validation, repeated, order.index(method), order.index(STANDARD))


def _benefit_kept(method: str, order: list[str], validation: LossDraws | None) -> Measure:
    if method in (STANDARD, DEDUP):
        return exact(1.0 if method == STANDARD else 0.0)
    if STANDARD not in order or DEDUP not in order:
        return refused(f"no {DEDUP if STANDARD in order else STANDARD} run with this seed")
    if validation is None:
        return _NO_DOCUMENTS
    return benefit_kept_in_one_run(validation, order.index(method), order.index(DEDUP), order.index(STANDARD))


def _beyond_curve(
    method: str, order: list[str], validation: LossDraws | None, repeated: LossDraws | None
) -> Measure | None:
    if curve_repeats(method) is not None:
        return None
    if validation is None or repeated is None:
        return _NO_DOCUMENTS
    points = [order.index(name) for name in curve_methods(order)]
    return beyond_curve_in_one_run(validation, repeated, order.index(method), points)


def _summary(method: str, results: Mapping[str, Sequence[SeedResult]]) -> MethodSummary:
    seeds = results[method]
    return MethodSummary(
        validation_loss_nats=_mean([s.validation_loss_nats for s in seeds]),
        repeated_loss_nats=_mean([s.repeated_loss_nats for s in seeds]),
        gap_closed_frac=_mean_gap_closed(method, results),
        repetition_benefit_kept_frac=_mean_benefit_kept(method, results),
        extraction_rate_frac=_mean([s.extraction_rate_frac for s in seeds]),
        beyond_curve_nats=_mean_beyond_curve(method, results),
    )


def _mean(measures: Sequence[Measure]) -> Measure:
    """Mean over seeds of figures that each seed has; refused with the first refusal among them."""
    values = [measure.value for measure in measures if measure.value is not None]
    if len(values) < len(measures) and len(measures) >= MIN_SEEDS:
        reason = next(measure.refused for measure in measures if measure.refused)
        return refused(f"{len(measures) - len(values)} of {len(measures)} seeds: {reason}", len(measures))
    return mean_over_seeds(values)


def _mean_gap_closed(method: str, results: Mapping[str, Sequence[SeedResult]]) -> Measure:
    if method == STANDARD:
        return exact(0.0, len(results[method]))
    if STANDARD not in results:
        return refused("no standard run to compare with")
    own, standard = _paired([method, STANDARD], results)
    return gap_closed_frac(own.validation, own.repeated, standard.validation, standard.repeated)


def _mean_benefit_kept(method: str, results: Mapping[str, Sequence[SeedResult]]) -> Measure:
    if method in (STANDARD, DEDUP):
        return exact(1.0 if method == STANDARD else 0.0, len(results[method]))
    for name in (STANDARD, DEDUP):
        if name not in results:
            return refused(f"no {name} run to compare with")
    own, dedup, standard = _paired([method, DEDUP, STANDARD], results)
    return repetition_benefit_kept_frac(own.validation, dedup.validation, standard.validation)


def _mean_beyond_curve(method: str, results: Mapping[str, Sequence[SeedResult]]) -> Measure | None:
    if curve_repeats(method) is not None:
        return None
    own, *curve = _paired([method, *curve_methods(list(results))], results)
    validation, repeated = [point.validation for point in curve], [point.repeated for point in curve]
    return beyond_curve_nats(own.validation, own.repeated, validation, repeated)


@dataclass(frozen=True, slots=True)
class _Losses:
    """Losses of one method by seed, shape (S,) each, nats per token."""

    validation: Floats
    repeated: Floats


def _paired(methods: Sequence[str], results: Mapping[str, Sequence[SeedResult]]) -> list[_Losses]:
    """Collect the losses of several methods over the seeds that all of them have, in order of seed."""
    tables = [
        {
            s.seed: (s.validation_loss_nats.value, s.repeated_loss_nats.value)
            for s in results[method]
            if s.validation_loss_nats.value is not None and s.repeated_loss_nats.value is not None
        }
        for method in methods
    ]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    return [
        _Losses(
            np.array([table[seed][0] for seed in common], dtype=np.float64),
            np.array([table[seed][1] for seed in common], dtype=np.float64),
        )
        for table in tables
    ]


def _own_limits(methods: Sequence[MethodResult]) -> list[str]:
    """State the limits that follow from which runs there are."""
    limits = []
    if min(len(method.seeds) for method in methods) < MIN_SEEDS:
        limits.append(
            f"Some methods have fewer than {MIN_SEEDS} seeds: figures over seeds are refused there, and "
            "intervals within one seed say nothing about how another training would have come out."
        )
    num_points = sum(curve_repeats(method.method) is not None for method in methods)
    if MIN_CURVE_POINTS <= num_points < len(methods):
        limits.append(
            f"The cap:R curve joins {num_points} points by straight lines; with more caps it may lie higher."
        )
    return limits
