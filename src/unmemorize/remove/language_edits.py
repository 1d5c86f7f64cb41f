"""One front for every weight edit of a language model: a new model, what it cost, and how to undo it.

`edit` never touches the model that it is given: it works on a copy, in float32 where something is learned, and gives
the copy back in the original's dtypes. Interrupted, it leaves nothing behind. `export_edit` writes a plain checkpoint,
with the manifest in it and the undo file beside it; `undone` gives the original back, bit for bit.

What the methods do is in `curvature.py`, `subnet.py`, `output_vectors.py` and `unlearning.py`, and with their traps in
docs/removal_language.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from unmemorize.errors import CheckpointMismatch, ModelNotSupported, RunFolderError
from unmemorize.gates import closed, folded, module_at
from unmemorize.models.language import MlpRow, fingerprint, load, require_same_model
from unmemorize.records import ProgressCallback
from unmemorize.remove.changes import changed_values, num_stored, put_back, read_undo, undo_path, write_undo
from unmemorize.remove.curvature import (
    CurvatureFactors,
    collect_factors,
    edit_by_curvature,
    edit_by_singular_values,
)
from unmemorize.remove.language import export
from unmemorize.remove.matrices import EditCost
from unmemorize.remove.output_vectors import edit_output_vectors
from unmemorize.remove.settings import (
    CurvatureSettings,
    EditSettings,
    FoldSettings,
    OutputVectorSettings,
    SubnetSettings,
    SvdSettings,
    UnlearningSettings,
    settings_for,
    settings_to_json,
)
from unmemorize.remove.subnet import edit_by_subnet
from unmemorize.remove.unlearning import unlearn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Texts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """An edited model.

    Attributes:
        model: a plain model of the original's architecture, shapes and dtypes.
        method: how it was edited.
        settings: with which settings.
        cost: wall time in seconds, and passes.
        details: what the method counted, such as steps taken or targets not reached.
        original: fingerprint of the model before.
        undo: old values of everything that changed; see `changes.changed_values`.
    """

    model: PreTrainedModel
    method: str
    settings: EditSettings
    cost: EditCost
    details: Mapping[str, Any]
    original: str
    undo: Mapping[str, Tensor]

    def manifest(self) -> dict[str, Any]:
        """Say what was done, for `unmemorize.json` of an export."""
        return {
            "way": "edit",
            "method": self.method,
            "settings": settings_to_json(self.settings),
            "model": self.original,
            "cost": {
                "seconds": round(self.cost.seconds, 3),
                "forward_equivalents": self.cost.forward_equivalents,
            },
            "num_values_stored": num_stored(self.undo),
            "details": dict(self.details),
        }


def edit(
    model: PreTrainedModel,
    targets: Texts,
    retain: Texts,
    method: str,
    settings: EditSettings | None = None,
    *,
    protect: Texts | CurvatureFactors | None = None,
    factors: CurvatureFactors | None = None,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> Edit:
    """Edit a copy of a model.

    Args:
        model: any causal language model of the site table, in any floating dtype; left untouched.
        targets: N texts as token ids that should go. fold, svd and curvature do not look at them.
        retain: texts as token ids that should stay, other than those an audit measures. svd and fold do not look at
            them; for curvature they are the generic text.
        method: fold, svd, curvature, subnet, output-vectors, gradient-ascent, gradient-difference, npo or simnpo.
        settings: of this method; by default the method's defaults.
        protect: curvature only: texts, or factors, of an ability that should stay.
        factors: curvature only: factors collected before, in place of `retain`.
        row: site table row, for an architecture that the table does not know.
        progress: called as the work goes on.

    Returns:
        The edited model with cost and undo data.

    Raises:
        ConfigError: if the method is unknown, the settings are another method's, or something is out of range.
        DataError: if texts are missing, too short, or do not fit the model.
        NeuronSetMismatch, CheckpointMismatch: if neurons or factors belong to another model.
        ModelNotSupported: if the model is quantized or has an adapter.
    """
    settings = settings_for(method, settings)
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise ModelNotSupported("the model is quantized; load it in a floating dtype")
    started_s, cost, details = time.monotonic(), EditCost(), cast("Mapping[str, Any]", {})
    copy = cast("PreTrainedModel", folded(model, {}))
    if isinstance(settings, FoldSettings):
        require_same_model(settings.neurons, model, row)
        copy = cast("PreTrainedModel", folded(model, closed(settings.neurons, scale=settings.scale)))
    elif isinstance(settings, SvdSettings):
        edit_by_singular_values(copy, settings, row)
    elif isinstance(settings, CurvatureSettings):
        _curvature(copy, retain, settings, protect, factors, cost, row, progress)
    else:
        learning = copy.float()
        arguments: dict[str, Any] = {"cost": cost, "row": row, "progress": progress}
        if isinstance(settings, SubnetSettings):
            edit_by_subnet(learning, targets, retain, settings, **arguments)
        elif isinstance(settings, OutputVectorSettings):
            details = edit_output_vectors(learning, targets, retain, settings, **arguments)
        else:
            assert isinstance(settings, UnlearningSettings)
            details = unlearn(learning, targets, retain, cast("Any", method), settings, **arguments)
        _take_over_dtypes(learning, model)
    cost.seconds = time.monotonic() - started_s
    return Edit(copy, method, settings, cost, details, fingerprint(model, row), changed_values(model, copy))


def export_edit(
    edited: Edit,
    folder: str | Path,
    *,
    manifest: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keeps_undo: bool = True,
) -> Path:
    """Write an edited model as a plain folder, and its undo file beside it: `NAME` and `NAME.undo.safetensors`.

    The undo file holds what was removed, so whoever has it has the memory too; the folder works without.

    Args:
        edited: from `edit`.
        folder: destination; must not exist, or be empty.
        manifest: further entries of `unmemorize.json`, such as a digest of the examples.
        tokenizer: stored beside the weights if given.
        keeps_undo: whether there is an undo file; without it nothing of what was removed is ever written.

    Raises:
        RunFolderError: if the destination or the undo file exists, or cannot be written.
    """
    entries = {**edited.manifest(), **(manifest or {})}
    if not keeps_undo:
        return export(edited.model, folder, manifest=entries, tokenizer=tokenizer)
    undo = undo_path(folder)
    if undo.exists():
        raise RunFolderError(f"{undo} already exists; choose a new folder, or move the undo file away")
    write_undo(undo, edited.undo, original=edited.original, result=fingerprint(edited.model))
    try:
        return export(edited.model, folder, manifest={**entries, "undo": undo.name}, tokenizer=tokenizer)
    except BaseException:
        undo.unlink(missing_ok=True)
        raise


def undone(
    folder: str | Path, undo: str | Path | None = None, *, row: MlpRow | None = None
) -> PreTrainedModel:
    """Load an exported edit and give back the model before it, bit for bit.

    Args:
        folder: written by `export_edit`.
        undo: its undo file; by default the one beside it.
        row: site table row, for an architecture that the table does not know.

    Raises:
        FileFormatError: if the undo file is missing or damaged.
        CheckpointMismatch: if the undo file belongs to another folder, or the folder has been changed since.
    """
    tensors, original, result = read_undo(undo or undo_path(folder))
    model = load(folder, row=row, run_check=False)
    found = fingerprint(model, row)
    if found != result:
        raise CheckpointMismatch(
            f"the undo data belong to {result}, {folder} holds {found}; pass the undo file written with this folder"
        )
    put_back(model, tensors)
    if fingerprint(model, row) != original:
        raise CheckpointMismatch(f"the undo data do not give {original} back from {folder}; they are damaged")
    return model


def _curvature(
    model: PreTrainedModel,
    retain: Texts,
    settings: CurvatureSettings,
    protect: Texts | CurvatureFactors | None,
    factors: CurvatureFactors | None,
    cost: EditCost,
    row: MlpRow | None,
    progress: ProgressCallback | None,
) -> None:
    """Collect what is not given, and edit in place."""
    if factors is None:
        factors = collect_factors(model, retain, settings, row=row, progress=progress)
        cost.forward_equivalents += factors.cost.forward_equivalents
    if protect is not None and not isinstance(protect, CurvatureFactors):
        protect = collect_factors(model, protect, settings, row=row, progress=progress)
        cost.forward_equivalents += protect.cost.forward_equivalents
    edit_by_curvature(model, factors, settings, protect=protect, row=row)


@torch.no_grad()
def _take_over_dtypes(copy: PreTrainedModel, original: PreTrainedModel) -> None:
    """Cast a float32 copy's parameters back, and give it the original's buffers and gradient switches."""
    parameters = dict(original.named_parameters())
    for name, parameter in copy.named_parameters():
        parameter.data = parameter.data.to(parameters[name].dtype)
        parameter.grad = None
        parameter.requires_grad_(parameters[name].requires_grad)
    for name, buffer in original.named_buffers():
        owner, _, leaf = name.rpartition(".")
        module_at(copy, owner)._buffers[leaf] = buffer.clone()
