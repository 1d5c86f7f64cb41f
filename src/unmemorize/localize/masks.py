"""Learned masks: which neurons a model cannot do without when it recites. Slimming and hard concrete.

A mask multiplies every neuron at every position; weights stay as they are. It is pulled to zero by a price per neuron
and held open by the loss of the suffix, until it is nearly closed:

    slimming         L(clip(m, 0, 1)) + price times sum |m|            m starts at 1; score: clip(m, 0, 1)
    hard concrete    E[L(z)] + price times sum P(z > 0)                score: sigmoid(logit)

The price is in nats per neuron. The papers' lambda multiplies a mean over neurons, so lambda = price times the number
of neurons: 1,000 over the 36,864 neurons of GPT-2 is a price of 0.027. A price means the same in models of any size.

Adam takes steps of nearly equal size, so the sign of (gradient of the loss + price) decides which neurons close: a
neuron whose removal costs less than the price closes. The learning rate decides how far the rest is from closing when
the mask is nearly closed. Both methods depend on their settings; hard concrete on its seed too.

Source: Liu et al. 2017; Louizos et al. 2018; as localizers: Chang, Thomason and Jia 2024. The price per neuron and
several draws a step are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmemorize.corpus.memorized import MemorizedExample
from unmemorize.errors import ConfigError
from unmemorize.gates import gated
from unmemorize.localize.attribution import concrete_gates, concrete_open, initial_logit
from unmemorize.localize.suffix import Batch, batches, device_of, frozen, gradient_scale, suffix_losses
from unmemorize.neurons import Site
from unmemorize.records import Progress, ProgressCallback


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSettings:
    """How a mask is learned.

    Attributes:
        price_nats: what an open neuron costs, nats.
        learning_rate: of Adam; 0.001 to 0.01 in the literature.
        max_steps: most updates.
        open_frac: mean of the mask at which learning stops, 0 to 1.
        initial_open_frac: hard concrete: where gates start, 0 to 1.
        sharpness: hard concrete: beta, 1/3 or 2/3 in the literature.
        num_draws: hard concrete: masks drawn per example and step.
    """

    price_nats: float
    learning_rate: float = 0.01
    max_steps: int = 400
    open_frac: float = 0.1
    initial_open_frac: float = 0.5
    sharpness: float = 2 / 3
    num_draws: int = 1

    def __post_init__(self) -> None:
        """Check ranges."""
        if not (self.price_nats > 0 and self.learning_rate > 0 and self.sharpness > 0):
            raise ConfigError(
                f"price {self.price_nats}, learning rate {self.learning_rate} and sharpness {self.sharpness} of a "
                "mask; expected numbers above 0"
            )
        if self.max_steps < 1 or self.num_draws < 1 or not 0 <= self.open_frac < 1:
            raise ConfigError(
                f"a mask of {self.max_steps} steps and {self.num_draws} draws that stops at {self.open_frac}; expected "
                "1 or more of each, and a fraction from 0 to 1"
            )
        if not 0 < self.initial_open_frac < 1:
            raise ConfigError(
                f"gates start open by {self.initial_open_frac}, expected a fraction from 0 to 1"
            )


@dataclass(frozen=True, slots=True)
class LearnedMask:
    """Scores of shape (F,) per site, forward-equivalents, and figures of the run."""

    values: tuple[Tensor, ...]
    forward_equivalents: float
    details: dict[str, Any]


def slimming(
    model: nn.Module,
    sites: Sequence[Site],
    examples: Sequence[MemorizedExample],
    settings: MaskSettings,
    *,
    batch_size: int,
    progress: ProgressCallback | None = None,
) -> LearnedMask:
    """Learn a mask without noise, shared by all examples."""
    device = device_of(model)
    masks = [torch.ones(site.width, device=device, requires_grad=True) for site in sites]

    def gates(_: int) -> list[Tensor]:
        return [mask.clamp(0, 1) for mask in masks]

    def price() -> Tensor:
        return torch.cat(masks).abs().sum()

    def state() -> Tensor:
        return torch.cat(masks).detach().clamp(0, 1)

    return _learned(model, sites, examples, settings, masks, gates, price, state, batch_size, progress)


def hard_concrete(
    model: nn.Module,
    sites: Sequence[Site],
    examples: Sequence[MemorizedExample],
    settings: MaskSettings,
    *,
    seed: int,
    batch_size: int,
    progress: ProgressCallback | None = None,
) -> LearnedMask:
    """Learn the probabilities of a random mask, shared by all examples."""
    device = device_of(model)
    generator = torch.Generator().manual_seed(seed)
    start = initial_logit(settings.initial_open_frac)
    logits = [torch.full((site.width,), start, device=device, requires_grad=True) for site in sites]

    def gates(rows: int) -> list[Tensor]:
        drawn = []
        for logit in logits:
            noise = torch.rand(rows, 1, len(logit), generator=generator).clamp(1e-6, 1 - 1e-6).to(device)
            drawn.append(concrete_gates(logit.expand_as(noise), noise, settings.sharpness))
        return drawn

    def price() -> Tensor:
        return concrete_open(torch.cat(logits), settings.sharpness).sum()

    def state() -> Tensor:
        return torch.cat(logits).detach().sigmoid()

    return _learned(model, sites, examples, settings, logits, gates, price, state, batch_size, progress)


def _learned(
    model: nn.Module,
    sites: Sequence[Site],
    examples: Sequence[MemorizedExample],
    settings: MaskSettings,
    parameters: list[Tensor],
    gates: Callable[[int], list[Tensor]],
    price: Callable[[], Tensor],
    state: Callable[[], Tensor],
    batch_size: int,
    progress: ProgressCallback | None,
) -> LearnedMask:
    """Run Adam until the mask is nearly closed or the steps are used up."""
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    scale, step, loss = gradient_scale(model), 0, 0.0
    with frozen(model):
        for step in range(1, settings.max_steps + 1):
            optimizer.zero_grad()
            loss = 0.0
            for _, batch in batches(examples, batch_size, device_of(model)):
                drawn = _drawn(batch, settings.num_draws)
                with gated(model, dict(zip(sites, gates(len(drawn.tokens_BT)), strict=True))):
                    part = suffix_losses(model, drawn).sum() / (len(examples) * settings.num_draws)
                (part * scale).backward()
                loss += float(part.detach())
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad /= scale
            (settings.price_nats * price()).backward()
            optimizer.step()
            open_frac = float(state().mean())
            if progress is not None:
                message = f"loss {loss:.3f} nats, {open_frac:.3f} open"
                progress(Progress("mask", step, settings.max_steps, "steps", message))
            if open_frac < settings.open_frac:
                break
    widths = [site.width for site in sites]
    cost = 2.0 * step * len(examples) * settings.num_draws
    details = {"steps": step, "loss_nats": loss, "open_frac": open_frac}
    return LearnedMask(tuple(state().split(widths)), cost, details)


def _drawn(batch: Batch, num_draws: int) -> Batch:
    """Repeat every row, so that each copy meets a mask of its own."""
    if num_draws == 1:
        return batch
    return Batch(
        batch.tokens_BT.repeat_interleave(num_draws, 0), batch.predicts_BT.repeat_interleave(num_draws, 0)
    )
