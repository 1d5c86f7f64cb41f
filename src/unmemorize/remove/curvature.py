"""Curvature of a language model's MLP matrices on a text, and the edits that need no example of what should go.

For each matrix, over all positions of all texts that predict something (the last one of a text predicts nothing):

    A = mean of x x^T    x the matrix's input
    G = mean of g g^T    g the gradient, by the matrix's output, of the text's summed loss in nats

With labels drawn from the model this is the Kronecker-factored Fisher matrix. Labels follow from seed and place of a
text alone, so batches do not change them. Gradients come from zeros added to the outputs: no hook, no parameter
gradient. The algebra is in `spectra.py`. Factors of a large model take the better part of an hour; save them.

Not done: expectations over more than one label a position, and factors that span several layers.
Source: Merullo et al. 2025, arXiv 2510.24256; K-FAC: Martens and Grosse 2015.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unmemorize.errors import CheckpointMismatch
from unmemorize.models.language import MlpRow, fingerprint
from unmemorize.records import Progress, ProgressCallback
from unmemorize.remove.matrices import (
    EditCost,
    MlpMatrix,
    chosen_layers,
    evaluating,
    find_matrices,
    probed,
    require_texts,
)
from unmemorize.remove.objectives import IGNORED, padded
from unmemorize.remove.settings import CurvatureSettings, SvdSettings
from unmemorize.remove.spectra import Factors, without_low_curvature, without_small_singular
from unmemorize.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTORS_FORMAT = "unmemorize.factors"
FACTORS_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class CurvatureFactors:
    """Factors of some matrices of one model.

    Attributes:
        model_id: fingerprint of the model.
        num_positions: positions behind the means.
        by_matrix: `MlpMatrix.name` → factors.
        cost: what collecting them took.
    """

    model_id: str
    num_positions: int
    by_matrix: Mapping[str, Factors]
    cost: EditCost = field(default_factory=EditCost)

    def save(self, path: str | Path) -> Path:
        """Write the factors as safetensors, atomically."""
        tensors: dict[str, Tensor] = {}
        for name, factors in self.by_matrix.items():
            tensors[f"{name}.inputs"] = factors.inputs_II
            tensors[f"{name}.gradients"] = factors.gradients_OO
        header = {"model_id": self.model_id, "num_positions": self.num_positions}
        return write_tensors(path, tensors, format=FACTORS_FORMAT, version=FACTORS_VERSION, header=header)


def load_factors(path: str | Path) -> CurvatureFactors:
    """Read factors saved by `CurvatureFactors.save`.

    Raises:
        FileFormatError: if the file is missing, damaged, or of another kind or version.
    """
    header, tensors = read_tensors(path, format=FACTORS_FORMAT, version=FACTORS_VERSION, what="factors")
    names = [name.removesuffix(".inputs") for name in tensors if name.endswith(".inputs")]
    by_matrix = {name: Factors(tensors[f"{name}.inputs"], tensors[f"{name}.gradients"]) for name in names}
    return CurvatureFactors(header["model_id"], header["num_positions"], by_matrix)


def collect_factors(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    settings: CurvatureSettings | None = None,
    *,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> CurvatureFactors:
    """Estimate the factors of the matrices that an edit with these settings changes; the model stays as it is.

    Args:
        model: any causal language model of the site table; computes in its own dtype, sums in float64.
        texts: N generic texts as token ids; about 20 M tokens in the source.
        settings: layers, kinds, labels, seed and batch size are read.
        row: site table row, for an architecture that the table does not know.
        progress: called after every batch.

    Raises:
        DataError: if a text cannot be used.
    """
    settings = settings or CurvatureSettings()
    require_texts("generic", texts, model)
    matrices = _matrices(model, settings, row)
    cost, sums, num_positions = EditCost(), _Sums(matrices), 0
    with evaluating(model):
        for start in range(0, len(texts), settings.batch_size):
            batch = texts[start : start + settings.batch_size]
            num_positions += _add_batch(model, sums, batch, start, settings)
            cost.add(len(batch), has_backward=True)
            if progress is not None:
                progress(Progress("curvature", start + len(batch), len(texts), "texts"))
    by_matrix = sums.means(num_positions)
    return CurvatureFactors(fingerprint(model, row), num_positions, by_matrix, cost)


@torch.no_grad()
def edit_by_curvature(
    model: PreTrainedModel,
    factors: CurvatureFactors,
    settings: CurvatureSettings,
    *,
    protect: CurvatureFactors | None = None,
    row: MlpRow | None = None,
) -> None:
    """Take low-curvature components out of a model's matrices, in place.

    Raises:
        CheckpointMismatch: if factors belong to another model, or lack a matrix.
    """
    ours = fingerprint(model, row)
    matrices = _matrices(model, settings, row)
    for given in (factors, protect):
        if given is None:
            continue
        missing = [matrix.name for matrix in matrices if matrix.name not in given.by_matrix]
        if given.model_id != ours or missing:
            raise CheckpointMismatch(
                f"the factors were collected from {given.model_id} for {', '.join(given.by_matrix)}; this edit needs "
                f"{', '.join(matrix.name for matrix in matrices)} of {ours}; collect them with the same settings"
            )
    for matrix in matrices:
        view_OI = matrix.view(model)
        edited_OI = without_low_curvature(
            view_OI,
            _moved(factors.by_matrix[matrix.name], view_OI.device),
            settings.keep_frac,
            protect=_moved(protect.by_matrix[matrix.name], view_OI.device) if protect else None,
            protect_frac=settings.protect_frac,
            protect_by=settings.protect_by,
        )
        view_OI.copy_(edited_OI)


@torch.no_grad()
def edit_by_singular_values(model: PreTrainedModel, settings: SvdSettings, row: MlpRow | None = None) -> None:
    """Take the smallest singular values out of a model's matrices, in place."""
    layers = chosen_layers(model, settings.layers, (21, 21), row)
    for matrix in find_matrices(model, layers, ("gate", "up", "down"), row):
        view_OI = matrix.view(model)
        view_OI.copy_(without_small_singular(view_OI, getattr(settings, f"drop_{matrix.kind}_frac")))


def _matrices(model: nn.Module, settings: CurvatureSettings, row: MlpRow | None) -> tuple[MlpMatrix, ...]:
    return find_matrices(model, chosen_layers(model, settings.layers, (23, 25), row), settings.kinds, row)


def _add_batch(
    model: PreTrainedModel,
    sums: _Sums,
    texts: Sequence[Sequence[int]],
    first_number: int,
    settings: CurvatureSettings,
) -> int:
    """Add a batch's outer products; returns the positions that it has."""
    batch = padded(texts, prefix_tokens=0, device=model.device)
    with torch.enable_grad(), probed(model, sums.paths) as records:
        logits_NTV = model(input_ids=batch.tokens_NT, use_cache=False).logits.float()
        labels_NT = functional.pad(batch.labels_NT[:, 1:], (0, 1), value=IGNORED)
        counted_NT = labels_NT != IGNORED
        if settings.labels == "sampled":
            drawn_NT = drawn_labels(
                logits_NTV.detach(), [len(text) for text in texts], first_number, settings.seed
            )
            labels_NT = torch.where(counted_NT, drawn_NT, labels_NT)
        loss = functional.cross_entropy(
            logits_NTV.flatten(0, 1), labels_NT.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        gradients = torch.autograd.grad(loss, [records[path].zeros for path in sums.paths])
    is_counted = counted_NT.flatten()
    for path, gradient in zip(sums.paths, gradients, strict=True):
        sums.add(path, _rows(records[path].inputs, is_counted), _rows(gradient, is_counted))
    return int(is_counted.sum())


def drawn_labels(logits_NTV: Tensor, lengths: Sequence[int], first_number: int, seed: int) -> Tensor:
    """Draw a label from the model's own distribution at every position; shape (N, T), int64.

    The draw of a text follows from the seed and its number alone.
    """
    num, length, vocabulary = logits_NTV.shape
    uniform_NT = torch.zeros(num, length, dtype=torch.float64)
    for place, tokens in enumerate(lengths):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first_number + place)
        uniform_NT[place, :tokens] = torch.rand(tokens, generator=generator, dtype=torch.float64)
    reached_NTV = logits_NTV.double().softmax(-1).cumsum(-1)
    uniform_NT1 = uniform_NT.to(reached_NTV.device)[..., None] * reached_NTV[..., -1:]
    return torch.searchsorted(reached_NTV, uniform_NT1, right=True).squeeze(-1).clamp(max=vocabulary - 1)


class _Sums:
    """Running sums of outer products; layers that read the same input share its sum."""

    def __init__(self, matrices: Sequence[MlpMatrix]) -> None:
        self._matrices = matrices
        self.paths = list(dict.fromkeys(matrix.path for matrix in matrices))
        self._inputs: dict[tuple[int, bool], Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def add(self, path: str, inputs_PI: Tensor, gradients_PC: Tensor) -> None:
        """Add the positions of a batch for a layer."""
        mine = [matrix for matrix in self._matrices if matrix.path == path]
        place = _input_of(mine[0])
        if path == next(matrix.path for matrix in self._matrices if _input_of(matrix) == place):
            self._inputs[place] = self._inputs.get(place, 0) + inputs_PI.T @ inputs_PI
        for matrix in mine:
            rows_PO = gradients_PC[:, matrix.first : matrix.last]
            self._gradients[matrix.name] = self._gradients.get(matrix.name, 0) + rows_PO.T @ rows_PO

    def means(self, num_positions: int) -> dict[str, Factors]:
        """Return the factors."""
        return {
            matrix.name: Factors(
                self._inputs[_input_of(matrix)] / num_positions, self._gradients[matrix.name] / num_positions
            )
            for matrix in self._matrices
        }


def _input_of(matrix: MlpMatrix) -> tuple[int, bool]:
    return matrix.layer, matrix.kind == "down"


def _rows(channels: Tensor, is_counted: Tensor) -> Tensor:
    """Pick the positions that count; shape (positions, C), float64."""
    return channels.detach().reshape(-1, channels.shape[-1])[is_counted].double()


def _moved(factors: Factors, device: Any) -> Factors:
    return Factors(factors.inputs_II.to(device), factors.gradients_OO.to(device))
