"""What an audit says, as data: the models behind `audit.json`. Torch-free.

The report, the explorer and every downstream tool read these and nothing else, so a report can be made
again years later without a model. Each figure is a `Measure`: a value with its 95 % interval and sample
count, or a refusal with its reason, never a bare number. Formats are described in docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unmemorize.errors import FileFormatError
from unmemorize.files import read_json, write_json

AUDIT_FORMAT = "unmemorize.audit"
AUDIT_VERSION = 1

Group = Literal["target", "neighbour", "heldout", "ordinary"]
StateName = Literal["plain", "off", "own", "foreign", "all", "exclude", "placebo"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of long work: `done` of `total` units, and a short message."""

    stage: str
    done: int
    total: int
    unit: str = ""
    message: str = ""


ProgressCallback = Callable[[Progress], None]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measure(_Record):
    """A figure with its interval, or the reason why there is none.

    `value` and `ci95` carry the unit that the field's name ends in. `num` is the sample size behind it.
    Exactly one of `value` and `refused` is set. `method` names how the interval was made
    ("bootstrap", "wilson", "t", "exact" for numbers without sampling).
    """

    value: float | None = None
    ci95: Annotated[tuple[float, float] | None, Field(description="95 % interval, low and high")] = None
    num: int = 0
    method: str = ""
    refused: str | None = None

    @model_validator(mode="after")
    def _value_or_refusal(self) -> Measure:
        if (self.value is None) == (self.refused is None):
            raise ValueError("a measure holds either a value or a refusal")
        return self


class Extraction(_Record):
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


class GroupResult(_Record):
    """One group of examples in one state."""

    group: Group
    num_examples: int
    loss_nats: Measure
    num_excluded: int = 0
    extraction: list[Extraction] = []


class StateResult(_Record):
    """All groups in one state of one model."""

    state: StateName
    rescaled: bool = False
    description: str = ""
    groups: list[GroupResult]


class Continuation(_Record):
    """A prefix, what the training text continues with, and what the model says in each state (token strings)."""

    example: str
    group: Group
    prefix: list[str]
    truth: list[str]
    generated: dict[str, list[str]]


class DocumentResult(_Record):
    """One document: loss in nats per predicted token by state; `num_tokens` counts the predicted tokens."""

    example: str
    group: Group
    source: str = ""
    repeats: int = 1
    num_tokens: int = 0
    loss_nats: dict[str, float]
    matched_prefix_tokens: dict[str, int] = {}


class CurvePoint(_Record):
    """One logged point of training."""

    step: int
    tokens: int
    train_loss_nats: float
    validation_loss_nats: float | None = None
    repeated_loss_nats: float | None = None


class SeedResult(_Record):
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


class MethodSummary(_Record):
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


class MethodResult(_Record):
    """One training method over its seeds."""

    method: str
    label: str
    settings: dict[str, Any] = {}
    seeds: list[SeedResult]
    summary: MethodSummary


class Audit(_Record):
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

    def save(self, path: str | Path) -> Path:
        """Write `audit.json` atomically."""
        return write_json(path, self.model_dump(mode="json", exclude_none=False))


def load_audit(path: str | Path) -> Audit:
    """Read and validate an `audit.json`.

    Raises:
        FileFormatError: if the file is missing, torn, of another version, or does not fit the schema.
    """
    value = read_json(path, format=AUDIT_FORMAT, version=AUDIT_VERSION)
    try:
        return Audit.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FileFormatError(f"{path} does not fit the audit format at {place}: {first['msg']}") from error
