"""NeMo for language models, first half: neurons that are unusually active on a memorized text.

    score = |a - mean| / std          a: mean absolute activation over the tokens of the example (prefix and suffix);
                                      mean and std over ordinary texts, each averaged over its own tokens

Statistics come from `ordinary.py`. The second half, the search for the few
neurons that break a recital, is in `recital.py`.

Source: Hintersdorf et al. 2024, for text-to-image models; the carrying-over to language models is ours, not a published
result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmemorize.corpus.memorized import MemorizedExample
from unmemorize.errors import NeuronSetMismatch
from unmemorize.gates import capture
from unmemorize.localize.gradients import Scored
from unmemorize.localize.neuron_statistics import NeuronStatistics
from unmemorize.localize.scores import mean_absolute
from unmemorize.localize.suffix import device_of, frozen
from unmemorize.neurons import Site, same_model

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


def outlier_scores(
    model: PreTrainedModel,
    model_id: str,
    examples: Sequence[MemorizedExample],
    statistics: NeuronStatistics,
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
