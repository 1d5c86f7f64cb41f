"""Whether a folder holds the weights of its model: nothing drawn at random, nothing unpickled.

transformers draws weights that a folder lacks at random and reports it in a note that is silenced here. diffusers loads
parts of pipelines through transformers and drops the report. What is missing therefore comes from a second load of the
part without numbers (on PyTorch's device `meta`), so that renamed, tied and ignored weights are transformers' to judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unmemorize.errors import ModelNotSupported


def require_there(source: str | Path) -> None:
    """Raise `ModelNotSupported` if what can only be a folder, by how it is written, does not exist; hub names pass."""
    text = str(source)
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
    if is_path and not Path(source).exists():
        raise ModelNotSupported(f"the folder {source} does not exist; pass a model's folder, or a hub name")


def require_no_pickle(folder: str | Path) -> None:
    """Raise `ModelNotSupported` if a folder's only weights are pickles, which can run code and are never opened."""
    folder = Path(folder)
    pickles = [path for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in sorted(folder.glob(kind))]
    if pickles and not any(folder.glob("*.safetensors")):
        raise ModelNotSupported(
            f"{folder} holds its weights as a pickle only ({pickles[0].name}), which can run code and is never opened "
            "here; load the model elsewhere and save_pretrained it, which writes safetensors"
        )


def missing_weights(part: Any, source: str | Path, name: str) -> list[str]:
    """Return the names of weights that a part of a pipeline has and its folder lacks, in order.

    Args:
        part: the loaded part.
        source: folder or hub name of the pipeline.
        name: of the part, and of its folder in the pipeline.
    """
    from transformers import PreTrainedModel

    if isinstance(part, PreTrainedModel):
        loader: Any = type(part)
        _, info = loader.from_pretrained(
            str(source), subfolder=name, use_safetensors=True, output_loading_info=True, device_map="meta"
        )
        return sorted(info["missing_keys"])
    return [key for key, tensor in part.named_parameters() if tensor.is_meta]
