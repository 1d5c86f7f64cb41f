"""The run folder of a training comparison: where things are, and whether a folder holds this run.

run/
config.json        settings, what was trained on, versions
examples.jsonl     the documents an audit measures: target (repeated) and ordinary (never seen)
tokenizer/
models/<method>-seed<k>/    a plain Hugging Face folder, metrics.jsonl, training.json, with a pool sinks.json
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from unmemorize.errors import ConfigError, FileFormatError, RunFolderError
from unmemorize.files import read_json
from unmemorize.isolate.loop import TRAINING_FILE, TrainedRun, read_training
from unmemorize.isolate.methods import parse_method
from unmemorize.isolate.settings import TrainSettings, first_difference, settings_from_json

RUN_FORMAT = "unmemorize.run"
RUN_VERSION = 1
CONFIG_FILE = "config.json"
EXAMPLES_FILE = "examples.jsonl"
TOKENIZER_FOLDER = "tokenizer"


def model_folder(out: str | Path, method: str, seed: int) -> Path:
    """Return where a run keeps the model of a method string and a seed."""
    return Path(out) / "models" / f"{parse_method(method).folder}-seed{seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What `config.json` of a training run says.

    Attributes:
        settings: the comparison's settings.
        data: what was trained on: number of documents of each part and their digest.
        environment: versions and machine.
    """

    settings: TrainSettings
    data: dict[str, Any]
    environment: dict[str, str]


def read_run(out: str | Path) -> RunConfig:
    """Read the `config.json` of a training run.

    Raises:
        FileFormatError: if the folder holds no training run, or its settings are damaged.
    """
    path = Path(out) / CONFIG_FILE
    value = read_json(path, format=RUN_FORMAT, version=RUN_VERSION)
    try:
        return RunConfig(
            settings=settings_from_json(value["settings"]),
            data=value["data"],
            environment=value["environment"],
        )
    except (KeyError, ConfigError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}; use another run folder") from error


def trained_runs(out: str | Path) -> list[TrainedRun]:
    """List the finished trainings of a run folder in the order of its settings."""
    settings = read_run(out).settings
    folders = [model_folder(out, method, seed) for method in settings.methods for seed in settings.seeds]
    return [read_training(folder) for folder in folders if (folder / TRAINING_FILE).is_file()]


def refuse_other_run(out: Path, settings: TrainSettings) -> None:
    """Raise unless a folder is missing, empty, or holds a run with these settings.

    Raises:
        RunFolderError: naming the first setting that differs.
    """
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file, expected a folder; choose another folder")
    if not out.is_dir() or not any(path.name != "tracker" for path in out.iterdir()):
        return
    try:
        theirs = read_json(out / CONFIG_FILE, format=RUN_FORMAT, version=RUN_VERSION)
    except FileFormatError as error:
        raise RunFolderError(
            f"{out} is not empty and holds no training run ({error}); choose another folder"
        ) from error
    difference = first_difference(settings.to_json(), theirs.get("settings", {}))
    if difference is not None:
        raise RunFolderError(
            f"{out} holds another run: {difference}; choose another folder or the same settings"
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
