"""One training of a text-to-image denoiser: one pipeline, one method, one seed; DDP through accelerate.

The counterpart of `loop.py`, with the same promises: the random state of a step follows from seed and step, a training
that was killed and started again computes the same numbers, and the folder is marked finished last. A trained model is
a pipeline folder; with a pool it is what `save_with_sinks` writes.

    loss of a step = mean over the global batch of the mean squared error of each picture's prediction

With `shared_cap` later sightings teach the sinks of a picture alone: two backward passes, each over its part of the
batch, both divided by the size of the whole. What is left when the pool is cut out has learned from no picture more
often than that.

Text encoders and VAE stay as they are.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError, FileFormatError
from unmemorize.files import (
    append_json_line,
    read_json,
    read_json_lines,
    whole_folder,
    write_atomic,
    write_json,
)
from unmemorize.isolate.checkpoints import Standing, load_checkpoint, newest_checkpoint, write_checkpoint
from unmemorize.isolate.diffusion import training_sinks
from unmemorize.isolate.engine import make_accelerator, require_identity, train_to_end
from unmemorize.isolate.methods import Method, RoutedGradients
from unmemorize.isolate.optimizer import isolated_optimizer
from unmemorize.isolate.picture_data import (
    PictureBatch,
    PictureData,
    draw_batch,
    mean_loss,
    num_levels,
    row_losses,
)
from unmemorize.isolate.plan import SinkPlan
from unmemorize.isolate.settings import OptimizationSettings, RecordSettings
from unmemorize.isolate.sink_files import save_with_sinks
from unmemorize.isolate.steps import learning_rate, make_optimizer
from unmemorize.models.denoising import Pipeline, denoiser_of
from unmemorize.models.diffusion import quiet_diffusers
from unmemorize.records import Progress, ProgressCallback

if TYPE_CHECKING:
    from accelerate import Accelerator

PICTURE_TRAINING_FORMAT = "unmemorize.picture_training"
PICTURE_TRAINING_VERSION = 1
METRICS_FILE, TRAINING_FILE, PIPELINE_FOLDER = "metrics.jsonl", "training.json", "pipeline"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PictureJob:
    """Everything that one training needs; equal jobs give equal weights.

    Attributes:
        pipe: the pipeline; its denoiser is trained in place.
        data: the encoded pictures.
        order: rows of the data in the order in which they are seen.
        sink_ids: id that each row of the data carries, 0 where it opens no sinks; length N.
        validation, repeated: rows to evaluate on, pool off.
        method: how to train.
        plan: the sinks, for method sinks.
        seed: seed of noise, timesteps and dropped captions.
        empty_caption_frac: share of pictures whose caption is dropped, 0 to 1.
        empty_caption_sinks: "own" or "off": whose sinks such a picture opens (decision record 8).
        optimization, records: settings; a row of a batch is a picture.
        folder: becomes the trained model's folder.
        identity: what the training is, by part; checked before anything is continued.
        title: what progress calls the training.
    """

    pipe: Pipeline
    data: PictureData
    order: Sequence[int]
    sink_ids: Sequence[int]
    validation: Sequence[int] = ()
    repeated: Sequence[int] = ()
    method: Method
    plan: SinkPlan | None = None
    seed: int = 0
    empty_caption_frac: float = 0.1
    empty_caption_sinks: Literal["own", "off"] = "own"
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    records: RecordSettings = field(default_factory=RecordSettings)
    folder: Path
    identity: Mapping[str, str] = field(default_factory=dict)
    title: str = "train"

    def __post_init__(self) -> None:
        if not self.order:
            raise ConfigError("there are no pictures to train on; give more")
        if self.method.kind not in ("standard", "dedup", "cap", "sinks"):
            raise ConfigError(
                f"method {self.method.name} is for language models; expected standard, dedup, cap:R or sinks"
            )
        if self.method.has_pool != (self.plan is not None):
            raise ConfigError(
                f"method {self.method.name} {'needs a' if self.method.has_pool else 'has no'} plan"
            )
        if not 0.0 <= self.empty_caption_frac <= 1.0:
            raise ConfigError(f"empty_caption_frac is {self.empty_caption_frac}, expected 0 to 1")
        if self.empty_caption_sinks not in ("own", "off"):
            raise ConfigError(f"empty_caption_sinks is {self.empty_caption_sinks!r}, expected own or off")

    @property
    def whole_identity(self) -> dict[str, str]:
        """The identity with the plan's digest and the data's."""
        plan = "none" if self.plan is None else self.plan.digest
        return {**self.identity, "plan": plan, "pictures": self.data.digest}

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        steps = math.ceil(len(self.order) / self.optimization.batch_rows)
        return min(steps, self.optimization.max_steps or steps)

    @property
    def is_late(self) -> list[bool]:
        """Which places of the order teach sinks alone: sightings of an id that has sinks, beyond the shared cap."""
        late = self.method.late([[((), self.sink_ids[row])] for row in self.order])
        return [flag for (flag,) in late]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPictures:
    """A finished training of a denoiser.

    Attributes:
        method: the method string.
        seed: its seed.
        folder: holds `pipeline/`, metrics and `training.json`.
        num_parameters: parameters of the trained denoiser, pool included.
        num_ids: distinct sink ids that it saw; 0 means that it never opened a sink.
        steps: optimizer steps.
        num_pictures: pictures seen, repetitions counted.
        train_s: time spent in steps, seconds.
    """

    method: str
    seed: int
    folder: Path
    num_parameters: int
    num_ids: int
    steps: int
    num_pictures: int
    train_s: float


def train_pictures(
    job: PictureJob, *, accelerator: Accelerator | None = None, progress: ProgressCallback | None = None
) -> TrainedPictures:
    """Train one denoiser, or continue where an earlier call stopped; a finished one is not trained again.

    Raises:
        CheckpointMismatch: if the folder holds another training.
        FileFormatError: if its checkpoint is damaged.
        RunFolderError: if the folder cannot be written.
    """
    accelerator = accelerator or make_accelerator(job.records)
    if (job.folder / TRAINING_FILE).is_file():
        return read_picture_training(job.folder, job.whole_identity)
    train_to_end(lambda: _Training(job, accelerator, progress), accelerator)
    return read_picture_training(job.folder, job.whole_identity)


def read_picture_training(folder: Path, identity: Mapping[str, str] | None = None) -> TrainedPictures:
    """Read what a finished training left.

    Raises:
        FileFormatError: if the folder holds no finished training.
        CheckpointMismatch: if it holds another training than `identity`.
    """
    path = folder / TRAINING_FILE
    value = read_json(path, format=PICTURE_TRAINING_FORMAT, version=PICTURE_TRAINING_VERSION)
    require_identity(folder, value, identity)
    try:
        names = [name for name in TrainedPictures.__slots__ if name != "folder"]
        return TrainedPictures(folder=folder, **{name: value[name] for name in names})
    except KeyError as error:
        raise FileFormatError(f"{path} lacks {error}; train the model again") from error


class _Training:
    """The mutable middle of a training: denoiser, optimizer, and where they stand."""

    def __init__(self, job: PictureJob, accelerator: Accelerator, progress: ProgressCallback | None) -> None:
        self.job = job
        self._accelerator = accelerator
        self._progress = progress or (lambda _: None)
        self._denoiser = denoiser_of(job.pipe)
        self._denoiser.to(accelerator.device).requires_grad_(True).train()
        self._wrapped = accelerator.prepare_model(self._denoiser)
        self._optimizer = make_optimizer(self._denoiser, job.optimization)
        self._ids = torch.tensor(list(job.sink_ids), dtype=torch.int64)
        self._is_late = job.is_late
        self._standing = Standing()
        self._is_torn = False
        self._saved_at = time.monotonic()
        self._loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self._num_seen = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach sinks and keep unowned ones still, for the method that has a pool."""
        job = self.job
        with ExitStack() as stack:
            if job.plan is not None:
                scale = job.method.settings.sink_learning_rate_scale
                stack.enter_context(
                    isolated_optimizer(
                        self._optimizer, self._denoiser, job.plan, sink_learning_rate_scale=scale
                    )
                )
                stack.enter_context(training_sinks(self._denoiser, job.plan))
            yield

    def restore(self) -> None:
        """Continue from the newest checkpoint, and drop metrics that were logged after it."""
        job = self.job
        checkpoint = newest_checkpoint(self._checkpoints)
        if checkpoint is not None:
            self._standing = load_checkpoint(checkpoint, self._denoiser, self._optimizer, job.whole_identity)
        path = job.folder / METRICS_FILE
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
        write_checkpoint(
            self._checkpoints, self._denoiser, self._optimizer, self._standing, self.job.whole_identity
        )
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Leave the trained pipeline, mark the folder finished, and delete the checkpoint."""
        job = self.job
        self._denoiser.eval()
        folder = job.folder / PIPELINE_FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        if job.plan is not None:
            save_with_sinks(job.pipe, job.plan, folder)
        else:
            with whole_folder(folder) as partial, quiet_diffusers():
                job.pipe.save_pretrained(partial)
        num_pictures = min(len(job.order), self._standing.step * job.optimization.batch_rows)
        value = {
            "format": PICTURE_TRAINING_FORMAT,
            "format_version": PICTURE_TRAINING_VERSION,
            "method": job.method.name,
            "seed": job.seed,
            "num_parameters": sum(p.numel() for p in self._denoiser.parameters()),
            "num_ids": len({job.sink_ids[row] for row in job.order} - {0}),
            "steps": self._standing.step,
            "num_pictures": num_pictures,
            "train_s": self._standing.train_s,
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
        seed = job.seed * 1_000_003 + step
        # Dropout differs between processes; what is drawn for the batch does not.
        torch.manual_seed(seed * 4_099 + self._accelerator.process_index)
        places = slice(step * settings.batch_rows, (step + 1) * settings.batch_rows)
        batch = draw_batch(
            job.data,
            job.order[places],
            num_levels(job.pipe.scheduler),
            torch.Generator().manual_seed(seed),
            empty_frac=job.empty_caption_frac,
        )
        self._backward(batch, self._is_late[places])
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._denoiser.parameters(), settings.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, job.num_steps, settings)
        self._is_torn = True
        self._optimizer.step()
        train_s = self._standing.train_s + time.perf_counter() - start_s
        self._standing = Standing(step=step + 1, train_s=train_s)
        self._is_torn = False
        self._optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: PictureBatch, is_late: Sequence[bool]) -> None:
        """Add this process's share of the gradient: to all weights, from what is late to the sinks alone."""
        late = [place for place, flag in enumerate(is_late) if flag]
        early = [place for place, flag in enumerate(is_late) if not flag]
        if late and self.job.plan is not None:
            routed = RoutedGradients(self._denoiser, self.job.plan)
            self._add_gradient(batch, late)
            routed.keep_pool()
            self._add_gradient(batch, early)
            routed.put_pool(adds=True)
        else:
            self._add_gradient(batch, early)
        self._num_seen += len(is_late)

    def _add_gradient(self, batch: PictureBatch, chosen: Sequence[int]) -> None:
        """Add the gradient of this process's share of some pictures' losses over the size of the global batch."""
        accelerator, num_rows = self._accelerator, len(batch.rows)
        # All processes take equally many pictures, since DDP waits for each other; a spare one counts for nothing.
        places = range(
            accelerator.process_index,
            _rounded_up(len(chosen), accelerator.num_processes),
            accelerator.num_processes,
        )
        size = self.job.optimization.micro_rows or len(places)
        parts = [list(places[start : start + size]) for start in range(0, len(places), size or 1)]
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            weights = torch.tensor([float(place < len(chosen)) for place in part], device=accelerator.device)
            with nullcontext() if is_last else accelerator.no_sync(self._wrapped), self._autocast():
                losses = self._losses(batch.part([chosen[place % len(chosen)] for place in part]))
                loss = (losses * weights).sum()
                (loss * accelerator.num_processes / num_rows).backward()
            self._loss += loss.detach()

    def _losses(self, batch: PictureBatch) -> Tensor:
        job = self.job
        more: dict[str, Any] = {}
        if job.plan is not None:
            ids = self._ids[batch.rows]
            if job.empty_caption_sinks == "off":
                ids = torch.where(batch.caption_rows == 0, 0, ids)
            more["sink_ids"] = ids
        return row_losses(self._wrapped, job.pipe.scheduler, job.data, batch, **more)

    def _autocast(self) -> Any:
        if self.job.optimization.precision == "float32":
            return nullcontext()
        return torch.autocast(self._accelerator.device.type, dtype=torch.bfloat16)

    def _log(self, *, is_evaluated: bool) -> None:
        now, job = self._standing, self.job
        loss = float(self._accelerator.reduce(self._loss, reduction="sum")) / max(self._num_seen, 1)
        self._num_seen = 0
        self._loss.zero_()
        if not self._accelerator.is_main_process:
            return
        if not math.isfinite(loss):
            raise ConfigError(f"the training loss is {loss} at step {now.step}; lower learning_rate")
        row: dict[str, float | int | None] = {
            "step": now.step,
            "train_loss": loss,
            "validation_loss": self._evaluated(job.validation) if is_evaluated else None,
            "repeated_loss": self._evaluated(job.repeated) if is_evaluated else None,
            "learning_rate": learning_rate(now.step - 1, job.num_steps, job.optimization),
        }
        append_json_line(job.folder / METRICS_FILE, row)
        self._accelerator.log({k: v for k, v in row.items() if v is not None and k != "step"}, step=now.step)
        left_s = (job.num_steps - now.step) * now.train_s / now.step
        message = f"loss {loss:.4f}, {left_s:,.0f} s left"
        self._progress(Progress(job.title, now.step, job.num_steps, "steps", message))

    def _evaluated(self, rows: Sequence[int]) -> float | None:
        return mean_loss(self._denoiser, self.job.pipe.scheduler, self.job.data, rows)


def _rounded_up(number: int, step: int) -> int:
    return math.ceil(number / step) * step
