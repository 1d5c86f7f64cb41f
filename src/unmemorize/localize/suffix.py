"""The question that localizers of language models ask: how well does the model recite these suffixes?

Examples are batched with padding on the right and no attention mask: under causal attention no token sees what follows
it. Position p predicts token p + 1; only predictions of suffix tokens count. Everything after the logits is float32
whatever the model's dtype. Models are run in evaluation mode with frozen weights, and get their modes and flags back.

Letters: B examples of a batch, T tokens, P predictions of suffix tokens in a batch, F neurons of a site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unmemorize.corpus.memorized import MemorizedExample
from unmemorize.errors import DataError
from unmemorize.gates import gated
from unmemorize.neurons import Site


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded examples.

    Attributes:
        tokens_BT: token ids, int64; padding is token 0.
        predicts_BT: which positions predict a suffix token, bool.
    """

    tokens_BT: Tensor
    predicts_BT: Tensor

    @property
    def labels_P(self) -> Tensor:
        """Suffix tokens, row by row."""
        return self.tokens_BT[:, 1:][self.predicts_BT[:, :-1]]

    @property
    def rows_P(self) -> Tensor:
        """Number of the row that each prediction belongs to."""
        return self.predicts_BT.nonzero()[:, 0]

    def repeated(self, times: int) -> Batch:
        """Return a batch of one row, repeated."""
        return replace(
            self,
            tokens_BT=self.tokens_BT.expand(times, -1),
            predicts_BT=self.predicts_BT.expand(times, -1),
        )


def make_batch(examples: Sequence[MemorizedExample], device: torch.device | str = "cpu") -> Batch:
    """Pad examples to the longest one."""
    rows = [torch.tensor(example.tokens, dtype=torch.int64) for example in examples]
    tokens_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    predicts_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        predicts_BT[row, len(example.prefix) - 1 : len(example.tokens) - 1] = True
    return Batch(tokens_BT.to(device), predicts_BT.to(device))


def batches(
    examples: Sequence[MemorizedExample], batch_size: int, device: torch.device | str
) -> Iterator[tuple[int, Batch]]:
    """Yield batches in order, each with the number of its first example."""
    for start in range(0, len(examples), batch_size):
        yield start, make_batch(examples[start : start + batch_size], device)


def suffix_log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model once and return the log-probability of every suffix token, shape (P,), float32, nats."""
    return _picked(_suffix_logits(model, batch), batch)


def suffix_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model once and return each example's mean loss, shape (B,), float32, nats per suffix token."""
    return -row_means(suffix_log_probabilities(model, batch), batch)


def row_means(values_P: Tensor, batch: Batch) -> Tensor:
    """Average values of predictions by row, shape (B,)."""
    sums = values_P.new_zeros(len(batch.tokens_BT)).index_add(0, batch.rows_P, values_P)
    return sums / batch.predicts_BT.sum(1)


def _recited(logits: Tensor, batch: Batch) -> Tensor:
    """Count suffix tokens before the first mistake; greedy decoding sees the true tokens as long as it is right."""
    is_right = torch.zeros_like(batch.predicts_BT)
    is_right = is_right.masked_scatter(batch.predicts_BT, logits.argmax(-1) == batch.labels_P)
    is_whole_so_far = (is_right | ~batch.predicts_BT).cumprod(1).bool()
    return (is_whole_so_far & batch.predicts_BT).sum(1)


def _picked(logits: Tensor, batch: Batch) -> Tensor:
    return logits.log_softmax(-1).gather(-1, batch.labels_P.unsqueeze(-1)).squeeze(-1)


def _suffix_logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch.tokens_BT, use_cache=False).logits
    return logits[batch.predicts_BT].float()


@torch.no_grad()
def measured(
    model: nn.Module,
    examples: Sequence[MemorizedExample],
    *,
    batch_size: int = 8,
    gates: Mapping[Site, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Measure loss and recited tokens of every example, with gates of shape (F,) if any are given.

    Returns:
        Losses of shape (N,), float32, nats per suffix token; recited tokens of shape (N,), int64. Both on the CPU.
    """
    losses, recited = [], []
    with frozen(model), gated(model, gates or {}):
        for _, batch in batches(examples, batch_size, device_of(model)):
            logits = _suffix_logits(model, batch)
            losses.append(-row_means(_picked(logits, batch), batch).cpu())
            recited.append(_recited(logits, batch).cpu())
    return torch.cat(losses), torch.cat(recited)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode with weights that need no gradient; modes and flags come back."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.train(False)
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def gradient_scale(model: nn.Module) -> float:
    """Return the factor that keeps small gradients of a float16 model from becoming 0; 1 for other dtypes."""
    return 1024.0 if next(model.parameters()).dtype == torch.float16 else 1.0


def device_of(model: nn.Module) -> torch.device:
    """Return where token ids have to be."""
    return next(model.parameters()).device


def require_fitting(model: nn.Module, examples: Sequence[MemorizedExample]) -> None:
    """Check that there are examples and that the model can read them.

    Raises:
        DataError: if there are none, one is longer than the context, or holds a token outside the vocabulary.
    """
    if not examples:
        raise DataError("no examples to localize; pass at least one memorized text")
    config = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    for number, example in enumerate(examples):
        length = len(example.tokens)
        if context and length > context:
            raise DataError(
                f"example {number} has {length} tokens, the model's context holds {context}; shorten its prefix"
            )
        if not 0 <= min(example.tokens) <= max(example.tokens) < vocabulary:
            raise DataError(
                f"example {number} holds token {max(example.tokens)}, the model's vocabulary has {vocabulary}; use the "
                "tokenizer that the model was trained with"
            )
