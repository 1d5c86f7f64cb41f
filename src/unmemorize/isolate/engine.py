"""The engine that training runs on: one process, or those that `accelerate launch` or torchrun started."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unmemorize.errors import ConfigError
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


@contextmanager
def tracked(accelerator: Accelerator, records: RecordSettings, name: str) -> Iterator[None]:
    """Give one training of a command a run of its own in the tracker, if one was asked for."""
    if records.tracker is None:
        yield
        return
    accelerator.init_trackers(name)
    yield
    for tracker in accelerator.trackers:
        tracker.finish()


def environment() -> dict[str, str]:
    """Return versions and machine, as reports show them."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate")},
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
    }
