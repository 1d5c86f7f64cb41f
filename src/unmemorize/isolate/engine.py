"""The engine that training runs on: one process, or those that `accelerate launch` or torchrun started."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from unmemorize.errors import CheckpointMismatch, ConfigError
from unmemorize.isolate.settings import RecordSettings

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(
    records: RecordSettings, *, device: str = "auto", folder: Path | None = None
) -> Accelerator:
    """Make the accelerator of a command: one process, or those that `accelerate launch` or torchrun started.

    Raises:
        ConfigError: under sharded engines, which need a loop of their own around `training_sinks`, or if the tracker is
            unknown or not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, ProjectConfiguration

    project = (
        None if folder is None else ProjectConfiguration(str(folder), logging_dir=str(folder / "tracker"))
    )
    try:
        accelerator = Accelerator(cpu=device == "cpu", log_with=records.tracker, project_config=project)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"tracker {records.tracker!r} cannot be used: {error}; install it or leave it out"
        ) from error
    if records.tracker is not None and not accelerator.log_with:
        raise ConfigError(f"tracker {records.tracker!r} is not installed; install it or leave it out")
    alike = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in alike:
        raise ConfigError(
            f"training under {accelerator.distributed_type.value} is not supported; use DDP, or your own loop inside "
            "training_sinks"
        )
    return accelerator


class Training(Protocol):
    """What every training offers to `train_to_end`."""

    def attached(self) -> AbstractContextManager[Any]:
        """Open the block in which the model trains."""

    def restore(self) -> None:
        """Continue from the last checkpoint, if there is one."""

    def run(self) -> None:
        """Make the steps that are left."""

    def save_checkpoint(self) -> None:
        """Write a checkpoint, unless weights are just changing."""

    def finish(self) -> None:
        """Write the finished model."""


def train_to_end(make: Callable[[], Training], accelerator: Accelerator) -> None:
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


def require_identity(folder: Path, value: Mapping[str, Any], identity: Mapping[str, str] | None) -> None:
    """Raise `CheckpointMismatch` if what a finished training says of itself is not the training that is asked for."""
    for part, ours in (identity or {}).items():
        theirs = value.get("identity", {}).get(part)
        if theirs != ours:
            raise CheckpointMismatch(
                f"{folder} holds another training: {part} is {theirs} there and {ours} here; choose another folder"
            )


def environment() -> dict[str, str]:
    """Return versions and machine, as reports show them."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate")},
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
    }
