"""One training of a language model: one model, one method, one seed. Plain PyTorch, and DDP through accelerate.

    loss of a step = sum of nats over the global batch / number of its labels

With `shared_cap` the tokens of late sightings teach sinks alone: two forward and backward passes, each over the rows
that have labels for it, both divided by the labels of the whole batch.

What distinguishes methods is asked of `methods.Method`; steps, metrics, checkpoints and where to continue are in
`training.py`. This file knows batches of packed documents, and the folder of a trained model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from unmemorize.errors import ConfigError, RunFolderError
from unmemorize.files import what_to_do
from unmemorize.isolate.engine import make_accelerator
from unmemorize.isolate.jobs import TRAINING_FILE, TrainingJob, read_finished
from unmemorize.isolate.language import sink_state, training_sinks
from unmemorize.isolate.packing import IGNORED, Row, spread, to_batch
from unmemorize.isolate.plan import SinkPlan
from unmemorize.isolate.steps import Batch, count_labels, loss_sum, mean_loss_nats, micro_batches, moved
from unmemorize.isolate.training import Metrics, Training, train_to_end
from unmemorize.models.base import quiet_transformers
from unmemorize.records import ProgressCallback

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAINING_FORMAT = "unmemorize.training"
TRAINING_VERSION = 1
PLAN_FILE = "sinks.json"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job(TrainingJob):
    """Everything that one training needs; equal jobs give equal weights.

    Attributes:
        model: trained in place.
        rows: training rows in order, documents as (token ids, sink id).
        numbers: which document each one in rows is a piece of, if some were split (see `pack_numbered`).
        validation, repeated: rows to evaluate on, state off.
        tokenizer: saved beside the weights.
        others: as in `TrainingJob`; the seed is that of dropout.
    """

    model: PreTrainedModel
    rows: Sequence[Row]
    numbers: Sequence[Sequence[int]] | None = None
    validation: Sequence[Row] = ()
    repeated: Sequence[Row] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError("there are no rows to train on; give more documents")
        self.require_plan()
        if self.numbers is not None and [len(row) for row in self.numbers] != [len(row) for row in self.rows]:
            raise ConfigError("numbers and rows differ in layout; take both from pack_numbered")

    @property
    def num_rows(self) -> int:
        """Rows to train on."""
        return len(self.rows)

    @property
    def num_ids(self) -> int:
        """Distinct sink ids in the rows, 0 left out."""
        return len({identity for row in self.rows for _, identity in row if identity})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """A finished training.

    Attributes:
        method: the method string.
        seed: its seed.
        folder: the model's folder.
        num_parameters: parameters of the trained model, pool included.
        num_ids: distinct sink ids that it saw; 0 means that it never opened a sink.
        steps: optimizer steps.
        tokens: tokens seen, padding left out.
        train_s: time spent in steps, seconds.
        tokens_per_s: tokens / train_s.
    """

    method: str
    seed: int
    folder: Path
    num_parameters: int
    num_ids: int
    steps: int
    tokens: int
    train_s: float
    tokens_per_s: float


def train_method(
    job: Job, *, accelerator: Accelerator | None = None, progress: ProgressCallback | None = None
) -> TrainedRun:
    """Train one model, or continue where an earlier call stopped; a finished one is not trained again.

    Ctrl-C writes a checkpoint on the way out, unless it falls into the instant in which weights change; then the
    checkpoint before it counts.

    Raises:
        CheckpointMismatch: if the folder holds another training.
        FileFormatError: if its checkpoint is damaged.
        RunFolderError: if the folder cannot be written.
    """
    accelerator = accelerator or make_accelerator(job.records)
    if not (job.folder / TRAINING_FILE).is_file():
        train_to_end(lambda: _Training(job, accelerator, progress), accelerator)
    return read_training(job.folder, job.whole_identity)


def read_training(folder: Path, identity: Mapping[str, str] | None = None) -> TrainedRun:
    """Read what a finished training left.

    Raises:
        FileFormatError: if the folder holds no finished training.
        CheckpointMismatch: if it holds another training than `identity`.
    """
    return read_finished(TrainedRun, folder, identity, format=TRAINING_FORMAT, version=TRAINING_VERSION)


class _Training(Training[Job]):
    """The training of a language model."""

    format, version = TRAINING_FORMAT, TRAINING_VERSION

    def __init__(self, job: Job, accelerator: Accelerator, progress: ProgressCallback | None) -> None:
        super().__init__(job, job.model, accelerator, progress)
        self._is_late = job.method.late(job.rows, job.numbers)

    def _sinks(self, plan: SinkPlan) -> AbstractContextManager[Any]:
        method = self.job.method
        if method.kind != "sinks":
            return nullcontext()
        return training_sinks(self.job.model, plan, compute=method.settings.compute)

    def _backward(self, places: slice) -> int:
        rows = self.job.rows[places]
        self._add_gradients(to_batch(rows), spread(rows, self._is_late[places]))
        return sum(len(document) for row in rows for document, _ in row)

    def _add_gradients(self, batch: Batch, is_late: Tensor) -> None:
        """Make this process's share of the gradient, in as many passes as the method needs."""
        method = self.job.method
        num_labels = count_labels(batch["labels"])
        halves = method.halves(has_late=count_labels(batch["labels"].masked_fill(~is_late, IGNORED)) > 0)
        for half in halves:
            labels = method.labels(batch["labels"], batch["sink_ids"], half, is_late)
            if half in ("late", "early"):
                # The same rows on all processes, so that all make equally many passes.
                chosen = (labels[:, 1:] != IGNORED).any(1)
                part = {name: tensor[chosen] for name, tensor in {**batch, "labels": labels}.items()}
                self._add_gradient(part, num_labels)
            else:
                self._add_gradient({**batch, "labels": labels}, count_labels(labels))
            if self._routed is not None and half in ("repeated", "late"):
                self._routed.keep_pool()
            elif self._routed is not None and half in ("others", "early"):
                self._routed.put_pool(adds=half == "early")

    def _add_gradient(self, batch: Batch, num_labels: int) -> None:
        """Add the gradient of this process's share of the summed loss of some rows over a number of labels."""
        accelerator = self._accelerator
        parts = micro_batches(
            batch, accelerator.process_index, accelerator.num_processes, self.job.optimization.micro_rows
        )
        # DDP averages over processes, so the share of each is scaled up by their number.
        scale = accelerator.num_processes / max(num_labels, 1)
        for number, part in enumerate(parts):
            with self._one_pass(is_last=number == len(parts) - 1):
                loss = loss_sum(
                    self._wrapped,
                    moved(part, accelerator.device),
                    has_sinks=self.job.method.kind == "sinks",
                )
                (loss * scale).backward()
            self._loss += loss.detach()
        self._num_losses += count_labels(batch["labels"])

    def _metrics(self, loss: float, *, is_evaluated: bool) -> tuple[Metrics, str]:
        now, since, job = self._standing, self._logged, self.job
        per_s = (now.tokens - since.tokens) / max(now.train_s - since.train_s, 1e-9)
        row: Metrics = {
            "step": now.step,
            "tokens": now.tokens,
            "train_loss_nats": loss,
            "validation_loss_nats": self._evaluated(job.validation) if is_evaluated else None,
            "repeated_loss_nats": self._evaluated(job.repeated) if is_evaluated else None,
            "learning_rate": self._learning_rate,
            "tokens_per_s": per_s,
        }
        return row, f"loss {loss:.2f} nats, {per_s:,.0f} tokens/s"

    def _evaluated(self, rows: Sequence[Row]) -> float | None:
        job = self.job
        if job.plan is None or job.method.kind == "sinks":
            return mean_loss_nats(job.model, rows)
        with sink_state(job.model, job.plan, "off"):
            return mean_loss_nats(job.model, rows)

    def _save(self) -> None:
        save_model(self.job)

    def _figures(self) -> dict[str, float | int]:
        now = self._standing
        return {
            "tokens": now.tokens,
            "train_s": now.train_s,
            "tokens_per_s": now.tokens / max(now.train_s, 1e-9),
        }


def save_model(job: Job) -> None:
    """Write the plain model folder, its plan and its tokenizer; files appear complete.

    Raises:
        RunFolderError: if the folder cannot be written.
    """
    from safetensors import SafetensorError

    partial = job.folder / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with quiet_transformers():
            job.model.save_pretrained(partial)
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(str(partial))
        for path in sorted(partial.iterdir()):
            path.replace(job.folder / path.name)
        partial.rmdir()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = what_to_do(error, "free space and start again to continue")
        raise RunFolderError(f"cannot write the model to {job.folder}: {reason}; {advice}") from error
    if job.plan is not None:
        job.plan.save(job.folder / PLAN_FILE)
