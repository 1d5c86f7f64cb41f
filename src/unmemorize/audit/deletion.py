"""DEL: drop the neurons that were found for a memorized text; what does that do to it, to others, to ordinary text?

For every text, with the neurons found for it multiplied by 0 and nothing else:

    self        change of its own teacher-forced accuracy and of the distance of its greedy continuation
    neighbour   the same, mean over all other memorized texts: what the deletion should leave alone
    ordinary    perplexity of texts that are not memorized, exp(nats / predicted tokens)

A good localization moves the first far and the others little; a random set of the same size moves nothing. Distances
are Levenshtein distances in characters, between decoded continuations and decoded suffixes.

Differences from the published numbers: their perplexity column is 2 to the power of a loss in nats, and so about a
third of the real change; their search and deletion leave out the first layer, here the neurons say which layers.
Source: Chang et al. 2024, "Do Localization Methods Actually Localize Memorized Data in LLMs?", arXiv 2311.09060.

Letters: N texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from unmemorize.audit.language import document_losses, extract
from unmemorize.audit.statistics import bootstrap_mean
from unmemorize.audit.verbatim import levenshtein
from unmemorize.errors import DataError, ShapeMismatch
from unmemorize.gates import closed, gated
from unmemorize.models.language import MlpRow, require_same_model
from unmemorize.neurons import NeuronSet
from unmemorize.records import Measure, Progress, ProgressCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Floats = NDArray[np.float64]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletionSettings:
    """What counts as a text's prefix and suffix, and when it counts as memorized (the source's values)."""

    prefix_tokens: int = 32
    """Tokens that are given."""
    suffix_tokens: int = 48
    """Tokens that are compared."""
    least_accuracy_frac: float = 0.9
    """Teacher-forced accuracy that a memorized text reaches."""
    most_distance_characters: int = 20
    """Distance in characters that its greedy continuation stays within."""
    least_distinct_tokens: int = 16
    """Distinct tokens in its suffix."""
    batch_size: int = 32
    """Texts per forward pass."""


@dataclass(frozen=True, slots=True, eq=False)
class Deletion:
    """Effects of N deletions, each array of shape (N,).

    Attributes:
        num_neurons: neurons that were dropped.
        self_accuracy_change_frac: change of the text's own teacher-forced accuracy, -1 to 1.
        self_distance_change_characters: change of its continuation's distance.
        neighbour_accuracy_change_frac: mean change of the other texts' accuracy; NaN if there are none.
        neighbour_distance_change_characters: mean change of the other texts' distance.
        ordinary_perplexity: with the neurons dropped.
        ordinary_perplexity_before: of the whole model.
    """

    num_neurons: NDArray[np.int64]
    self_accuracy_change_frac: Floats
    self_distance_change_characters: Floats
    neighbour_accuracy_change_frac: Floats
    neighbour_distance_change_characters: Floats
    ordinary_perplexity: Floats
    ordinary_perplexity_before: float

    def measures(self, *, seed: int = 0) -> dict[str, Measure]:
        """Give the means over texts with bootstrap intervals; `perplexity_rise_frac` is relative to the whole model."""
        columns = {
            "self_accuracy_change_frac": self.self_accuracy_change_frac,
            "neighbour_accuracy_change_frac": self.neighbour_accuracy_change_frac,
            "self_distance_change_characters": self.self_distance_change_characters,
            "neighbour_distance_change_characters": self.neighbour_distance_change_characters,
            "perplexity_rise_frac": self.ordinary_perplexity / self.ordinary_perplexity_before - 1,
        }
        return {name: bootstrap_mean(values, seed=seed) for name, values in columns.items()}


def memorized(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    decode: Decode,
    settings: DeletionSettings | None = None,
) -> list[int]:
    """List the texts that count as memorized, by their number; those too short are never listed."""
    settings = settings or DeletionSettings()
    test = extract(
        model,
        sequences,
        settings.prefix_tokens,
        settings.suffix_tokens,
        batch_size=settings.batch_size,
    )
    distances = _distances(test.generated, test.truth, decode)
    return [
        int(number)
        for place, number in enumerate(test.indices)
        if test.scores.teacher_forced_accuracy_frac[place] >= settings.least_accuracy_frac
        and distances[place] <= settings.most_distance_characters
        and len(set(test.truth[place].tolist())) >= settings.least_distinct_tokens
    ]


def delete_each(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    neurons: Sequence[NeuronSet],
    ordinary: Sequence[Sequence[int]],
    decode: Decode,
    settings: DeletionSettings | None = None,
    *,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> Deletion:
    """Drop each text's neurons in turn and measure it, the other texts, and ordinary text; the model is restored.

    Args:
        model: any causal language model of the site table.
        sequences: N memorized texts as token ids, of at least prefix + suffix tokens.
        neurons: one set for each text.
        ordinary: texts that are not memorized.
        decode: token ids → text, without special treatment of spaces.
        settings: lengths and batch size.
        row: site table row, for an architecture that the table does not know.
        progress: called after every text.

    Raises:
        ShapeMismatch: if there is not one set for each text.
        DataError: if a text is too short, or there is no ordinary text.
        NeuronSetMismatch: if a set was made for another model.
    """
    settings = settings or DeletionSettings()
    _require_usable(sequences, neurons, ordinary, settings)
    for chosen in neurons:
        require_same_model(chosen, model, row)
    accuracy, distance = _measured(model, sequences, decode, settings)
    before = _perplexity(model, ordinary, settings)
    rows: list[tuple[float, ...]] = []
    for number, chosen in enumerate(neurons):
        with gated(model, closed(chosen)):
            accuracy_now, distance_now = _measured(model, sequences, decode, settings)
            perplexity = _perplexity(model, ordinary, settings)
        change, moved = accuracy_now - accuracy, distance_now - distance
        others = np.arange(len(sequences)) != number
        rows.append(
            (
                change[number],
                moved[number],
                change[others].mean() if others.any() else math.nan,
                moved[others].mean() if others.any() else math.nan,
                perplexity,
            )
        )
        if progress is not None:
            progress(Progress("deletion", number + 1, len(neurons), "texts"))
    columns = np.array(rows, dtype=np.float64).reshape(len(rows), 5).T
    return Deletion(
        num_neurons=np.array([len(chosen) for chosen in neurons]),
        self_accuracy_change_frac=columns[0],
        self_distance_change_characters=columns[1],
        neighbour_accuracy_change_frac=columns[2],
        neighbour_distance_change_characters=columns[3],
        ordinary_perplexity=columns[4],
        ordinary_perplexity_before=before,
    )


def _measured(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], decode: Decode, settings: DeletionSettings
) -> tuple[Floats, Floats]:
    """Teacher-forced accuracy and distance of every text, shape (N,) each."""
    test = extract(
        model,
        sequences,
        settings.prefix_tokens,
        settings.suffix_tokens,
        batch_size=settings.batch_size,
    )
    return test.scores.teacher_forced_accuracy_frac, _distances(test.generated, test.truth, decode)


def _distances(generated: NDArray[np.int64], truth: NDArray[np.int64], decode: Decode) -> Floats:
    """Levenshtein distances of decoded rows, characters, shape (N,)."""
    found = []
    for ours, theirs in zip(generated.tolist(), truth.tolist(), strict=True):
        first, second = ([ord(character) for character in decode(tokens)] for tokens in (ours, theirs))
        pair = (np.array([first], dtype=np.int64), np.array([second], dtype=np.int64))
        found.append(float(levenshtein(*pair)[0]))
    return np.array(found, dtype=np.float64)


def _perplexity(
    model: PreTrainedModel, ordinary: Sequence[Sequence[int]], settings: DeletionSettings
) -> float:
    losses = document_losses(model, ordinary, batch_size=settings.batch_size)
    return math.exp(losses.nll_nats.sum() / losses.num_tokens.sum())


def _require_usable(
    sequences: Sequence[Sequence[int]],
    neurons: Sequence[NeuronSet],
    ordinary: Sequence[Sequence[int]],
    settings: DeletionSettings,
) -> None:
    if len(neurons) != len(sequences):
        raise ShapeMismatch(f"{len(neurons)} neuron sets for {len(sequences)} texts; pass one for each text")
    least = settings.prefix_tokens + settings.suffix_tokens
    for number, sequence in enumerate(sequences):
        if len(sequence) < least:
            raise DataError(f"text {number} has {len(sequence)} tokens, DEL needs {least}; leave it out")
    if not any(len(text) > 1 for text in ordinary):
        raise DataError("there is no ordinary text of two tokens or more; perplexity needs some")
