"""The run folder of `localize` for language models: what the run is of, its examples, and what it found.

A folder is continued by the same run only. One difference is allowed as long as nothing was chosen: how much of the
likelihood a search may leave, because a bar that no set of neurons reached says nothing against the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import FileFormatError, RunFolderError
from unmemorize.verbs.texts import decoded, digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unmemorize.audit.examples import Example
    from unmemorize.records import TextLocalization
    from unmemorize.verbs.language_localize import NeuronOptions

RUN_FORMAT, RUN_VERSION = "unmemorize.localize_run", 1
_WITHOUT: dict[str, Any] = {"select": "per-layer", "skip_layers": [], "leave": None, "candidates": None}
"""Settings that runs of release 0.1 do not name, as they were."""


def start_run(
    out: Path,
    model_id: str,
    texts: Sequence[Example],
    known: Sequence[tuple[int, ...]],
    options: NeuronOptions,
) -> None:
    """Begin a run folder, or continue the same run in it.

    Args:
        out: the folder.
        model_id: fingerprint of the model.
        texts: examples, as token ids.
        known: ordinary texts, as token ids.
        options: how neurons are scored and chosen.

    Raises:
        RunFolderError: if the folder holds another run.
    """
    from unmemorize.files import read_json, write_json

    path, is_chosen = out / "config.json", (out / "localization.json").exists()
    wanted = {
        "model": model_id,
        "examples": digest_of([[one.name, one.group, one.tokens] for one in texts]),
        "ordinary": digest_of(known),
        "method": options.names[0],
        "share": options.share,
        "select": options.select,
        "skip_layers": list(options.skip_layers),
        "leave": options.leave,
        "candidates": options.num_candidates,
        "seed": options.seed,
        "prefix_tokens": options.cut.prefix,
        "suffix_tokens": options.cut.suffix,
        "length_tokens": options.cut.length,
    }
    changed: list[str] = []
    if path.exists():
        settings = read_json(path, format=RUN_FORMAT, version=RUN_VERSION).get("settings")
        if not isinstance(settings, dict):
            raise FileFormatError(f"{path} holds no settings; localize into a new folder")
        stored = {**_WITHOUT, **settings}
        changed = [name for name in wanted if stored.get(name) != wanted[name]]
        if changed and (is_chosen or changed != ["leave"]):
            raise RunFolderError(
                f"{out} holds another run ({', '.join(changed)} differ); choose a new folder"
            )
    elif is_chosen or (out / "audit.json").exists():
        raise RunFolderError(f"{out} holds another run; choose a new folder")
    if changed or not path.exists():
        write_json(path, {"format": RUN_FORMAT, "format_version": RUN_VERSION, "settings": wanted})


def write_examples(
    out: Path,
    texts: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    is_memorized: dict[str, bool],
) -> None:
    """Write `examples.jsonl`; `is_memorized` tells by name which targets the model repeats."""
    from unmemorize.files import write_json_lines

    rows = [
        {
            "name": one.name,
            "group": one.group,
            "text": decoded(tokenizer, one.tokens),
            "tokens": list(one.tokens),
            **({"is_memorized": is_memorized[one.name]} if one.name in is_memorized else {}),
        }
        for one in texts
    ]
    write_json_lines(out / "examples.jsonl", rows)


def read_localization(out: Path) -> TextLocalization | None:
    """Return what localization left in a run folder, if it did.

    Raises:
        FileFormatError: if the file is torn or of another format.
    """
    from pydantic import ValidationError

    from unmemorize.files import read_json
    from unmemorize.records import TextLocalization

    path = out / "localization.json"
    if not path.is_file():
        return None
    try:
        return TextLocalization.model_validate(
            read_json(path, format="unmemorize.text_localization", version=1)
        )
    except ValidationError as error:
        raise FileFormatError(f"{path} does not fit the localization format; localize again") from error
