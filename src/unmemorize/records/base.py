"""What all records share: a step of progress, a figure with its interval, and the four groups of examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from unmemorize.files import write_json

AUDIT_FORMAT = "unmemorize.audit"
AUDIT_VERSION = 1

Group = Literal["target", "neighbour", "heldout", "ordinary"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of long work: `done` of `total` units, and a short message."""

    stage: str
    done: int
    total: int
    unit: str = ""
    message: str = ""


ProgressCallback = Callable[[Progress], None]


class Record(BaseModel):
    """Frozen, and strict about its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredRecord(Record):
    """A record that is a file of its own."""

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, atomically."""
        return write_json(path, self.model_dump(mode="json", exclude_none=False))


class Measure(Record):
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
