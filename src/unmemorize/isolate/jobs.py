"""What a training is told, and how a finished one is read back, whichever family.

A folder is a finished training once it holds `training.json`, which names what the training was.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from unmemorize.errors import CheckpointMismatch, ConfigError, FileFormatError
from unmemorize.files import read_json
from unmemorize.isolate.methods import Method
from unmemorize.isolate.plan import SinkPlan
from unmemorize.isolate.settings import OptimizationSettings, RecordSettings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

TRAINING_FILE = "training.json"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingJob(ABC):
    """What a training is told in either family.

    Attributes:
        method: how to train.
        plan: the sinks, for methods with a pool.
        seed: seed of what steps draw; data order and initial weights are made by the caller.
        optimization, records: settings.
        folder: becomes the trained model's folder.
        identity: what the training is, by part (settings, data, ...); checked before anything is continued.
        title: what progress calls the training.
    """

    method: Method
    plan: SinkPlan | None = None
    seed: int = 0
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    records: RecordSettings = field(default_factory=RecordSettings)
    folder: Path
    identity: Mapping[str, str] = field(default_factory=dict)
    title: str = "train"

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows to train on, repetitions counted."""

    @property
    @abstractmethod
    def num_ids(self) -> int:
        """Distinct sink ids among them, 0 left out."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        steps = math.ceil(self.num_rows / self.optimization.batch_rows)
        return min(steps, self.optimization.max_steps or steps)

    @property
    def whole_identity(self) -> dict[str, str]:
        """The identity with the plan's digest, and the data's where the job knows it."""
        plan = "none" if self.plan is None else self.plan.digest
        return {**self.identity, "plan": plan, **self._data_identity}

    @property
    def _data_identity(self) -> dict[str, str]:
        """What the job itself knows of its data, by part."""
        return {}

    def require_plan(self) -> None:
        """Raise `ConfigError` unless there is a plan exactly where the method has a pool."""
        if self.method.has_pool != (self.plan is not None):
            raise ConfigError(
                f"method {self.method.name} {'needs a' if self.method.has_pool else 'has no'} plan"
            )


def read_finished(
    kind: type[T], folder: Path, identity: Mapping[str, str] | None, *, format: str, version: int
) -> T:
    """Read what a finished training left, as a dataclass whose fields are `folder` and entries of the file.

    Raises:
        FileFormatError: if the folder holds no finished training.
        CheckpointMismatch: if it holds another training than `identity`.
    """
    path = folder / TRAINING_FILE
    value = read_json(path, format=format, version=version)
    for part, ours in (identity or {}).items():
        theirs = value.get("identity", {}).get(part)
        if theirs != ours:
            raise CheckpointMismatch(
                f"{folder} holds another training: {part} is {theirs} there and {ours} here; choose another folder"
            )
    try:
        names = [item.name for item in fields(kind) if item.name != "folder"]
        return kind(folder=folder, **{name: value[name] for name in names})  # type: ignore[call-arg]
    except KeyError as error:
        raise FileFormatError(f"{path} lacks {error}; train the model again") from error
