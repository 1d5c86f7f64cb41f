"""`remove --keep`: whose sinks stay, checked against what the run beside the model says was trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmemorize.errors import ConfigError, FileFormatError, IdError, UnmemorizeWarning
from unmemorize.files import read_json, read_json_lines
from unmemorize.verbs.answers import integers

_SHOWN = 3


def kept_ids(keep: str | None, model: Path) -> list[int] | None:
    """Read the ids whose sinks stay; under a keyed plan every number owns sinks, trained or not.

    Args:
        keep: whole numbers separated by commas, or None.
        model: the model's folder; a run that it is still in names the ids that were repeated, and those kept back.

    Returns:
        The ids, or None if none were given.

    Raises:
        IdError: if an id was kept back from training, or is unknown where the run names all ids that own sinks.
    """
    kept = integers(keep)
    trained = model.resolve().parent if model.name == "pipeline" else model.resolve()
    run = trained.parent.parent
    if not kept or trained.parent.name != "models" or not (run / "examples.jsonl").is_file():
        return kept
    rows = read_json_lines(run / "examples.jsonl")
    known = list(dict.fromkeys(row["id"] for row in rows if row.get("repeats") and "id" in row))
    never = {row.get("id") for row in rows} - set(known)
    other = [one for one in kept if one not in known]
    if not other or not known:
        return kept
    some = ", ".join(map(str, known[:_SHOWN])) + (
        f" and {len(known) - _SHOWN} more" if known[_SHOWN:] else ""
    )
    for one in other:
        if one in never or _names_all(run, trained.name):
            raise IdError(
                f"--keep {one}: nothing was trained with this id; those repeated in {run} are {some} (examples.jsonl)"
            )
    warnings.warn(
        f"--keep {other[0]} is none of the ids repeated in {run} ({some}); unless a document seen once has it, its "
        "sinks hold parts of others",
        UnmemorizeWarning,
        stacklevel=2,
    )
    return kept


def _names_all(run: Path, trained: str) -> bool:
    """Tell whether examples.jsonl names every id that trained sinks: none was seen once, or those have none."""
    from unmemorize.isolate.methods import MethodSettings, parse_method
    from unmemorize.isolate.run_folder import CONFIG_FILE, RUN_FORMAT, RUN_VERSION
    from unmemorize.isolate.settings import settings_of

    try:
        config = read_json(run / CONFIG_FILE, format=RUN_FORMAT, version=RUN_VERSION)
    except FileFormatError:
        return False
    data, settings = _mapping(config.get("data")), _mapping(config.get("settings"))
    if data.get("num_once", data.get("num_trained", 0) - data.get("num_repeated", 0)) == 0 and data:
        return True
    methods: Sequence[str] = settings.get("methods", ())
    try:
        chosen = settings_of(MethodSettings, _mapping(settings.get("method")))
        parsed = [parse_method(name, chosen) for name in methods]
    except ConfigError:
        return False
    mine = [method for method in parsed if trained.startswith(f"{method.folder}-seed")]
    # Whether a method gives sinks to an id that was not repeated.
    return bool(mine) and not any(method.sink_id(1, ()) for method in mine)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
