"""One training: one model, one method, one seed. Plain PyTorch, and DDP through accelerate.

    loss of a step = sum of nats over the global batch / number of its labels

With `shared_cap` the tokens of late sightings teach sinks alone: two forward and backward passes, each over the rows
that have labels for it, both divided by the labels of the whole batch.

What distinguishes methods is asked of `methods.Method`; this file knows steps, metrics and where to continue. The
random state of a step follows from seed, step and process, so that a training that was killed and started again
computes the same numbers (dropout included) without any generator being stored; the caller's are put back.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError, FileFormatError, RunFolderError
from unmemorize.files import append_json_line, read_json, read_json_lines, write_atomic, write_json
from unmemorize.isolate.checkpoints import Standing, load_checkpoint, newest_checkpoint, write_checkpoint
from unmemorize.isolate.engine import make_accelerator, require_identity, train_to_end
from unmemorize.isolate.language import sink_state, training_sinks
from unmemorize.isolate.methods import Method, RoutedGradients
from unmemorize.isolate.optimizer import isolated_optimizer
from unmemorize.isolate.packing import IGNORED, Row, spread, to_batch
from unmemorize.isolate.plan import SinkPlan
from unmemorize.isolate.settings import OptimizationSettings, RecordSettings
from unmemorize.isolate.steps import (
    Batch,
    count_labels,
    learning_rate,
    loss_sum,
    make_optimizer,
    mean_loss_nats,
    micro_batches,
    moved,
)
from unmemorize.models.base import quiet_transformers
from unmemorize.records import Progress, ProgressCallback

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAINING_FORMAT = "unmemorize.training"
TRAINING_VERSION = 1
METRICS_FILE = "metrics.jsonl"
PLAN_FILE = "sinks.json"
TRAINING_FILE = "training.json"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """Everything that one training needs; equal jobs give equal weights.

    Attributes:
        model: trained in place.
        rows: training rows in order, documents as (token ids, sink id).
        numbers: which document each one in rows is a piece of, if some were split (see `pack_numbered`).
        validation, repeated: rows to evaluate on, state off.
        method: how to train.
        plan: the sinks, for methods with a pool.
        seed: seed of dropout; data order and initial weights are made by the caller.
        optimization, records: settings.
        folder: becomes the trained model's folder.
        identity: what the training is, by part (settings, data, ...); checked before anything is continued.
        tokenizer: saved beside the weights.
        title: what progress calls the training.
    """

    model: PreTrainedModel
    rows: Sequence[Row]
    numbers: Sequence[Sequence[int]] | None = None
    validation: Sequence[Row] = ()
    repeated: Sequence[Row] = ()
    method: Method
    plan: SinkPlan | None = None
    seed: int = 0
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    records: RecordSettings = field(default_factory=RecordSettings)
    folder: Path
    identity: Mapping[str, str] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    title: str = "train"

    @property
    def whole_identity(self) -> dict[str, str]:
        """The identity with the plan's digest."""
        return {**self.identity, "plan": "none" if self.plan is None else self.plan.digest}

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError("there are no rows to train on; give more documents")
        if self.method.has_pool != (self.plan is not None):
            raise ConfigError(
                f"method {self.method.name} {'needs a' if self.method.has_pool else 'has no'} plan"
            )
        if self.numbers is not None and [len(row) for row in self.numbers] != [len(row) for row in self.rows]:
            raise ConfigError("numbers and rows differ in layout; take both from pack_numbered")

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        steps = math.ceil(len(self.rows) / self.optimization.batch_rows)
        return min(steps, self.optimization.max_steps or steps)


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
    if (job.folder / TRAINING_FILE).is_file():
        return read_training(job.folder, job.whole_identity)
    train_to_end(lambda: _Training(job, accelerator, progress), accelerator)
    return read_training(job.folder, job.whole_identity)


def read_training(folder: Path, identity: Mapping[str, str] | None = None) -> TrainedRun:
    """Read what a finished training left.

    Raises:
        FileFormatError: if the folder holds no finished training.
        CheckpointMismatch: if it holds another training than `identity`.
    """
    value = read_json(folder / TRAINING_FILE, format=TRAINING_FORMAT, version=TRAINING_VERSION)
    require_identity(folder, value, identity)
    try:
        names = [name for name in TrainedRun.__slots__ if name != "folder"]
        return TrainedRun(folder=folder, **{name: value[name] for name in names})
    except KeyError as error:
        raise FileFormatError(f"{folder / TRAINING_FILE} lacks {error}; train the model again") from error


class _Training:
    """The mutable middle of a training: model, optimizer, and where they stand."""

    def __init__(self, job: Job, accelerator: Accelerator, progress: ProgressCallback | None) -> None:
        self.job = job
        self._accelerator = accelerator
        self._progress = progress or (lambda _: None)
        job.model.to(accelerator.device).train()
        self._wrapped = accelerator.prepare_model(job.model)
        self._optimizer = make_optimizer(job.model, job.optimization)
        self._is_late = job.method.late(job.rows, job.numbers)
        self._routed = RoutedGradients(job.model, job.plan) if job.plan else None
        self._standing = Standing()
        self._is_torn = False
        self._saved_at = time.monotonic()
        self._loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self._since = Standing()
        self._labels = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach sinks and keep unowned ones still, for methods that have a pool."""
        job = self.job
        with ExitStack() as stack:
            if job.plan is not None:
                scale = job.method.settings.sink_learning_rate_scale
                stack.enter_context(
                    isolated_optimizer(self._optimizer, job.model, job.plan, sink_learning_rate_scale=scale)
                )
                if job.method.kind == "sinks":
                    compute = job.method.settings.compute
                    stack.enter_context(training_sinks(job.model, job.plan, compute=compute))
            yield

    def restore(self) -> None:
        """Continue from the newest checkpoint, and drop metrics that were logged after it."""
        checkpoint = newest_checkpoint(self._checkpoints)
        if checkpoint is not None:
            self._standing = load_checkpoint(
                checkpoint, self.job.model, self._optimizer, self.job.whole_identity
            )
        self._since = self._standing
        path = self.job.folder / METRICS_FILE
        if self._accelerator.is_main_process and path.is_file():
            kept = [row for row in read_json_lines(path) if row.get("step", 0) <= self._standing.step]
            write_atomic(path, "")
            for row in kept:
                append_json_line(path, row)
        self._accelerator.wait_for_everyone()

    def run(self) -> None:
        """Take the steps that are left."""
        job, records = self.job, self.job.records
        evaluate_every = records.evaluate_every_steps or max(1, math.ceil(job.num_steps / 8))
        while self._standing.step < job.num_steps:
            self._step()
            step = self._standing.step
            is_last = step == job.num_steps
            is_evaluated = is_last or step % evaluate_every == 0
            if is_evaluated or step % records.log_every_steps == 0:
                self._log(is_evaluated=is_evaluated)
            every = records.checkpoint_every_steps
            is_due = time.monotonic() - self._saved_at >= records.checkpoint_every_s
            if is_last or is_due or (every is not None and step % every == 0):
                self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Write a checkpoint, unless weights and moments are half-way between two steps."""
        if self._is_torn or not self._accelerator.is_main_process:
            return
        job = self.job
        write_checkpoint(self._checkpoints, job.model, self._optimizer, self._standing, job.whole_identity)
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Leave the trained model's folder, mark it finished, and delete the checkpoint."""
        job = self.job
        save_model(job)
        standing = {key: value for key, value in asdict(self._standing).items() if key != "step"}
        ids = {identity for row in job.rows for _, identity in row if identity}
        value = {
            "format": TRAINING_FORMAT,
            "format_version": TRAINING_VERSION,
            "method": job.method.name,
            "seed": job.seed,
            "num_parameters": sum(p.numel() for p in job.model.parameters()),
            "num_ids": len(ids),
            "steps": self._standing.step,
            **standing,
            "tokens_per_s": self._standing.tokens / max(self._standing.train_s, 1e-9),
            "identity": dict(job.whole_identity),
        }
        write_json(job.folder / TRAINING_FILE, value)
        shutil.rmtree(self._checkpoints, ignore_errors=True)

    @property
    def _checkpoints(self) -> Path:
        return self.job.folder / "checkpoint"

    def _step(self) -> None:
        start_s = time.perf_counter()
        job, settings, step = self.job, self.job.optimization, self._standing.step
        rank = self._accelerator.process_index
        torch.manual_seed((job.seed * 1_000_003 + step) * 4_099 + rank)
        places = slice(step * settings.batch_rows, (step + 1) * settings.batch_rows)
        rows = job.rows[places]
        self._backward(to_batch(rows), spread(rows, self._is_late[places]))
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(job.model.parameters(), settings.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, job.num_steps, settings)
        tokens = sum(len(document) for row in rows for document, _ in row)
        self._is_torn = True
        self._optimizer.step()
        self._standing = Standing(
            step=step + 1,
            tokens=self._standing.tokens + tokens,
            train_s=self._standing.train_s + time.perf_counter() - start_s,
        )
        self._is_torn = False
        self._optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch, is_late: Tensor) -> None:
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
            is_last = number == len(parts) - 1
            with nullcontext() if is_last else accelerator.no_sync(self._wrapped), self._autocast():
                loss = loss_sum(
                    self._wrapped,
                    moved(part, accelerator.device),
                    has_sinks=self.job.method.kind == "sinks",
                )
                (loss * scale).backward()
            self._loss += loss.detach()
        self._labels += count_labels(batch["labels"])

    def _autocast(self) -> Any:
        if self.job.optimization.precision == "float32":
            return nullcontext()
        return torch.autocast(self._accelerator.device.type, dtype=torch.bfloat16)

    def _log(self, *, is_evaluated: bool) -> None:
        now, job = self._standing, self.job
        loss = float(self._accelerator.reduce(self._loss, reduction="sum")) / max(self._labels, 1)
        per_s = (now.tokens - self._since.tokens) / max(now.train_s - self._since.train_s, 1e-9)
        self._since, self._labels = now, 0
        self._loss.zero_()
        if not self._accelerator.is_main_process:
            return
        row: dict[str, float | int | None] = {
            "step": now.step,
            "tokens": now.tokens,
            "train_loss_nats": loss,
            "validation_loss_nats": self._evaluated(job.validation) if is_evaluated else None,
            "repeated_loss_nats": self._evaluated(job.repeated) if is_evaluated else None,
            "learning_rate": learning_rate(now.step - 1, job.num_steps, job.optimization),
            "tokens_per_s": per_s,
        }
        if not math.isfinite(loss):
            raise ConfigError(f"the training loss is {loss} at step {now.step}; lower learning_rate")
        append_json_line(job.folder / METRICS_FILE, row)
        self._accelerator.log({k: v for k, v in row.items() if v is not None and k != "step"}, step=now.step)
        left_s = (job.num_steps - now.step) * now.train_s / now.step
        message = f"loss {loss:.2f} nats, {per_s:,.0f} tokens/s, {left_s:,.0f} s left"
        self._progress(Progress(job.title, now.step, job.num_steps, "steps", message))

    def _evaluated(self, rows: Sequence[Row]) -> float | None:
        job = self.job
        if job.plan is None or job.method.kind == "sinks":
            return mean_loss_nats(job.model, rows)
        with sink_state(job.model, job.plan, "off"):
            return mean_loss_nats(job.model, rows)


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
        raise RunFolderError(
            f"cannot write the model to {job.folder}: {reason}; free space and start again to continue"
        ) from error
    if job.plan is not None:
        job.plan.save(job.folder / PLAN_FILE)
