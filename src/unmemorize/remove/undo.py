"""The rows that a removal changed, as they were before: enough to undo it, bit for bit. Knows no model.

Two modules with the same parameters are compared, and of every tensor the rows (first dimension) that differ are kept.
The file is small where few rows changed, and it holds what was removed: it belongs beside the model only as long as
the removal may have to be undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from unmemorize.errors import CheckpointMismatch, ConfigError, FileFormatError
from unmemorize.files import write_atomic

UNDO_FILE = "undo.safetensors"
UNDO_FORMAT = "unmemorize.undo"
UNDO_VERSION = 1


@dataclass(frozen=True, slots=True)
class OriginalRows:
    """Rows of a module before a removal.

    Attributes:
        indices: name of the tensor -> changed rows, shape (R,), int64.
        rows: name of the tensor -> these rows as they were, shape (R, ...).
        dtype: the module's dtype.
    """

    indices: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    dtype: torch.dtype

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Write the rows into a module.

        Raises:
            CheckpointMismatch: if the module lacks a tensor, or it has another dtype or too few rows.
        """
        state = module.state_dict()
        for name, index in self.indices.items():
            there, rows = state.get(name), self.rows[name]
            if (
                there is None
                or (there.dtype, there.shape[1:]) != (rows.dtype, rows.shape[1:])
                or int(index.max()) >= len(there)
            ):
                raise CheckpointMismatch(
                    f"the original rows of {name!r} do not fit this model; use the folder they were exported with"
                )
            there[index.to(there.device)] = rows.to(there.device)


def save_original_rows(original: nn.Module, changed: nn.Module, path: str | Path) -> Path:
    """Write the rows of `original` that differ in `changed` as one safetensors file, atomically.

    Raises:
        ConfigError: if the modules differ in the names, shapes or dtypes of their tensors.
    """
    from safetensors.torch import save

    before, after = original.state_dict(), changed.state_dict()
    kinds = [{name: (t.shape, t.dtype) for name, t in state.items()} for state in (before, after)]
    if kinds[0] != kinds[1]:
        raise ConfigError(
            "the original has other tensors than the result; pass the model the removal was made from"
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in before.items():
        if tensor.dim() == 0:
            continue
        other = after[name].to(tensor.device)
        differs = (tensor != other).reshape(len(tensor), -1).any(1) if tensor.numel() else torch.zeros(0)
        if bool(differs.any()):
            index = differs.nonzero()[:, 0]
            tensors |= {f"index {name}": index.cpu(), f"rows {name}": tensor[index].cpu().contiguous()}
    dtype = next(p.dtype for p in original.parameters() if p.is_floating_point())
    header = {"format": UNDO_FORMAT, "format_version": str(UNDO_VERSION), "dtype": str(dtype).split(".")[-1]}
    return write_atomic(path, save(tensors, metadata=header))


def load_original_rows(path: str | Path) -> OriginalRows:
    """Read rows saved by `save_original_rows`.

    Raises:
        FileFormatError: if the file is missing, torn, or of another format or version.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    try:
        with safe_open(str(path), framework="pt") as stream:
            header = stream.metadata() or {}
        tensors = load(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise FileFormatError(
            f"{path} does not exist, so the removal cannot be undone; export it with the original"
        ) from error
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            f"{path} is not a complete safetensors file ({error}); export it again"
        ) from error
    found = (header.get("format"), header.get("format_version"))
    dtype = getattr(torch, header.get("dtype", ""), None)
    if found != (UNDO_FORMAT, str(UNDO_VERSION)) or not isinstance(dtype, torch.dtype):
        raise FileFormatError(
            f"{path} is not a {UNDO_FORMAT} file of version {UNDO_VERSION} (found {found}); pass the right file"
        )
    names = [name.removeprefix("index ") for name in tensors if name.startswith("index ")]
    try:
        rows = {name: tensors[f"rows {name}"] for name in names}
    except KeyError as error:
        raise FileFormatError(f"{path} lacks {error}; export it again") from error
    return OriginalRows({name: tensors[f"index {name}"] for name in names}, rows, dtype)
