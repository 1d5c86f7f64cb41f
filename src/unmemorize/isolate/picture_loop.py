"""One training of a text-to-image denoiser: one pipeline, one method, one seed; DDP through accelerate.

The counterpart of `loop.py`: steps, metrics, checkpoints and where to continue are in `training.py`; this file knows
batches of pictures. What is drawn for a batch follows from seed and step. A trained model is a pipeline folder; with a
pool it is what `save_with_sinks` writes.

    loss of a step = mean over the global batch of the mean squared error of each picture's prediction

With `shared_cap` later sightings teach the sinks of a picture alone: two backward passes, each over its part of the
batch, both divided by the size of the whole. What is left when the pool is cut out has learned from no picture more
often than that.

Text encoders and VAE stay as they are.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from unmemorize.errors import ConfigError
from unmemorize.files import whole_folder
from unmemorize.isolate.diffusion import training_sinks
from unmemorize.isolate.engine import make_accelerator
from unmemorize.isolate.jobs import TRAINING_FILE, TrainingJob, read_finished
from unmemorize.isolate.picture_data import (
    PictureBatch,
    PictureData,
    draw_batch,
    mean_loss,
    num_levels,
    row_losses,
)
from unmemorize.isolate.plan import SinkPlan
from unmemorize.isolate.sink_files import save_with_sinks
from unmemorize.isolate.training import Metrics, Training, train_to_end
from unmemorize.models.denoising import Pipeline, denoiser_of
from unmemorize.models.diffusion import quiet_diffusers
from unmemorize.records import ProgressCallback

if TYPE_CHECKING:
    from accelerate import Accelerator

PICTURE_TRAINING_FORMAT = "unmemorize.picture_training"
PICTURE_TRAINING_VERSION = 1
PIPELINE_FOLDER = "pipeline"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PictureJob(TrainingJob):
    """Everything that one training needs; equal jobs give equal weights.

    Attributes:
        pipe: the pipeline; its denoiser is trained in place.
        data: the encoded pictures.
        order: rows of the data in the order in which they are seen.
        sink_ids: id that each row of the data carries, 0 where it opens no sinks; length N.
        validation, repeated: rows to evaluate on, pool off.
        empty_caption_frac: share of pictures whose caption is dropped, 0 to 1.
        empty_caption_sinks: "own" or "off": whose sinks such a picture opens (decision record 8).
        others: as in `TrainingJob`; the seed is that of noise, timesteps and dropped captions, a row of a batch is a
            picture.
    """

    pipe: Pipeline
    data: PictureData
    order: Sequence[int]
    sink_ids: Sequence[int]
    validation: Sequence[int] = ()
    repeated: Sequence[int] = ()
    empty_caption_frac: float = 0.1
    empty_caption_sinks: Literal["own", "off"] = "own"

    def __post_init__(self) -> None:
        if not self.order:
            raise ConfigError("there are no pictures to train on; give more")
        if self.method.kind not in ("standard", "dedup", "cap", "sinks"):
            raise ConfigError(
                f"method {self.method.name} is for language models; expected standard, dedup, cap:R or sinks"
            )
        self.require_plan()
        if not 0.0 <= self.empty_caption_frac <= 1.0:
            raise ConfigError(f"empty_caption_frac is {self.empty_caption_frac}, expected 0 to 1")
        if self.empty_caption_sinks not in ("own", "off"):
            raise ConfigError(f"empty_caption_sinks is {self.empty_caption_sinks!r}, expected own or off")

    @property
    def num_rows(self) -> int:
        """Pictures to train on, repetitions counted."""
        return len(self.order)

    @property
    def num_ids(self) -> int:
        """Distinct sink ids that they carry, 0 left out."""
        return len({self.sink_ids[row] for row in self.order} - {0})

    @property
    def _data_identity(self) -> dict[str, str]:
        return {"pictures": self.data.digest}

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
    if not (job.folder / TRAINING_FILE).is_file():
        train_to_end(lambda: _Training(job, accelerator, progress), accelerator)
    return read_picture_training(job.folder, job.whole_identity)


def read_picture_training(folder: Path, identity: Mapping[str, str] | None = None) -> TrainedPictures:
    """Read what a finished training left.

    Raises:
        FileFormatError: if the folder holds no finished training.
        CheckpointMismatch: if it holds another training than `identity`.
    """
    return read_finished(
        TrainedPictures, folder, identity, format=PICTURE_TRAINING_FORMAT, version=PICTURE_TRAINING_VERSION
    )


class _Training(Training[PictureJob]):
    """The training of a denoiser."""

    format, version = PICTURE_TRAINING_FORMAT, PICTURE_TRAINING_VERSION

    def __init__(self, job: PictureJob, accelerator: Accelerator, progress: ProgressCallback | None) -> None:
        super().__init__(job, denoiser_of(job.pipe).requires_grad_(True), accelerator, progress)
        self._ids = torch.tensor(list(job.sink_ids), dtype=torch.int64)
        self._is_late = job.is_late

    def _sinks(self, plan: SinkPlan) -> AbstractContextManager[Any]:
        return training_sinks(self._model, plan)

    def _backward(self, places: slice) -> int:
        job = self.job
        batch = draw_batch(
            job.data,
            job.order[places],
            num_levels(job.pipe.scheduler),
            torch.Generator().manual_seed(self._step_seed),
            empty_frac=job.empty_caption_frac,
        )
        self._add_gradients(batch, self._is_late[places])
        return 0

    def _add_gradients(self, batch: PictureBatch, is_late: Sequence[bool]) -> None:
        """Add this process's share of the gradient: to all weights, from what is late to the sinks alone."""
        late = [place for place, flag in enumerate(is_late) if flag]
        early = [place for place, flag in enumerate(is_late) if not flag]
        if late and self._routed is not None:
            self._add_gradient(batch, late)
            self._routed.keep_pool()
            self._add_gradient(batch, early)
            self._routed.put_pool(adds=True)
        else:
            self._add_gradient(batch, early)
        self._num_losses += len(is_late)

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
            weights = torch.tensor([float(place < len(chosen)) for place in part], device=accelerator.device)
            with self._one_pass(is_last=number == len(parts) - 1):
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

    def _metrics(self, loss: float, *, is_evaluated: bool) -> tuple[Metrics, str]:
        job = self.job
        row: Metrics = {
            "step": self._standing.step,
            "train_loss": loss,
            "validation_loss": self._evaluated(job.validation) if is_evaluated else None,
            "repeated_loss": self._evaluated(job.repeated) if is_evaluated else None,
            "learning_rate": self._learning_rate,
        }
        return row, f"loss {loss:.4f}"

    def _evaluated(self, rows: Sequence[int]) -> float | None:
        return mean_loss(self._model, self.job.pipe.scheduler, self.job.data, rows)

    def _save(self) -> None:
        job = self.job
        self._model.eval()
        folder = job.folder / PIPELINE_FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        if job.plan is not None:
            save_with_sinks(job.pipe, job.plan, folder)
        else:
            with whole_folder(folder) as partial, quiet_diffusers():
                job.pipe.save_pretrained(partial)

    def _figures(self) -> dict[str, float | int]:
        now = self._standing
        num_pictures = min(self.job.num_rows, now.step * self.job.optimization.batch_rows)
        return {"num_pictures": num_pictures, "train_s": now.train_s}


def _rounded_up(number: int, step: int) -> int:
    return math.ceil(number / step) * step
