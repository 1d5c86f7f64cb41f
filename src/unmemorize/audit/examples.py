"""What an audit measures, and how per-example numbers become group results. Knows no model; torch-free.

`Example` goes in, per-example arrays come back from a family file, and records come out: a `GroupResult` for
every group and state, a row for every document, continuations to look at. Examples are the unit of every
interval here.

Letters: N examples, M of them long enough for an extraction test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unmemorize.audit.statistics import NUM_RESAMPLES, bootstrap_mean, bootstrap_ratio, refused, wilson
from unmemorize.audit.verbatim import VerbatimScores
from unmemorize.errors import ConfigError, DataError
from unmemorize.records import (
    Continuation,
    DocumentResult,
    Extraction,
    Group,
    GroupResult,
    Measure,
    StateResult,
)

GROUPS: tuple[Group, ...] = ("target", "neighbour", "heldout", "ordinary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A text to audit, as tokens.

    Attributes:
        name: what reports call it; unique in an audit.
        group: target, neighbour, heldout or ordinary.
        tokens: token ids, in the model's vocabulary.
        source: named unit of deletion it belongs to, "" if none.
        repeats: times it was trained on, 0 if never.
        id: content id, 0 if unknown; one id in two groups is an error.
        sink_id: id whose sinks it opens in the states own and foreign, 0 for none.
    """

    name: str
    group: Group
    tokens: tuple[int, ...]
    source: str = ""
    repeats: int = 1
    id: int = 0
    sink_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSettings:
    """What to measure.

    Attributes:
        lengths: (prefix, suffix) of each extraction test, tokens; the first one gives the headline figures.
        batch_size: sequences per forward pass.
        seed: seed of the bootstrap.
        num_resamples: resamples of the bootstrap.
    """

    lengths: tuple[tuple[int, int], ...] = ((32, 32), (50, 50))
    batch_size: int = 32
    seed: int = 0
    num_resamples: int = NUM_RESAMPLES

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}, expected 1 or more")
        if self.num_resamples < 100:
            raise ConfigError(f"num_resamples is {self.num_resamples}, expected 100 or more")
        for prefix, suffix in self.lengths:
            if prefix < 1 or suffix < 1:
                raise ConfigError(
                    f"extraction lengths are ({prefix}, {suffix}), expected 1 token or more each"
                )


@dataclass(frozen=True, slots=True, eq=False)
class DocumentLosses:
    """Losses of N documents.

    Attributes:
        nll_nats: summed negative log-likelihood of a document's predicted tokens, shape (N,), float64, nats.
        num_tokens: predicted tokens, shape (N,), int64; 0 for documents of fewer than two tokens.
    """

    nll_nats: NDArray[np.float64]
    num_tokens: NDArray[np.int64]

    def mean_nats(self) -> NDArray[np.float64]:
        """Give each document's loss, shape (N,), nats per token; NaN where nothing is predicted."""
        return self.nll_nats / np.where(self.num_tokens > 0, self.num_tokens, np.nan)


@dataclass(frozen=True, slots=True, eq=False)
class Extractions:
    """Greedy and teacher-forced continuations of the sequences that are long enough, M of N.

    Attributes:
        prefix_tokens: k.
        suffix_tokens: l.
        indices: which sequences they are, shape (M,), int64, ascending.
        generated: greedy tokens, shape (M, l), int64.
        teacher_forced: most likely token at each position given the true text before it, shape (M, l), int64.
        truth: the suffixes, shape (M, l), int64.
        scores: `VerbatimScores` of the M sequences.
        num_excluded: sequences shorter than k + l tokens, N - M.
    """

    prefix_tokens: int
    suffix_tokens: int
    indices: NDArray[np.int64]
    generated: NDArray[np.int64]
    teacher_forced: NDArray[np.int64]
    truth: NDArray[np.int64]
    scores: VerbatimScores
    num_excluded: int


@dataclass(frozen=True, slots=True, eq=False)
class StateMeasurement:
    """One state: its record for `audit.json`, and the arrays behind it in the order of the examples."""

    result: StateResult
    losses: DocumentLosses
    extractions: tuple[Extractions, ...]


def check_examples(examples: Sequence[Example]) -> None:
    """Refuse examples that would make an audit lie.

    Raises:
        DataError: if there are none, two share a name, or one content (by id or by tokens) is in two groups,
            where a removal would be charged to, or hidden from, both.
    """
    if not examples:
        raise DataError("there are no examples to audit; give at least one")
    names: set[str] = set()
    owners: dict[int | tuple[int, ...], Example] = {}
    for example in examples:
        if example.name in names:
            raise DataError(f"two examples are named {example.name!r}; give each its own name")
        names.add(example.name)
        if example.group not in GROUPS:
            raise DataError(
                f"example {example.name!r} is in group {example.group!r}; expected one of {GROUPS}"
            )
        for key in (example.id, example.tokens):
            other = owners.setdefault(key, example) if key else example
            if other.group != example.group:
                raise DataError(
                    f"examples {other.name!r} ({other.group}) and {example.name!r} ({example.group}) are "
                    "the same text; a text belongs to one group"
                )


def document_results(
    examples: Sequence[Example], measurements: Mapping[str, StateMeasurement]
) -> list[DocumentResult]:
    """Lay out the loss and matched prefix of every document by state; documents without a loss are left out.

    Args:
        examples: as handed to `audit_state`.
        measurements: state name → measurement, all of these examples.
    """
    losses = {state: measured.losses.mean_nats() for state, measured in measurements.items()}
    matched = {state: _matched(measured) for state, measured in measurements.items()}
    return [
        DocumentResult(
            example=example.name,
            group=example.group,
            source=example.source,
            repeats=example.repeats,
            num_tokens=len(example.tokens) - 1,
            loss_nats={state: float(values[number]) for state, values in losses.items()},
            matched_prefix_tokens={state: m[number] for state, m in matched.items() if number in m},
        )
        for number, example in enumerate(examples)
        if len(example.tokens) > 1
    ]


def continuations(
    examples: Sequence[Example],
    measurements: Mapping[str, StateMeasurement],
    decode: Callable[[int], str],
    *,
    num_per_group: int = 4,
) -> list[Continuation]:
    """Show what the model says after a prefix in each state, for the first extraction test.

    Chosen are, per group, the examples with the longest matched prefix in any state: illustrations, not a
    sample.

    Args:
        examples: as handed to `audit_state`.
        measurements: state name → measurement, all of these examples.
        decode: token id → its text.
        num_per_group: how many to show of a group.
    """
    tests = {state: m.extractions[0] for state, m in measurements.items() if m.extractions}
    if not tests:
        return []
    first = next(iter(tests.values()))
    best = np.max([test.scores.matched_prefix_tokens for test in tests.values()], axis=0)
    chosen: list[Continuation] = []
    for group in GROUPS:
        places = [place for place, i in enumerate(first.indices) if examples[i].group == group]
        places.sort(key=lambda place: -int(best[place]))
        for place in places[:num_per_group]:
            example = examples[first.indices[place]]
            chosen.append(
                Continuation(
                    example=example.name,
                    group=group,
                    prefix=[decode(token) for token in example.tokens[: first.prefix_tokens]],
                    truth=[decode(int(token)) for token in first.truth[place]],
                    generated={
                        state: [decode(int(token)) for token in test.generated[place]]
                        for state, test in tests.items()
                    },
                )
            )
    return chosen


def group_result(
    group: Group,
    is_member: NDArray[np.bool_],
    losses: DocumentLosses,
    extractions: Sequence[Extractions],
    settings: AuditSettings,
) -> GroupResult:
    """Summarize one group in one state; `is_member` has shape (N,)."""
    usable = is_member & (losses.num_tokens > 0)
    return GroupResult(
        group=group,
        num_examples=int(usable.sum()),
        num_excluded=int((is_member & ~usable).sum()),
        loss_nats=bootstrap_ratio(
            losses.nll_nats[usable],
            losses.num_tokens[usable],
            seed=settings.seed,
            num_resamples=settings.num_resamples,
        ),
        extraction=[_extraction(test, is_member, settings) for test in extractions],
    )


def _extraction(test: Extractions, is_member: NDArray[np.bool_], settings: AuditSettings) -> Extraction:
    picked, scores = is_member[test.indices], test.scores
    num = int(picked.sum())
    num_excluded = int(is_member.sum()) - num
    too_short = refused(
        f"no example has the {test.prefix_tokens} + {test.suffix_tokens} tokens it needs"
        if num_excluded
        else "no examples"
    )

    def rate(flags: NDArray[np.bool_]) -> Measure:
        return wilson(int(flags[picked].sum()), num) if num else too_short

    def mean(values: NDArray[np.float64] | NDArray[np.int64]) -> Measure:
        if not num:
            return too_short
        return bootstrap_mean(values[picked], seed=settings.seed, num_resamples=settings.num_resamples)

    return Extraction(
        prefix_tokens=test.prefix_tokens,
        suffix_tokens=test.suffix_tokens,
        extraction_rate_frac=rate(scores.is_exact),
        matched_prefix_tokens=mean(scores.matched_prefix_tokens),
        teacher_forced_accuracy_frac=mean(scores.teacher_forced_accuracy_frac),
        edit_distance_frac=mean(scores.edit_distance_frac),
        near_verbatim_rate_frac=rate(scores.is_near_verbatim),
        equal_positions_frac=mean(scores.equal_positions_frac),
        extraction_strength_frac=mean(scores.extraction_strength_frac),
        num_excluded=num_excluded,
    )


def _matched(measured: StateMeasurement) -> dict[int, int]:
    """Example number → matched prefix in tokens, for the first extraction test."""
    if not measured.extractions:
        return {}
    test = measured.extractions[0]
    return dict(zip(test.indices.tolist(), test.scores.matched_prefix_tokens.tolist(), strict=True))
