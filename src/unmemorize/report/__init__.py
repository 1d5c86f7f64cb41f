"""Run folders → one self-contained HTML file. Torch-free.

A report is a pure function of `audit.json` (and `config.json` and `pictures/`, if there) of each run: equal input
gives equal bytes, and no model, network or clock is asked. Everything that comes from a file is escaped, and a
content security policy lets nothing run but the page's own script.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import ConfigError, FileFormatError, RunFolderError
from unmemorize.files import parse_json, write_atomic
from unmemorize.records import Audit, NeuronAudit, PictureAudit, load_any_audit

if TYPE_CHECKING:
    from unmemorize.report.page import Part

REPORT_NAME = "report.html"
MAX_PICTURE_BYTES = 12_000_000
Loaded = tuple[Audit | PictureAudit | NeuronAudit, dict[str, Any] | None]


def render(run_folders: Sequence[str | Path], *, max_picture_bytes: int = MAX_PICTURE_BYTES) -> str:
    """Render the report of one or more runs.

    Args:
        run_folders: folders that hold an `audit.json`; those of language models are compared in one
            frontier plot, those of pictures stand below each other.
        max_picture_bytes: most bytes of pictures in the page, as base64 text, over all runs.

    Returns:
        A whole HTML document.

    Raises:
        ConfigError: if no folder is given, or room for pictures is negative.
        RunFolderError: if a folder is missing or holds no audit.
        FileFormatError: if an `audit.json` or `config.json` is torn or of another format.
    """
    from unmemorize.report import story

    if not run_folders:
        raise ConfigError("a report needs at least one run folder; got none")
    if max_picture_bytes < 0:
        raise ConfigError(f"max_picture_bytes is {max_picture_bytes}; pass 0 (no pictures) or more")
    folders = [Path(folder) for folder in run_folders]
    loaded = [_load(folder) for folder in folders]
    runs = [_run_of(folder, place, loaded, max_picture_bytes) for place, folder in enumerate(folders)]
    language = [(place, audit) for place, (audit, _) in enumerate(loaded) if isinstance(audit, Audit)]
    combined = story.frontier_plot(language, "all-frontier") if len(language) > 1 else None
    return _fill(runs=runs, combined=combined)


def _run_of(folder: Path, place: int, loaded: Sequence[Loaded], max_picture_bytes: int) -> Part:
    """One run's part of the page; all runs with pictures share what the page may embed."""
    from unmemorize.report import neuron_story, picture_story, story

    audit, config = loaded[place]
    if isinstance(audit, NeuronAudit):
        return neuron_story.run_of(audit, config, place, len(loaded))
    if isinstance(audit, Audit):
        return story.run_of(audit, config, place, len(loaded))
    num_pictures = sum(isinstance(one, PictureAudit) for one, _ in loaded)
    budget_bytes = max_picture_bytes // num_pictures
    return picture_story.run_of(
        audit, config, folder, index=place, num_runs=len(loaded), budget_bytes=budget_bytes
    )


def write_report(
    run_folders: Sequence[str | Path],
    path: str | Path | None = None,
    *,
    max_picture_bytes: int = MAX_PICTURE_BYTES,
) -> Path:
    """Render the report and write it atomically.

    Args:
        run_folders: see `render`.
        path: destination; `report.html` in the first run folder if None.
        max_picture_bytes: see `render`.

    Returns:
        Where the report is.

    Raises:
        RunFolderError: also if the destination cannot be written.
    """
    text = render(run_folders, max_picture_bytes=max_picture_bytes)
    return write_atomic(Path(run_folders[0]) / REPORT_NAME if path is None else path, text)


def _load(folder: Path) -> Loaded:
    if not folder.is_dir():
        raise RunFolderError(f"run folder {folder} does not exist; pass a folder that a run was written to")
    if not (folder / "audit.json").is_file():
        raise RunFolderError(f"{folder} holds no audit.json; audit the run first, then make its report")
    return load_any_audit(folder / "audit.json"), _load_config(folder / "config.json")


def _load_config(path: Path) -> dict[str, Any] | None:
    """Settings of the run; any JSON object will do, because they are only shown."""
    if not path.exists():
        return None
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
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
