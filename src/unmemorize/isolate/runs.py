"""The run folder of a training comparison of language models: where things are, and what it holds.

run/
config.json        settings, what was trained on, versions
examples.jsonl     the documents an audit measures: target (repeated) and ordinary (never seen)
tokenizer/
models/<method>-seed<k>/    a plain Hugging Face folder, metrics.jsonl, training.json, with a pool sinks.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmemorize.errors import ConfigError, FileFormatError
from unmemorize.files import read_json
from unmemorize.isolate.jobs import TRAINING_FILE
from unmemorize.isolate.loop import TrainedRun, read_training
from unmemorize.isolate.run_folder import CONFIG_FILE, RUN_FORMAT, RUN_VERSION, model_folder
from unmemorize.isolate.settings import TrainSettings, settings_from_json

TOKENIZER_FOLDER = "tokenizer"


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
