"""The audit of language models: what models know of repeated and of new text, by method, seed and state."""

from __future__ import annotations

from typing import Any, Literal

from unmemorize.records.base import Group, Measure, Record, StoredRecord

StateName = Literal["plain", "off", "own", "foreign", "all", "exclude", "placebo"]


class Extraction(Record):
    """Verbatim extraction with a prefix of k and a suffix of l tokens (docs/metrics.md)."""

    prefix_tokens: int
    suffix_tokens: int
    extraction_rate_frac: Measure
    matched_prefix_tokens: Measure
    teacher_forced_accuracy_frac: Measure
    edit_distance_frac: Measure
    near_verbatim_rate_frac: Measure | None = None
    equal_positions_frac: Measure | None = None
    extraction_strength_frac: Measure | None = None
    num_excluded: int = 0


class GroupResult(Record):
    """One group of examples in one state."""

    group: Group
    num_examples: int
    loss_nats: Measure
    num_excluded: int = 0
    extraction: list[Extraction] = []


class StateResult(Record):
    """All groups in one state of one model."""

    state: StateName
    rescaled: bool = False
    description: str = ""
    groups: list[GroupResult]


class Continuation(Record):
    """A prefix, what the training text continues with, and what the model says in each state (token strings)."""

    example: str
    group: Group
    prefix: list[str]
    truth: list[str]
    generated: dict[str, list[str]]


class DocumentResult(Record):
    """One document: loss in nats per predicted token by state; `num_tokens` counts the predicted tokens."""

    example: str
    group: Group
    source: str = ""
    repeats: int = 1
    num_tokens: int = 0
    loss_nats: dict[str, float]
    matched_prefix_tokens: dict[str, int] = {}


class CurvePoint(Record):
    """One logged point of training."""

    step: int
    tokens: int
    train_loss_nats: float
    validation_loss_nats: float | None = None
    repeated_loss_nats: float | None = None


class SeedResult(Record):
    """One trained model: the five headline figures in the state it would be shipped in, and everything behind them."""

    seed: int
    state: StateName
    validation_loss_nats: Measure
    repeated_loss_nats: Measure
    gap_closed_frac: Measure
    repetition_benefit_kept_frac: Measure
    extraction_rate_frac: Measure
    beyond_curve_nats: Measure | None = None
    states: list[StateResult] = []
    documents: list[DocumentResult] = []
    continuations: list[Continuation] = []
    curve: list[CurvePoint] = []
    num_parameters: int = 0
    train_s: float = 0.0
    tokens_per_s: float = 0.0


class MethodSummary(Record):
    """The five headline figures as means over seeds; intervals are over seeds (Student t), refused below 3 seeds.

    `beyond_curve_nats` is the repeated loss above that of the `cap:R` curve at the same validation loss: positive
    is beyond the curve, negative behind it.
    """

    validation_loss_nats: Measure
    repeated_loss_nats: Measure
    gap_closed_frac: Measure
    repetition_benefit_kept_frac: Measure
    extraction_rate_frac: Measure
    beyond_curve_nats: Measure | None = None


class MethodResult(Record):
    """One training method over its seeds."""

    method: str
    label: str
    settings: dict[str, Any] = {}
    seeds: list[SeedResult]
    summary: MethodSummary


class Audit(StoredRecord):
    """The whole of `audit.json`. `kind` is "training" (methods compared) or "model" (one model looked at)."""

    format: Literal["unmemorize.audit"] = "unmemorize.audit"
    format_version: Literal[1] = 1
    kind: Literal["training", "model"]
    family: Literal["language", "diffusion"] = "language"
    title: str
    verdict: str
    settings: dict[str, Any]
    environment: dict[str, str]
    methods: list[MethodResult]
    limits: list[str] = []
