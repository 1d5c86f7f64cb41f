"""Run folders of training comparisons, whichever family: names of their parts, and whether a folder holds this run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmemorize.errors import FileFormatError, RunFolderError
from unmemorize.files import read_json
from unmemorize.isolate.methods import parse_method
from unmemorize.isolate.settings import first_difference

RUN_FORMAT = "unmemorize.run"
RUN_VERSION = 1
CONFIG_FILE = "config.json"
EXAMPLES_FILE = "examples.jsonl"


def model_folder(out: str | Path, method: str, seed: int) -> Path:
    """Return where a run keeps the model of a method string and a seed."""
    return Path(out) / "models" / f"{parse_method(method).folder}-seed{seed}"


def refuse_other_run(out: Path, settings: Mapping[str, Any]) -> None:
    """Raise unless a folder is missing, empty, or holds a run with these settings (as JSON).

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
    difference = first_difference(settings, theirs.get("settings", {}))
    if difference is not None:
        raise RunFolderError(
            f"{out} holds another run: {difference}; choose another folder or the same settings"
        )
