"""Slow, literal versions of the audit's formulas, to test the fast ones against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


def levenshtein(first: Sequence[int], second: Sequence[int]) -> int:
    """Edit distance by the textbook table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i in range(len(first) + 1):
        for j in range(len(second) + 1):
            if i == 0 or j == 0:
                table[i][j] = i + j
            else:
                table[i][j] = min(
                    table[i - 1][j] + 1,
                    table[i][j - 1] + 1,
                    table[i - 1][j - 1] + (first[i - 1] != second[j - 1]),
                )
    return table[-1][-1]


def matched_prefix(generated: Sequence[int], truth: Sequence[int]) -> int:
    """Tokens before the first mismatch."""
    for place, (ours, theirs) in enumerate(zip(generated, truth, strict=True)):
        if ours != theirs:
            return place
    return len(truth)


def extraction_strength(teacher_forced: Sequence[int], truth: Sequence[int]) -> float:
    """1 - o / l with o the smallest offset from which on all are right; l if the last one is wrong."""
    length = len(truth)
    for offset in range(length):
        if list(teacher_forced[offset:]) == list(truth[offset:]):
            return 1 - offset / length
    return 0.0


def greedy(model: nn.Module, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy continuation of one prompt, one full forward pass a token, no cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def summed_nll(model: nn.Module, tokens: Sequence[int]) -> float:
    """Negative log-likelihood of a document's tokens after the first, one by one."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].double()
    total = 0.0
    for place in range(1, len(tokens)):
        row = logits[place - 1]
        total -= float(row[tokens[place]]) - math.log(float(row.exp().sum()))
    return total
