"""Undo of a weight edit: the values that it changed, kept beside an export, put back bit for bit.

Per tensor that differs in any bit: its old values at the flat positions that differ, or the whole old tensor where
that is smaller. The file holds what was removed, so it lies beside the exported folder and never in it: ship the
folder, keep the file. Family-free; loading a model again is the caller's work.

    x.undo.safetensors      "<name>" whole tensors; "<name>|values" with "<name>|positions" (int64) for parts
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from unmemorize.errors import CheckpointMismatch
from unmemorize.tensor_files import read_tensors, write_tensors

UNDO_FORMAT = "unmemorize.changes"
UNDO_VERSION = 1
UNDO_SUFFIX = ".undo.safetensors"

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_POSITION_BYTES = 8


def undo_path(folder: str | Path) -> Path:
    """Return where the undo file of an exported folder lies: beside it."""
    folder = Path(folder)
    return folder.with_name(folder.name + UNDO_SUFFIX)


def changed_values(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """Collect the old values of everything that differs in any bit between two models of one architecture.

    Tied weights are stored once.

    Raises:
        CheckpointMismatch: if the models' tensors differ in name, shape or dtype.
    """
    old, new = before.state_dict(), after.state_dict()
    alike = old.keys() == new.keys() and all(
        old[name].shape == new[name].shape and old[name].dtype == new[name].dtype for name in old
    )
    if not alike:
        raise CheckpointMismatch(
            "the edited model has other tensors than the original; undo works for edits that keep every shape"
        )
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in old.items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        is_changed = _bits(flat) != _bits(new[name].detach().cpu().contiguous().reshape(-1))
        num = int(is_changed.sum())
        if num == 0:
            continue
        if num * (_POSITION_BYTES + flat.element_size()) >= flat.numel() * flat.element_size():
            kept[name] = flat.reshape(tensor.shape).clone()
        else:
            positions = is_changed.nonzero().squeeze(1)
            kept[f"{name}|positions"] = positions
            kept[f"{name}|values"] = flat[positions]
    return kept


def num_stored(undo: Mapping[str, Tensor]) -> int:
    """Count the stored values: at least as many as changed."""
    return sum(tensor.numel() for name, tensor in undo.items() if not name.endswith("|positions"))


def write_undo(path: str | Path, undo: Mapping[str, Tensor], *, original: str, result: str) -> Path:
    """Write undo data atomically.

    Args:
        path: destination, as `undo_path` gives it.
        undo: from `changed_values`.
        original: fingerprint of the model before the edit.
        result: fingerprint of the model after it.
    """
    header = {"original": original, "result": result}
    return write_tensors(path, undo, format=UNDO_FORMAT, version=UNDO_VERSION, header=header)


def read_undo(path: str | Path) -> tuple[dict[str, Tensor], str, str]:
    """Read undo data.

    Returns:
        Tensors, fingerprint of the original, fingerprint of the edited model.

    Raises:
        FileFormatError: if the file is missing, damaged, or of another kind or version.
    """
    header, tensors = read_tensors(path, format=UNDO_FORMAT, version=UNDO_VERSION, what="undo data")
    return tensors, str(header["original"]), str(header["result"])


@torch.no_grad()
def put_back(model: nn.Module, undo: Mapping[str, Tensor]) -> None:
    """Write old values into an edited model, in place.

    Raises:
        CheckpointMismatch: if the model lacks a tensor, or has it in another shape or dtype.
    """
    state = model.state_dict()
    for name, old in undo.items():
        target, _, part = name.partition("|")
        if part == "positions":
            continue
        place = state.get(target)
        is_fitting = place is not None and place.dtype == old.dtype and (part or place.shape == old.shape)
        if place is None or not is_fitting:
            raise CheckpointMismatch(
                f"the undo data do not fit this model at {target}; pass the model they belong to"
            )
        if part:
            positions = undo[f"{target}|positions"].to(place.device)
            flat = place.contiguous().view(-1)
            flat[positions] = old.to(place.device)
            place.copy_(flat.view(place.shape))
        else:
            place.copy_(old)


def _bits(flat: Tensor) -> Tensor:
    """Read values as integers of their size, so that -0 and 0 differ and NaN equals itself."""
    return flat.view(_INTEGERS[flat.element_size()])
