"""The MLP matrices of a language model as (out, in) views, whatever layout its linear layers store.

`view` gives a tensor that shares memory with the weight: GPT-2's transposed layers are turned, and the two halves of a
fused gate and up projection are two matrices. Also here: what an edit costs, which texts it accepts, and inputs and
output gradients of linear layers without a hook.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError, DataError, ModelNotSupported
from unmemorize.gates import is_plain_linear, is_transposed, module_at, replaced_forwards
from unmemorize.models.language import MlpRow, find_mlps
from unmemorize.remove.settings import MatrixKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOURCE_LAYERS = 32
"""Layers of the models that the sources' default layers belong to."""


@dataclass(frozen=True, slots=True)
class MlpMatrix:
    """One matrix of one MLP.

    Attributes:
        layer: decoder layer, from 0.
        kind: gate, up (the only first projection of an MLP without gate) or down.
        path: dotted path of the linear layer.
        first, last: its output rows, where a fused layer holds two matrices.
    """

    layer: int
    kind: MatrixKind
    path: str
    first: int
    last: int

    @property
    def name(self) -> str:
        """A name that is unique in a model."""
        return f"{self.layer}.{self.kind}"

    def view(self, model: nn.Module) -> Tensor:
        """Return the matrix, shape (O, I), sharing memory with the model's weight."""
        linear = module_at(model, self.path)
        weight = linear.weight
        assert isinstance(weight, Tensor)
        turned = weight.detach().t() if is_transposed(linear) else weight.detach()
        return turned[self.first : self.last]


def find_matrices(
    model: nn.Module,
    layers: Sequence[int],
    kinds: Sequence[MatrixKind],
    row: MlpRow | None = None,
) -> tuple[MlpMatrix, ...]:
    """Resolve the matrices of some layers, in order; kinds that an MLP does not have are skipped.

    Raises:
        ConfigError: if none is left.
        ModelNotSupported: if a layer has an adapter or is quantized, so that its weight is not all it computes with.
    """
    mlps = find_mlps(model, row)
    found: list[MlpMatrix] = []
    for number in layers:
        mlp = mlps[number]
        width, firsts = mlp.site.width, list(mlp.up_paths)
        if mlp.is_fused:
            places: list[tuple[MatrixKind, str, int]] = [("gate", firsts[0], 0), ("up", firsts[0], width)]
        elif len(firsts) == 2:
            places = [("gate", firsts[0], 0), ("up", firsts[1], 0)]
        else:
            places = [("up", firsts[0], 0)]
        matrices = [MlpMatrix(number, kind, path, start, start + width) for kind, path, start in places]
        outputs = int(mlp.down.weight.shape[1 if is_transposed(mlp.down) else 0])  # type: ignore[index]
        matrices.append(MlpMatrix(number, "down", mlp.site.path, 0, outputs))
        found += [matrix for matrix in matrices if matrix.kind in kinds]
    for matrix in found:
        linear = module_at(model, matrix.path)
        if not is_plain_linear(linear):
            raise ModelNotSupported(
                f"cannot edit {matrix.path}, a {type(linear).__name__}; merge its adapter or dequantize it first"
            )
    if not found:
        raise ConfigError(
            f"no MLP of layers {list(layers)} has a {' or '.join(kinds) or 'matrix'}; choose other kinds"
        )
    return tuple(found)


def chosen_layers(
    model: nn.Module, layers: Sequence[int] | None, default: tuple[int, int] | None, row: MlpRow | None = None
) -> tuple[int, ...]:
    """Return the layers to edit.

    Args:
        model: the model.
        layers: chosen by the caller, or None.
        default: first and last layer of the source's 32, taken at the same depth; None is every layer.
        row: site table row, for an architecture that the table does not know.

    Raises:
        ConfigError: if a layer does not exist.
    """
    num = len(find_mlps(model, row))
    if layers is None:
        first, last = (0, SOURCE_LAYERS - 1) if default is None else default
        scaled = [min(num - 1, int(place * num / SOURCE_LAYERS + 0.5)) for place in (first, last)]
        return tuple(range(scaled[0], scaled[1] + 1)) if default is not None else tuple(range(num))
    outside = [number for number in layers if not 0 <= number < num]
    if outside or not layers:
        raise ConfigError(f"layers {list(layers)} do not all exist; expected some of 0 to {num - 1}")
    return tuple(sorted(set(layers)))


@dataclass(slots=True)
class EditCost:
    """What an edit took.

    Attributes:
        seconds: wall time, in seconds.
        forward_equivalents: passes of one text through the model; a backward pass counts as two.
    """

    seconds: float = 0.0
    forward_equivalents: float = 0.0
    _started_s: float = field(default_factory=time.monotonic, repr=False)

    def add(self, num_texts: int, *, has_backward: bool = False) -> None:
        """Count passes."""
        self.forward_equivalents += num_texts * (3 if has_backward else 1)
        self.seconds = time.monotonic() - self._started_s


def require_texts(
    name: str, texts: Sequence[Sequence[int]], model: PreTrainedModel, least_tokens: int = 2
) -> None:
    """Check texts before they reach a model.

    Raises:
        DataError: if there are none, or one is too short, longer than the context, or holds an unknown token.
    """
    if not texts:
        raise DataError(f"there are no {name} texts; give at least one")
    embedding = model.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])  # type: ignore[index]
    context = getattr(model.config, "max_position_embeddings", None)
    for number, text in enumerate(texts):
        if len(text) < least_tokens:
            raise DataError(
                f"{name} text {number} has {len(text)} tokens, expected {least_tokens} or more; leave it out"
            )
        if context and len(text) > context:
            raise DataError(
                f"{name} text {number} has {len(text)} tokens, the model's context holds {context}; cut it"
            )
        if not 0 <= min(text) <= max(text) < vocabulary:
            raise DataError(
                f"{name} text {number} holds a token outside the model's vocabulary of {vocabulary}; use its tokenizer"
            )


def batches(texts: Sequence[Sequence[int]], size: int) -> Iterator[list[Sequence[int]]]:
    """Yield texts in order, in pieces."""
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])


@dataclass(slots=True)
class Record:
    """What one layer saw in one call: its detached input, and the zeros that were added to its output."""

    inputs: Tensor
    zeros: Tensor


@contextmanager
def probed(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Record]]:
    """Record inputs of linear layers, and add zeros to their outputs whose gradient is the outputs' gradient."""
    records: dict[str, Record] = {}

    def probe(path: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def compute(inputs: Tensor) -> Tensor:
            output = forward(inputs)
            zeros = torch.zeros_like(output, requires_grad=True)
            records[path] = Record(inputs.detach(), zeros)
            return output + zeros

        return compute

    linears = {path: module_at(model, path) for path in paths}
    with replaced_forwards({linear: probe(path, linear.forward) for path, linear in linears.items()}):
        yield records


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
