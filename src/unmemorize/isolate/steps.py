"""The parts of a training step that need no state: loss, micro-batches, learning rate, optimizer.

    loss of a step = sum of nats over the global batch / number of its labels

whatever the micro-batches and processes it is cut into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unmemorize.errors import ConfigError
from unmemorize.isolate.packing import IGNORED, Row, attention_arguments, to_batch
from unmemorize.isolate.settings import OptimizationSettings

Batch = dict[str, Tensor]


def learning_rate(step: int, num_steps: int, settings: OptimizationSettings) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then a cosine to `final_frac`."""
    warmup = math.ceil(num_steps * settings.warmup_frac)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup - 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return settings.learning_rate * (settings.final_frac + (1 - settings.final_frac) * cosine)


def make_optimizer(model: nn.Module, settings: OptimizationSettings) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices only (embeddings included)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.learning_rate, betas=(0.9, 0.95)
    )


def mean_loss_nats(model: nn.Module, rows: Sequence[Row], batch_rows: int = 16) -> float | None:
    """Return the mean loss of rows, nats per label, in evaluation mode and without sink ids; None for no rows."""
    if not rows:
        return None
    was_training, device = model.training, next(model.parameters()).device
    total, num_labels = 0.0, 0
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(rows), batch_rows):
                batch = moved(to_batch(rows[start : start + batch_rows]), device)
                total += loss_sum(model, batch, has_sinks=False).item()
                num_labels += count_labels(batch["labels"])
    finally:
        model.train(was_training)
    return total / num_labels


def loss_sum(model: Callable[..., Any], batch: Batch, *, has_sinks: bool) -> Tensor:
    """Return the summed loss of a batch, nats, a scalar in float32."""
    extra = attention_arguments(model, batch["position_ids"])
    if has_sinks:
        extra["sink_ids"] = batch["sink_ids"]
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **extra).logits
    # The labels are moved instead of the logits, which would copy the largest tensor of all.
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def micro_batches(batch: Batch, rank: int, num_processes: int, micro_rows: int | None) -> list[Batch]:
    """Cut out a process's share of a global batch; all processes get equally many micro-batches of equal size.

    A process that would have a row less repeats one without labels, because DDP waits for as many passes everywhere. No
    rows are no micro-batches.
    """
    num_rows = len(batch["labels"])
    places = [(i * num_processes + rank) for i in range(math.ceil(num_rows / num_processes))]
    mine = {name: tensor[[place % num_rows for place in places]] for name, tensor in batch.items()}
    mine["labels"] = mine["labels"].clone()
    mine["labels"][[place >= num_rows for place in places]] = IGNORED
    size = micro_rows or len(places)
    return [
        {name: tensor[start : start + size] for name, tensor in mine.items()}
        for start in range(0, len(places), max(size, 1))
    ]


def require_packing(model: nn.Module) -> None:
    """Check on random tokens that documents packed into one row do not see each other.

    Architectures differ in whether they build block-diagonal attention from restarting positions; one that does not,
    and is not known for it, would train on, with documents leaking into their neighbours.

    Raises:
        ModelNotSupported: if the model takes no positions.
        ConfigError: if changing the first document moves the logits of the second by one bit.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    tokens = torch.randint(vocabulary, (2, 8), generator=torch.Generator().manual_seed(0))
    tokens[1, 4:] = tokens[0, 4:]
    batch = moved({"input_ids": tokens, "position_ids": torch.arange(4).repeat(2, 2)}, device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(**batch, **attention_arguments(model, batch["position_ids"])).logits
    finally:
        model.train(was_training)
    if not torch.equal(logits[0, 4:], logits[1, 4:]):
        raise ConfigError(
            f"{type(model).__name__} does not keep packed documents apart; set rows to padded, one document a row"
        )


def count_labels(labels: Tensor) -> int:
    """Count the labels that are predicted; the first place of a row never is."""
    return int((labels[:, 1:] != IGNORED).sum())


def moved(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
