"""Losses of unlearning, from log-likelihoods of texts. Pure mathematics: knows no model.

    ascent       -nll(target)
    difference   -gamma nll(target) + alpha nll(retain)
    npo          gamma mean_n (-2 / beta) log sigmoid(-beta (log p_n - log p0_n)) + alpha nll(retain)
    simnpo       gamma mean_n (-2 / beta) log sigmoid(beta (nll_n / tokens_n - delta)) + alpha nll(retain)

nll without an index is a mean over the tokens of a batch, nats per token; log p_n = -nll_n is the sum over a text's
predicted tokens, nats; p0 is the model before unlearning, whose sums are computed once. Letters: N texts, T tokens.

Source: gradient difference: Liu et al. 2022; NPO: Zhang et al. 2024, arXiv 2404.05868; SimNPO: Fan et al. 2024,
arXiv 2410.07163; defaults as open-unlearning documents them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from unmemorize.errors import ConfigError

IGNORED = -100

Objective = Literal["gradient-ascent", "gradient-difference", "npo", "simnpo"]


@dataclass(frozen=True, slots=True)
class Padded:
    """Texts in one rectangle.

    Attributes:
        tokens_NT: token ids, shape (N, T), int64, padded with 0 on the right, which causal attention does not see.
        labels_NT: the same, -100 where nothing is to be predicted: padding, and tokens of the prefix.
    """

    tokens_NT: Tensor
    labels_NT: Tensor

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted; the first of a text never is."""
        return int((self.labels_NT[:, 1:] != IGNORED).sum())


def padded(texts: Sequence[Sequence[int]], *, prefix_tokens: int, device: torch.device) -> Padded:
    """Lay texts out in a rectangle.

    Args:
        texts: N texts as token ids.
        prefix_tokens: tokens at the start of each text that are given and not predicted; 0 and 1 are the same.
        device: where the rectangle goes.
    """
    rows = [torch.tensor(list(text), dtype=torch.int64) for text in texts]
    tokens_NT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels_NT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    labels_NT[:, :prefix_tokens] = IGNORED
    return Padded(tokens_NT.to(device), labels_NT.to(device))


def text_nll_nats(logits_NTV: Tensor, labels_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum each text's negative log-likelihood over its predicted tokens.

    Args:
        logits_NTV: shape (N, T, vocabulary); position t predicts the label at t + 1.
        labels_NT: as in `Padded`.

    Returns:
        nll_n in nats, shape (N,), float32; predicted tokens, shape (N,), int64.
    """
    shifted_NT = functional.pad(labels_NT[:, 1:], (0, 1), value=IGNORED)
    losses_NT = functional.cross_entropy(
        logits_NTV.float().transpose(1, 2), shifted_NT, ignore_index=IGNORED, reduction="none"
    )
    return losses_NT.sum(1), (shifted_NT != IGNORED).sum(1)


def forget_terms(
    objective: Objective,
    nll_N: Tensor,
    num_tokens_N: Tensor,
    *,
    reference_nll_N: Tensor | None = None,
    beta: float = 0.1,
    delta: float = 0.0,
) -> Tensor:
    """Give each target's part of what is minimized, shape (N,); the loss is their sum times `forget_scale`.

    Args:
        objective: which.
        nll_N: of the targets under the model, nats summed over a text, shape (N,).
        num_tokens_N: predicted tokens, shape (N,).
        reference_nll_N: the same sums under the model before unlearning; npo needs them.
        beta: sharpness, per nat (npo: of a text's sum; simnpo: of its mean over tokens).
        delta: simnpo's margin, nats per token.

    Raises:
        ConfigError: if npo has no reference, or the objective is unknown.
    """
    if objective in ("gradient-ascent", "gradient-difference"):
        return -nll_N
    if objective == "npo":
        if reference_nll_N is None:
            raise ConfigError("npo needs the targets' losses before unlearning; pass reference_nll_N")
        return (-2 / beta) * functional.logsigmoid(beta * (nll_N - reference_nll_N))
    if objective == "simnpo":
        return (-2 / beta) * functional.logsigmoid(beta * (nll_N / num_tokens_N - delta))
    raise ConfigError(
        f"unknown objective {objective!r}; expected gradient-ascent, gradient-difference, npo or simnpo"
    )


def forget_scale(objective: Objective, num_tokens_N: Tensor) -> float:
    """Return what a batch's terms are multiplied by: one over its tokens (ascent, difference) or its texts."""
    is_per_token = objective in ("gradient-ascent", "gradient-difference")
    return 1 / float(num_tokens_N.sum()) if is_per_token else 1 / len(num_tokens_N)
