"""Comparing trainings: fractions by seed, the cap:R curve, refusals and the verdict."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmemorize.audit.comparison import RunResult, compare
from unmemorize.audit.frontier import beyond_curve_nats, curve_methods, curve_repeated_nats, curve_repeats
from unmemorize.audit.statistics import bootstrap_ratio, refused, wilson
from unmemorize.errors import ConfigError, DataError
from unmemorize.records import (
    Audit,
    DocumentResult,
    Extraction,
    GroupResult,
    Measure,
    MethodResult,
    StateResult,
    load_audit,
)

# A trial with a model of one million parameters: validation loss, repeated loss, nats per token.
TRIAL = {
    "standard": (3.31, 0.88),
    "cap:24": (3.44, 2.64),
    "cap:8": (3.52, 3.20),
    "dedup": (3.56, 3.44),
    "sinks": (3.34, 1.71),
}
NUM_DOCUMENTS = 24


def make_run(method: str, seed: int, losses: tuple[float, float], **changes: object) -> RunResult:
    """A run whose documents have these mean losses; documents of a seed differ alike in all methods."""
    generator = np.random.default_rng(seed)
    state = "off" if method == "sinks" else "plain"
    documents = []
    groups = []
    for group, loss in zip(("ordinary", "target"), losses, strict=True):
        tokens = generator.integers(80, 120, size=NUM_DOCUMENTS)
        values = loss + (noise := generator.normal(0, 0.2, size=NUM_DOCUMENTS))
        values = values - float((noise * tokens).sum() / tokens.sum()) + generator.normal(0, 0.01)
        documents += [
            DocumentResult(
                example=f"{group} {n}",
                group=group,
                num_tokens=int(tokens[n]),
                loss_nats={state: float(values[n])},
            )
            for n in range(NUM_DOCUMENTS)
        ]
        rate = wilson(12 if method == "standard" else 1, NUM_DOCUMENTS)
        extraction = Extraction(
            prefix_tokens=32,
            suffix_tokens=32,
            extraction_rate_frac=rate,
            matched_prefix_tokens=refused("not measured"),
            teacher_forced_accuracy_frac=refused("not measured"),
            edit_distance_frac=refused("not measured"),
        )
        loss_nats = bootstrap_ratio(values * tokens, tokens, num_resamples=200)
        groups.append(
            GroupResult(group=group, num_examples=NUM_DOCUMENTS, loss_nats=loss_nats, extraction=[extraction])
        )
    run = RunResult(
        method=method,
        label=method,
        seed=seed,
        state=state,
        states=[StateResult(state=state, groups=groups)],
        documents=documents,
        settings={"method": method},
    )
    return dataclasses.replace(run, **changes)


def make_runs(table: dict[str, tuple[float, float]], seeds: int = 3, spread: float = 0.02) -> list[RunResult]:
    """Runs of all methods; a seed shifts all its methods alike, as data order does."""
    shift = np.linspace(-spread, spread, seeds) if seeds > 1 else [0.0]
    return [
        make_run(method, seed, (validation + shift[seed], repeated + shift[seed]))
        for method, (validation, repeated) in table.items()
        for seed in range(seeds)
    ]


def audit_of(runs: list[RunResult], **changes: object) -> Audit:
    options = {
        "title": "trial",
        "settings": {"steps": 1},
        "environment": {"python": "3"},
        "num_resamples": 300,
    }
    return compare(runs, **{**options, **changes})


def method_of(audit: Audit, name: str) -> MethodResult:
    return next(method for method in audit.methods if method.method == name)


# Assembly


def test_comparison_of_the_trial(tmp_path) -> None:
    audit = audit_of(make_runs(TRIAL))
    assert [method.method for method in audit.methods] == list(TRIAL)
    sinks = method_of(audit, "sinks")
    # gap 1.63 of 2.43 left; benefit 0.22 of 0.25 kept; curve at 3.34: 0.88 + 0.03 / 0.13 * 1.76 = 1.286
    assert sinks.summary.gap_closed_frac.value == pytest.approx(1 - 1.63 / 2.43, abs=0.01)
    assert sinks.summary.repetition_benefit_kept_frac.value == pytest.approx(0.22 / 0.25, abs=0.05)
    assert sinks.summary.beyond_curve_nats.value == pytest.approx(1.71 - 1.286, abs=0.15)
    assert sinks.summary.gap_closed_frac.method == "t"
    assert sinks.summary.extraction_rate_frac.value == pytest.approx(1 / 24)
    first = sinks.seeds[0]
    assert first.state == "off"
    assert first.gap_closed_frac.method == "bootstrap"
    assert first.gap_closed_frac.num == NUM_DOCUMENTS
    for measure, summary in (
        (first.gap_closed_frac, sinks.summary.gap_closed_frac),
        (first.repetition_benefit_kept_frac, sinks.summary.repetition_benefit_kept_frac),
        (first.beyond_curve_nats, sinks.summary.beyond_curve_nats),
    ):
        low, high = measure.ci95
        assert low <= measure.value <= high
        assert measure.value == pytest.approx(summary.value, abs=0.15)
    assert load_audit(audit.save(tmp_path / "audit.json")) == audit


def test_ends_hold_by_definition() -> None:
    audit = audit_of(make_runs(TRIAL))
    standard, dedup = method_of(audit, "standard"), method_of(audit, "dedup")
    assert standard.summary.gap_closed_frac == Measure(value=0, ci95=(0, 0), num=3, method="exact")
    assert standard.seeds[0].repetition_benefit_kept_frac.value == 1.0
    assert dedup.summary.repetition_benefit_kept_frac.value == 0.0
    assert dedup.summary.gap_closed_frac.value == pytest.approx(1 - 0.12 / 2.43, abs=0.02)
    assert standard.summary.beyond_curve_nats is None


def test_pairing_by_seed_takes_out_what_seeds_share() -> None:
    """Seeds that differ by +-0.5 nats in all methods alike leave the fractions' intervals narrow."""
    audit = audit_of(make_runs(TRIAL, spread=0.5))
    summary = method_of(audit, "sinks").summary
    low, high = summary.validation_loss_nats.ci95
    assert high - low > 1.0
    low, high = summary.gap_closed_frac.ci95
    assert high - low < 0.1


def test_missing_rivals_are_refused_not_invented() -> None:
    audit = audit_of(make_runs({"dedup": TRIAL["dedup"], "sinks": TRIAL["sinks"]}))
    sinks = method_of(audit, "sinks")
    assert sinks.summary.gap_closed_frac.refused == "no standard run to compare with"
    assert sinks.seeds[0].gap_closed_frac.refused == "no standard run with this seed"
    assert sinks.summary.repetition_benefit_kept_frac.refused == "no standard run to compare with"
    assert sinks.summary.beyond_curve_nats.refused == (
        "points on the cap:R curve: 1; it needs standard, dedup and a cap:R between them"
    )
    assert "refused (no standard run to compare with)" in audit.verdict


def test_only_common_seeds_are_paired() -> None:
    runs = [run for run in make_runs(TRIAL, seeds=4) if (run.method, run.seed) != ("standard", 3)]
    sinks = method_of(audit_of(runs), "sinks")
    assert len(sinks.seeds) == 4
    assert sinks.summary.validation_loss_nats.num == 4
    assert sinks.summary.gap_closed_frac.num == 3
    assert sinks.seeds[3].gap_closed_frac.refused == "no standard run with this seed"


def test_runs_without_documents_have_no_interval_within_a_seed() -> None:
    runs = [dataclasses.replace(run, documents=()) for run in make_runs(TRIAL)]
    sinks = method_of(audit_of(runs), "sinks")
    assert (
        sinks.seeds[0].gap_closed_frac.refused
        == "no per-document losses, so there is no interval within a seed"
    )
    assert sinks.seeds[0].beyond_curve_nats.refused == sinks.seeds[0].gap_closed_frac.refused
    assert sinks.summary.gap_closed_frac.value == pytest.approx(1 - 1.63 / 2.43, abs=0.01)


def test_runs_that_cannot_be_compared() -> None:
    runs = make_runs(TRIAL)
    with pytest.raises(DataError, match="there are no runs to compare"):
        audit_of([])
    with pytest.raises(DataError, match="method standard has two runs with seed 0; keep one"):
        audit_of([*runs, runs[0]])
    with pytest.raises(DataError, match="standard with seed 0 has no target group in state 'off'"):
        audit_of([dataclasses.replace(runs[0], state="off"), *runs[1:]])
    with pytest.raises(
        DataError, match="seed 0: cap:24 and standard were measured on different ordinary doc"
    ):
        audit_of([dataclasses.replace(runs[0], documents=runs[0].documents[1:]), *runs[1:]])
    with pytest.raises(ConfigError, match="headline 'sink' is not among the methods; choose from standard"):
        audit_of(runs, headline="sink")
    with pytest.raises(ConfigError, match="method 'cap:many' has no cap; write cap:R"):
        audit_of([dataclasses.replace(runs[0], method="cap:many")])


# The curve


def test_caps_are_ordered() -> None:
    assert curve_methods(["standard", "cap:24", "sinks", "cap:8", "dedup"]) == [
        "dedup",
        "cap:8",
        "cap:24",
        "standard",
    ]
    assert curve_repeats("goldfish") is None
    with pytest.raises(ConfigError, match="'cap:0' has no cap"):
        curve_repeats("cap:0")


CURVE = (np.array([3.56, 3.52, 3.44, 3.31]), np.array([3.44, 3.20, 2.64, 0.88]))


@pytest.mark.parametrize(
    ("at", "repeated"),
    [(3.31, 0.88), (3.375, 1.76), (3.44, 2.64), (3.48, 2.92), (3.56, 3.44), (3.7, 3.44), (3.0, 0.88)],
)
def test_curve_by_hand(at: float, repeated: float) -> None:
    assert curve_repeated_nats(*CURVE, at) == pytest.approx(repeated)


def test_curve_that_turns_back() -> None:
    """Where too many repeats hurt validation, the rival may stop at the best cap: 3.2 nats, never 1.0."""
    validation, repeated = [3.6, 3.4, 3.5], [3.4, 3.2, 1.0]
    assert curve_repeated_nats(validation, repeated, 3.4) == pytest.approx(3.2)
    assert curve_repeated_nats(validation, repeated, 3.5) == pytest.approx(3.3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(3, 4), st.floats(0, 4)), min_size=3, max_size=6), st.floats(2.9, 4.1))
def test_curve_never_falls_and_takes_vectors(points: list[tuple[float, float]], at: float) -> None:
    validation, repeated = np.array(points).T
    grid = np.sort([at, *np.linspace(2.9, 4.1, 20)])
    one_by_one = [float(curve_repeated_nats(validation, repeated, place)) for place in grid]
    assert (np.diff(one_by_one) >= -1e-9).all()
    columns = curve_repeated_nats(
        np.repeat(validation[:, None], len(grid), 1), np.repeat(repeated[:, None], len(grid), 1), grid
    )
    assert columns == pytest.approx(one_by_one)
    assert one_by_one[-1] == pytest.approx(repeated.max())


def test_on_the_curve_is_neither_beyond_nor_behind() -> None:
    shifts = np.array([-0.1, 0.0, 0.1])
    curve = [column[:, None] + shifts for column in CURVE]
    measure = beyond_curve_nats(3.48 + shifts, 2.92 + shifts, *curve)
    assert measure.value == pytest.approx(0.0, abs=1e-9)
    better = beyond_curve_nats(3.48 + shifts, 3.12 + shifts, *curve)
    assert better.value == pytest.approx(0.2)
    worse = beyond_curve_nats(3.48 + shifts, 2.42 + shifts, *curve)
    assert worse.value == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("validation", "words"),
    [
        (3.2, "better than every point of the cap:R curve, whose best is 3.310"),
        (3.6, "worse than every point of the cap:R"),
    ],
)
def test_outside_the_curve_is_refused(validation: float, words: str) -> None:
    curve = [np.repeat(column[:, None], 3, 1) for column in CURVE]
    measure = beyond_curve_nats([validation] * 3, [2.0] * 3, *curve)
    assert words in str(measure.refused)


def test_two_points_are_no_curve() -> None:
    measure = beyond_curve_nats([3.4] * 3, [2.0] * 3, np.ones((2, 3)), np.ones((2, 3)))
    assert str(measure.refused).startswith("points on the cap:R curve: 2;")


# The verdict


def test_verdict_beyond() -> None:
    audit = audit_of(make_runs(TRIAL))
    assert audit.verdict.startswith("With sinks off, 33% [")
    assert " of the memorization gap is closed while " in audit.verdict
    assert " of the repetition benefit stays; the cap:R curve at the same validation loss " in audit.verdict
    assert audit.verdict.endswith("sinks lies beyond the curve.")
    assert audit.limits == [
        "The cap:R curve joins 4 points by straight lines; with more caps it may lie higher."
    ]


def test_verdict_behind_and_level() -> None:
    behind = audit_of(make_runs({**TRIAL, "sinks": (3.44, 1.9)}))
    assert behind.verdict.endswith("lies behind the curve, where capping repeats is the better choice.")
    level = audit_of(make_runs({**TRIAL, "sinks": (3.48, 2.92)}))
    assert level.verdict.endswith("sinks cannot be told from the curve.")
    better = audit_of(make_runs({**TRIAL, "sinks": (3.2, 2.0)}))
    assert "no point of the cap:R curve reaches its validation loss (3.2" in better.verdict
    assert better.verdict.endswith("nats at best, in every seed): it lies beyond the curve.")
    # Better validation and *more* memory than the best point is a trade, not a lead.
    trade = audit_of(make_runs({**TRIAL, "sinks": (3.2, 0.5)}))
    assert "it is not judged (validation loss 3.196 is better than every" in trade.verdict


def test_verdict_of_one_seed_says_what_its_interval_covers() -> None:
    audit = audit_of(make_runs(TRIAL, seeds=1))
    assert audit.verdict.startswith("With sinks off, 33% [")
    assert audit.verdict.endswith("(one training run; intervals are over documents, not over trainings).")
    assert (
        method_of(audit, "sinks").summary.gap_closed_frac.refused == "1 seed; an interval over seeds needs 3"
    )
    assert audit.limits[0].startswith("Some methods have fewer than 3 seeds")


def test_verdict_of_two_seeds_gives_both() -> None:
    verdict = audit_of(make_runs(TRIAL, seeds=2)).verdict
    assert verdict.startswith("With sinks off, 33% [")
    assert "] and 33% [" in verdict
    assert "against the cap:R curve it is not judged (2 seeds; an interval over seeds needs 3)" in verdict


def test_verdict_of_another_headline_and_of_none() -> None:
    runs = make_runs({**TRIAL, "goldfish": (3.4, 2.0)})
    assert audit_of(runs, headline="goldfish").verdict.startswith("With goldfish, ")
    plain = audit_of([run for run in runs if run.method in ("standard", "dedup")])
    assert plain.verdict.startswith("With standard, repeated text has a loss of 0.8")
    assert plain.verdict.endswith("no method that isolates memorization was compared.")


def test_verdict_without_a_gap_refuses_the_fraction() -> None:
    table = {**TRIAL, "standard": (3.31, 3.31), "cap:24": (3.44, 3.4)}
    verdict = audit_of(make_runs(table)).verdict
    assert "the share of the memorization gap closed is refused (the memorization gap of standard" in verdict
