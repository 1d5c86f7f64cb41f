"""Run folders of training comparisons, whichever family: names of their parts, and what a run is of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from unmemorize.errors import FileFormatError, RunFolderError
from unmemorize.files import read_json, write_json
from unmemorize.isolate.engine import environment
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


def write_config(
    out: Path,
    family: Literal["language", "diffusion"],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    others: str,
) -> None:
    """Write what a run is of, settings and data (as JSON), with versions and machine; a run that is continued keeps it.

    Raises:
        RunFolderError: if the run is of other data; `others` says of which, for the message.
    """
    path = out / CONFIG_FILE
    if path.is_file():
        if read_json(path, format=RUN_FORMAT, version=RUN_VERSION).get("data") != data:
            raise RunFolderError(f"{out} was trained on {others}; choose another folder")
        return
    config = {"format": RUN_FORMAT, "format_version": RUN_VERSION, "kind": "training", "family": family}
    write_json(path, {**config, "settings": settings, "data": data, "environment": environment()})
