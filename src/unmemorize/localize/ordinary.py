"""What neurons do on ordinary texts: statistics that "outliers" and "contrast" compare memorized texts with.

Streamed, resumable and tied to the model (`neuron_statistics.NeuronStatistics`); texts are never held together.

    "activation"    mean absolute activation over a text's tokens
    "derivative"    derivative, by the neuron's gate, of the mean loss of a text's tokens but the first
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from unmemorize.corpus.memorized import MemorizedExample
from unmemorize.errors import DataError
from unmemorize.localize.gradients import gate_derivatives
from unmemorize.localize.neuron_statistics import NeuronStatistics, Quantity, streamed
from unmemorize.localize.outliers import mean_activations
from unmemorize.localize.suffix import device_of, frozen, make_batch
from unmemorize.models.language import MlpRow, find_mlps, fingerprint
from unmemorize.neurons import Site
from unmemorize.records import ProgressCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def collect_statistics(
    model: PreTrainedModel,
    texts: Iterable[Sequence[int]],
    *,
    quantity: Quantity = "activation",
    batch_size: int = 16,
    path: str | Path | None = None,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> NeuronStatistics:
    """Compute statistics of ordinary texts, streamed.

    Args:
        model: the model; it is left as it was.
        texts: texts as token ids, cut to about the length of the examples; read once, never held together.
        quantity: "activation" for "outliers", "derivative" for "contrast" (twice the passes).
        batch_size: texts per pass.
        path: file that is written after every batch and continued from if it exists.
        row: site table row, for an architecture that the table does not know.
        progress: called after each batch.

    Raises:
        DataError: if there are fewer than two texts, one is too short, or the file was made from others.
        NeuronSetMismatch: if the file was made for another model or quantity.
    """
    sites = tuple(mlp.site for mlp in find_mlps(model, row))
    measure = _derivatives if quantity == "derivative" else mean_activations
    return streamed(
        NeuronStatistics.empty(fingerprint(model, row), sites, quantity=quantity),
        texts,
        lambda batch: measure(model, sites, batch),
        name=lambda text: " ".join(str(int(token)) for token in text),
        unit="texts",
        batch_size=batch_size,
        path=path,
        progress=progress,
    )


def passes(statistics: NeuronStatistics) -> float:
    """Return what statistics took, in forward-equivalents of one text."""
    return statistics.count * (2.0 if statistics.quantity == "derivative" else 1.0)


def _derivatives(
    model: PreTrainedModel, sites: Sequence[Site], texts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Derivatives of each text's loss by the gates, shape (N, F) per site, nats a token."""
    if min(map(len, texts)) < 2:
        raise DataError(
            "an ordinary text has one token and no loss; leave out texts of fewer than two tokens"
        )
    examples = [MemorizedExample(prefix=tuple(text[:1]), suffix=tuple(text[1:])) for text in texts]
    with frozen(model):
        return gate_derivatives(model, sites, make_batch(examples, device_of(model)))
