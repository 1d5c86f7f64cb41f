"""NeMo for language models, first half: neurons that are unusually active on a memorized text.

    score = |a - mean| / std          a: mean absolute activation over the tokens of the example (prefix and suffix);
                                      mean and std over ordinary texts, each averaged over its own tokens

Statistics are those of `scores.py`: streamed, resumable, tied to the model. The second half, the search for the few
neurons that break a recital, is in `recital.py`.

Source: Hintersdorf et al. 2024, for text-to-image models; the carrying-over to language models is ours, not a published
result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmemorize.corpus.memorized import MemorizedExample
from unmemorize.errors import DataError, NeuronSetMismatch
from unmemorize.gates import capture
from unmemorize.localize.gradients import Scored
from unmemorize.localize.scores import ActivationStatistics, chained_digest, load_statistics, mean_absolute
from unmemorize.localize.suffix import device_of, frozen
from unmemorize.models.language import MlpRow, find_mlps, fingerprint
from unmemorize.neurons import Site, same_model
from unmemorize.records import Progress, ProgressCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def mean_activations(
    model: PreTrainedModel, sites: Sequence[Site], texts: Sequence[Sequence[int]], batch_size: int = 8
) -> list[Tensor]:
    """Average each text's absolute activations over its tokens.

    Args:
        model: the model.
        sites: its sites.
        texts: N texts as token ids, at least one token each.
        batch_size: texts per pass.

    Returns:
        Shape (N, F) per site, float32, on the CPU.
    """
    device = device_of(model)
    found: list[list[Tensor]] = [[] for _ in sites]
    with frozen(model):
        for start in range(0, len(texts), batch_size):
            rows = [torch.tensor(list(text), dtype=torch.int64) for text in texts[start : start + batch_size]]
            tokens_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            lengths = torch.tensor([len(row) for row in rows])
            is_real_BT = torch.arange(tokens_BT.shape[1]) < lengths[:, None]
            with capture(model, sites) as seen:
                model(input_ids=tokens_BT, use_cache=False)
            for kept, site in zip(found, sites, strict=True):
                values = seen[site][0].reshape(*tokens_BT.shape, -1).float()
                kept.append(mean_absolute(values, is_real_BT.to(values.device)).cpu())
    return [torch.cat(parts) for parts in found]


def collect_statistics(
    model: PreTrainedModel,
    texts: Iterable[Sequence[int]],
    *,
    batch_size: int = 16,
    path: str | Path | None = None,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> ActivationStatistics:
    """Compute activation statistics of ordinary texts, streamed.

    Args:
        model: the model.
        texts: texts as token ids, cut to about the length of the examples; read once, never held together.
        batch_size: texts per pass.
        path: file that is written after every batch and continued from if it exists.
        row: site table row, for an architecture that the table does not know.
        progress: called after each batch.

    Raises:
        DataError: if there are fewer than two texts, or the file was made from others.
        NeuronSetMismatch: if the file was made for another model.
    """
    sites = tuple(mlp.site for mlp in find_mlps(model, row))
    model_id = fingerprint(model, row)
    total = ActivationStatistics.empty(model_id, sites)
    remaining = iter(texts)
    if path is not None and Path(path).exists():
        total = load_statistics(path)
        if (total.model_id, total.sites) != (model_id, sites):
            raise NeuronSetMismatch(
                f"{path} was made for {total.model_id}, this model is {model_id}; choose a new file"
            )
        if total.digest != chained_digest("", map(_name, islice(remaining, total.count))):
            raise DataError(
                f"{path} was made from other texts; choose a new file, or pass the same texts again"
            )
    while batch := list(islice(remaining, batch_size)):
        found = mean_activations(model, sites, batch, batch_size)
        total = total.updated(found, [_name(text) for text in batch])
        if path is not None:
            total.save(path)
        if progress is not None:
            progress(Progress("statistics", total.count, 0, "texts"))
    if total.count < 2:
        raise DataError(
            f"{total.count} texts give no standard deviation; pass at least two, better thousands"
        )
    return total


def _name(text: Sequence[int]) -> str:
    return " ".join(str(int(token)) for token in text)


def outlier_scores(
    model: PreTrainedModel,
    model_id: str,
    examples: Sequence[MemorizedExample],
    statistics: ActivationStatistics,
    *,
    batch_size: int,
) -> Scored:
    """Score neurons by absolute z-scores, averaged over the examples.

    Where ordinary activations do not vary (a dead unit), the ordinary value scores 0 and any other infinity.

    Raises:
        NeuronSetMismatch: if the statistics belong to another model.
    """
    if statistics.model_id and not same_model(statistics.model_id, model_id):
        raise NeuronSetMismatch(
            f"the activation statistics are for {statistics.model_id}, this model is {model_id}; collect them on it"
        )
    found = mean_activations(model, statistics.sites, [example.tokens for example in examples], batch_size)
    scores = []
    for values, mean, std in zip(found, statistics.means, statistics.stds, strict=True):
        z = (values - mean.float()).abs() / std
        scores.append(z.nan_to_num(nan=0.0, posinf=torch.inf).mean(0))
    return tuple(scores), float(len(examples))
