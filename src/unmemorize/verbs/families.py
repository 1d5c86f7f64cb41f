"""Which family a model belongs to: a pipeline folder has a `model_index.json`, a language model has none."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

from unmemorize.errors import ConfigError

Family = Literal["language", "diffusion"]

_INDEX = "model_index.json"


def folder_of(model: str) -> str:
    """Return where a model really is: a training of pipelines keeps each in `models/<method>-seed<k>/pipeline`."""
    inner = Path(model) / "pipeline"
    return str(inner) if (inner / _INDEX).is_file() else model


def require_outside(out: Path | None, model: str) -> None:
    """Refuse to write into a model's folder.

    Args:
        out: folder to write to, or None.
        model: folder as the user named it, or hub name.

    Raises:
        ConfigError: if `out` is the model's folder, or inside it.
    """
    folder = Path(model)
    is_model = any(
        (folder / name).is_file() for name in (_INDEX, "model.safetensors.index.json", "model.safetensors")
    )
    is_training = (folder / "pipeline" / _INDEX).is_file()
    if out is not None and (is_model or is_training) and out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"--out {out} is the model's own folder, or inside it; choose a folder beside it")


def family_of(model: str | Path) -> Family:
    """Tell the family of a model folder or hub name; a hub that cannot be reached is asked through its local cache.

    Raises:
        ModelNotSupported: if it can only be a folder, and does not exist.
    """
    folder = Path(model)
    if folder.exists():
        return "diffusion" if (folder / _INDEX).is_file() else "language"
    from huggingface_hub import hf_hub_download

    from unmemorize.models.weight_files import require_there

    require_there(model)

    # Every way of failing (no such file, no network, no such name) leaves the language model, whose loader explains.
    with suppress(Exception):
        hf_hub_download(str(model), _INDEX)
        return "diffusion"
    return "language"
