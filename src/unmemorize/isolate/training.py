"""One training, whichever family: steps, metrics, checkpoints, and where to continue.

    a step = the state of the generator, the gradient of the global batch, its norm clipped, AdamW at the scheduled rate

The random state of a step follows from seed, step and process, so that a training that was killed and started again
computes the same numbers (dropout included) without any generator being stored; the caller's are put back.

What a batch is, how its gradient is made and what a trained model leaves in its folder is the family's: `loop.py` for
language models, `picture_loop.py` for denoisers.
"""

from __future__ import annotations

import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from unmemorize.errors import ConfigError
from unmemorize.files import append_json_line, read_json_lines, write_json, write_json_lines
from unmemorize.isolate.checkpoints import Standing, load_checkpoint, newest_checkpoint, write_checkpoint
from unmemorize.isolate.jobs import TRAINING_FILE, TrainingJob
from unmemorize.isolate.methods import RoutedGradients
from unmemorize.isolate.optimizer import isolated_optimizer
from unmemorize.isolate.plan import SinkPlan
from unmemorize.isolate.steps import learning_rate, make_optimizer
from unmemorize.records import Progress, ProgressCallback

if TYPE_CHECKING:
    from accelerate import Accelerator

METRICS_FILE = "metrics.jsonl"

Metrics = dict[str, float | int | None]
J = TypeVar("J", bound=TrainingJob)


def train_to_end(make: Callable[[], Training[J]], accelerator: Accelerator) -> None:
    """Run a training, or continue it; the caller's random state is left as it was.

    Ctrl-C writes a checkpoint on the way out, unless it falls into the instant in which weights change; then the
    checkpoint before it counts.
    """
    devices = [] if accelerator.device.type == "cpu" else [accelerator.device]
    with torch.random.fork_rng(devices=devices):
        training = make()
        with training.attached():
            training.restore()
            try:
                training.run()
            except KeyboardInterrupt:
                training.save_checkpoint()
                raise
    if accelerator.is_main_process:
        training.finish()
    accelerator.wait_for_everyone()


class Training(ABC, Generic[J]):
    """The mutable middle of a training: model, optimizer, and where they stand.

    Args:
        job: what to train, and how.
        model: the module whose parameters are trained, in place.
        accelerator: one process, or several under DDP.
        progress: called with every line of metrics.
    """

    format: str
    """Name of the format of `training.json`."""
    version: int
    """Its version."""

    def __init__(
        self, job: J, model: nn.Module, accelerator: Accelerator, progress: ProgressCallback | None
    ) -> None:
        self.job = job
        self._model = model.to(accelerator.device).train()
        self._accelerator = accelerator
        self._progress = progress or (lambda _: None)
        self._wrapped = accelerator.prepare_model(model)
        self._optimizer = make_optimizer(model, job.optimization)
        self._routed = RoutedGradients(model, job.plan) if job.plan else None
        self._standing = self._logged = Standing()
        self._is_torn = False
        self._saved_at = time.monotonic()
        # What this process summed up since the last line of metrics, and what the sum over all is to be divided by.
        self._loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self._num_losses = 0

    @abstractmethod
    def _sinks(self, plan: SinkPlan) -> AbstractContextManager[Any]:
        """Open the block in which the model trains with the sinks of its plan."""

    @abstractmethod
    def _backward(self, places: slice) -> int:
        """Make this process's share of the gradient of some rows of the job, and add up the loss.

        Returns:
            Tokens in these rows, over all processes and without padding; 0 where tokens are not counted.
        """

    @abstractmethod
    def _metrics(self, loss: float, *, is_evaluated: bool) -> tuple[Metrics, str]:
        """Return a line of metrics, and what progress says of it, from the mean loss since the last line."""

    @abstractmethod
    def _save(self) -> None:
        """Write the trained model into the job's folder; files appear complete."""

    @abstractmethod
    def _figures(self) -> dict[str, float | int]:
        """Return what `training.json` says of the amount of work, beyond the number of steps."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach sinks and keep unowned ones still, for methods that have a pool."""
        job = self.job
        with ExitStack() as stack:
            if job.plan is not None:
                scale = job.method.settings.sink_learning_rate_scale
                stack.enter_context(
                    isolated_optimizer(self._optimizer, self._model, job.plan, sink_learning_rate_scale=scale)
                )
                stack.enter_context(self._sinks(job.plan))
            yield

    def restore(self) -> None:
        """Continue from the newest checkpoint, and drop metrics that were logged after it."""
        checkpoint = newest_checkpoint(self._checkpoints)
        if checkpoint is not None:
            self._standing = load_checkpoint(
                checkpoint, self._model, self._optimizer, self.job.whole_identity
            )
        self._logged = self._standing
        path = self.job.folder / METRICS_FILE
        if self._accelerator.is_main_process and path.is_file():
            kept = [row for row in read_json_lines(path) if row.get("step", 0) <= self._standing.step]
            write_json_lines(path, kept)
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
        write_checkpoint(
            self._checkpoints, self._model, self._optimizer, self._standing, self.job.whole_identity
        )
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Leave the trained model, mark its folder as finished, and delete the checkpoint."""
        job = self.job
        self._save()
        value = {
            "format": self.format,
            "format_version": self.version,
            "method": job.method.name,
            "seed": job.seed,
            "num_parameters": sum(p.numel() for p in self._model.parameters()),
            "num_ids": job.num_ids,
            "steps": self._standing.step,
            **self._figures(),
            "identity": dict(job.whole_identity),
        }
        write_json(job.folder / TRAINING_FILE, value)
        shutil.rmtree(self._checkpoints, ignore_errors=True)

    @property
    def _checkpoints(self) -> Path:
        return self.job.folder / "checkpoint"

    @property
    def _step_seed(self) -> int:
        """Seed of the step that is next, the same in all processes."""
        return self.job.seed * 1_000_003 + self._standing.step

    def _step(self) -> None:
        start_s = time.perf_counter()
        job, settings, step = self.job, self.job.optimization, self._standing.step
        # Dropout differs between processes.
        torch.manual_seed(self._step_seed * 4_099 + self._accelerator.process_index)
        tokens = self._backward(slice(step * settings.batch_rows, (step + 1) * settings.batch_rows))
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), settings.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, job.num_steps, settings)
        self._is_torn = True
        self._optimizer.step()
        self._standing = Standing(
            step=step + 1,
            tokens=self._standing.tokens + tokens,
            train_s=self._standing.train_s + time.perf_counter() - start_s,
        )
        self._is_torn = False
        self._optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _one_pass(self, *, is_last: bool) -> Iterator[None]:
        """Open the block of one forward and backward pass; processes exchange gradients in the last of several."""
        device, precision = self._accelerator.device.type, self.job.optimization.precision
        with (
            nullcontext() if is_last else self._accelerator.no_sync(self._wrapped),
            nullcontext() if precision == "float32" else torch.autocast(device, dtype=torch.bfloat16),
        ):
            yield

    def _log(self, *, is_evaluated: bool) -> None:
        now, job = self._standing, self.job
        loss = float(self._accelerator.reduce(self._loss, reduction="sum")) / max(self._num_losses, 1)
        self._num_losses = 0
        self._loss.zero_()
        if not self._accelerator.is_main_process:
            return
        _require_finite("training_loss", loss, now.step)
        row, words = self._metrics(loss, is_evaluated=is_evaluated)
        for name, value in row.items():
            _require_finite(name, value, now.step)
        self._logged = now
        append_json_line(job.folder / METRICS_FILE, row)
        self._accelerator.log({k: v for k, v in row.items() if v is not None and k != "step"}, step=now.step)
        left_s = (job.num_steps - now.step) * now.train_s / now.step
        message = f"{words}, {left_s:,.0f} s left"
        self._progress(Progress(job.title, now.step, job.num_steps, "steps", message))

    @property
    def _learning_rate(self) -> float:
        """Learning rate of the step that was taken last."""
        return learning_rate(self._standing.step - 1, self.job.num_steps, self.job.optimization)


def _require_finite(name: str, value: float | None, step: int) -> None:
    if value is not None and not math.isfinite(value):
        raise ConfigError(
            f"the {name.removesuffix('_nats').replace('_', ' ')} is {value} at step {step}; lower learning_rate"
        )
