"""Checkpoints of an unfinished training: a folder is complete or not there. Data only, no pickle.

    checkpoint/step-00000120/
        model.safetensors       parameters and buffers, by name
        optimizer.safetensors   moments, by parameter name
        state.json              where training stood, what it belongs to, SHA-256 of both files

A checkpoint is written beside its place, flushed to the disk, renamed, and only then are older ones deleted. It is
read back only into the training it was made by: same settings, data, plan and model. Random generators are not
stored, because the loop derives their state from seed and step.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmemorize.errors import CheckpointMismatch, FileFormatError, RunFolderError
from unmemorize.files import read_json, what_to_do, write_json

CHECKPOINT_FORMAT = "unmemorize.checkpoint"
CHECKPOINT_VERSION = 1

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where training stands.

    Attributes:
        step: optimizer steps done; the next batch follows from it.
        tokens: tokens seen, padding left out.
        train_s: time spent in steps, seconds.
    """

    step: int = 0
    tokens: int = 0
    train_s: float = 0.0


def write_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    standing: Standing,
    identity: Mapping[str, str],
) -> Path:
    """Write a checkpoint, then delete older ones.

    Args:
        folder: holds the checkpoints of one training; made if missing.
        model: unwrapped.
        optimizer: over the model's parameters.
        standing: where training stands.
        identity: what the training is, by part (settings, data, plan); compared when the checkpoint is read.

    Returns:
        The checkpoint's folder.

    Raises:
        RunFolderError: if it cannot be written; an older checkpoint stays as it was.
    """
    from safetensors.torch import save_file

    final = folder / f"step-{standing.step:08d}"
    partial = folder / f"{_PARTIAL}{standing.step:08d}"
    if final.exists():
        return final
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder, keep=None, only_partial=True)
        partial.mkdir()
        save_file(_model_tensors(model), partial / _MODEL)
        save_file(_optimizer_tensors(model, optimizer), partial / _OPTIMIZER)
        state = {
            "format": CHECKPOINT_FORMAT,
            "format_version": CHECKPOINT_VERSION,
            "step": standing.step,
            "tokens": standing.tokens,
            "train_s": standing.train_s,
            "identity": dict(identity),
            "sha256": {name: _synced_digest(partial / name) for name in (_MODEL, _OPTIMIZER)},
        }
        write_json(partial / _STATE, state)
        _sync(partial)
        partial.replace(final)
        _sync(folder)
    _clear(folder, keep=final)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint with the most steps, or None."""
    if not folder.is_dir():
        return None
    found = sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))
    return found[-1] if found else None


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Mapping[str, str]
) -> Standing:
    """Put a model and its optimizer back to where a checkpoint was written. Nothing changes if it does not fit.

    Raises:
        FileFormatError: if a file is missing, truncated or corrupted.
        CheckpointMismatch: if the checkpoint belongs to another run, plan or model.
    """
    from safetensors.torch import load_file

    state = read_json(checkpoint / _STATE, format=CHECKPOINT_FORMAT, version=CHECKPOINT_VERSION)
    _require_identity(checkpoint, state.get("identity"), identity)
    for name in (_MODEL, _OPTIMIZER):
        path = checkpoint / name
        if not path.is_file() or _digest(path) != state.get("sha256", {}).get(name):
            what = "is corrupted or truncated" if path.is_file() else "is missing"
            raise FileFormatError(f"{path} {what}; delete {checkpoint} to start this model over")
    try:
        standing = Standing(step=state["step"], tokens=state["tokens"], train_s=state["train_s"])
    except KeyError as error:
        raise FileFormatError(f"{checkpoint / _STATE} lacks {error}; delete {checkpoint}") from error
    ours, theirs = _model_tensors(model), load_file(checkpoint / _MODEL)
    _require_shapes(checkpoint, ours, theirs)
    moments = _grouped(load_file(checkpoint / _OPTIMIZER))
    if not moments.keys() <= ours.keys():
        raise CheckpointMismatch(f"{checkpoint} holds moments of other parameters; {_START_OVER}")
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])
    names = _parameter_names(model)
    numbered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    restored = {number: moments[name] for number, name in enumerate(numbered) if name in moments}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})
    return standing


_START_OVER = "use the settings of the run, or another output folder"


def _require_identity(checkpoint: Path, theirs: Any, ours: Mapping[str, str]) -> None:
    if not isinstance(theirs, dict):
        raise FileFormatError(f"{checkpoint / _STATE} has no identity; delete {checkpoint}")
    for part in ours:
        if theirs.get(part) != ours[part]:
            raise CheckpointMismatch(
                f"{checkpoint} belongs to another training: {part} is {theirs.get(part)} there and {ours[part]} here; "
                + _START_OVER
            )


def _require_shapes(checkpoint: Path, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    wrong = sorted(ours.keys() ^ theirs.keys()) or [n for n in ours if ours[n].shape != theirs[n].shape]
    if wrong:
        raise CheckpointMismatch(f"{checkpoint} belongs to another model: {wrong[0]} differs; {_START_OVER}")


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List each parameter and saved buffer once (tied weights under one name), contiguous."""
    saved = model.state_dict().keys()
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    tensors.update((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(model)
    return {
        f"{names[id(parameter)]}:{entry}": torch.as_tensor(value).contiguous()
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition(":")
        grouped.setdefault(name, {})[entry] = tensor
    return grouped


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, RunFolderError):
            raise
        reason = getattr(error, "strerror", None) or error
        advice = what_to_do(error, "free space or choose another folder")
        raise RunFolderError(f"cannot write a checkpoint to {folder}: {reason}; {advice}") from error


def _clear(folder: Path, *, keep: Path | None, only_partial: bool = False) -> None:
    for path in folder.iterdir():
        is_partial = path.name.startswith(_PARTIAL)
        if is_partial or (not only_partial and path != keep and path.name.startswith("step-")):
            shutil.rmtree(path, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _synced_digest(path: Path) -> str:
    _sync(path)
    return _digest(path)


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
