"""Which family a model belongs to: a pipeline folder has a `model_index.json`, a language model has none."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

Family = Literal["language", "diffusion"]

_INDEX = "model_index.json"


def folder_of(model: str) -> str:
    """Return where a model really is: a training of pipelines keeps each in `models/<method>-seed<k>/pipeline`."""
    inner = Path(model) / "pipeline"
    return str(inner) if (inner / _INDEX).is_file() else model


def family_of(model: str | Path) -> Family:
    """Tell the family of a model folder or hub name; a hub that cannot be reached is asked through its local cache."""
    folder = Path(model)
    if folder.exists():
        return "diffusion" if (folder / _INDEX).is_file() else "language"
    from huggingface_hub import hf_hub_download

    # Every way of failing (no such file, no network, no such name) leaves the language model, whose loader explains.
    with suppress(Exception):
        hf_hub_download(str(model), _INDEX)
        return "diffusion"
    return "language"
