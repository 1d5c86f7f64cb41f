"""Run folders → one self-contained HTML file. Torch-free.

A report is a pure function of `audit.json` (and `config.json`, if there) of each run: equal input gives
equal bytes, and no model, network or clock is asked. Everything that comes from a file is escaped, and a
content security policy lets nothing run but the page's own script.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmemorize.errors import ConfigError, FileFormatError, RunFolderError
from unmemorize.files import write_atomic
from unmemorize.records import Audit, load_audit

REPORT_NAME = "report.html"


def render(run_folders: Sequence[str | Path]) -> str:
    """Render the report of one or more runs.

    Args:
        run_folders: folders that hold an `audit.json`; several are compared in one frontier plot.

    Returns:
        A whole HTML document.

    Raises:
        ConfigError: if no folder is given.
        RunFolderError: if a folder is missing or holds no audit.
        FileFormatError: if an `audit.json` or `config.json` is torn or of another format.
    """
    from unmemorize.report import story

    if not run_folders:
        raise ConfigError("a report needs at least one run folder; got none")
    loaded = [_load(Path(folder)) for folder in run_folders]
    audits = [audit for audit, _ in loaded]
    runs = [story.run_of(audit, config, index, len(loaded)) for index, (audit, config) in enumerate(loaded)]
    combined = story.frontier_pictures(audits, "all-frontier") if len(runs) > 1 else ()
    return _fill(runs=runs, combined=combined)


def write_report(run_folders: Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Render the report and write it atomically.

    Args:
        run_folders: see `render`.
        path: destination; `report.html` in the first run folder if None.

    Returns:
        Where the report is.

    Raises:
        RunFolderError: also if the destination cannot be written.
    """
    text = render(run_folders)
    return write_atomic(Path(run_folders[0]) / REPORT_NAME if path is None else path, text)


def _load(folder: Path) -> tuple[Audit, dict[str, Any] | None]:
    if not folder.is_dir():
        raise RunFolderError(f"run folder {folder} does not exist; pass a folder that a run was written to")
    if not (folder / "audit.json").is_file():
        raise RunFolderError(f"{folder} holds no audit.json; audit the run first, then make its report")
    return load_audit(folder / "audit.json"), _load_config(folder / "config.json")


def _load_config(path: Path) -> dict[str, Any] | None:
    """Settings of the run; any JSON object will do, because they are only shown."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise FileFormatError(
            f"{path} is not complete JSON ({error}); it may be truncated, make it again"
        ) from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} holds {type(value).__name__}, expected a JSON object; make it again")
    return value


def _fill(**values: Any) -> str:
    """Fill the page template; style and script come from files beside it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("unmemorize.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _asset(environment, "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template("report.html.j2").render(
        style=Markup(_asset(environment, "report.css")),
        script=Markup(script),
        script_digest=digest,
        **values,
    )
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _asset(environment: Any, name: str) -> str:
    assert environment.loader is not None
    source: str = environment.loader.get_source(environment, name)[0]
    return source
