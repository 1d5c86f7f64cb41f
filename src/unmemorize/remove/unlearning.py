"""Unlearning by fine-tuning: gradient ascent, gradient difference, NPO, SimNPO, under one budget of perplexity.

Each step takes a batch of targets and as many retained texts. The loss is the objective's (`objectives.py`), the
optimizer AdamW. Part of the retained texts is never trained on: when their perplexity has risen by the budget, the
last weights within it are put back and the loop ends. Without a budget, ascent ends when the model is destroyed.

NPO's reference model is never run beside the model: its losses on the targets are computed once, before.

Not done: low-rank adapters, sharded training; `edit` gives a plain model, and larger ones belong into one's own loop.
Source: see `objectives.py`; the budget is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError
from unmemorize.models.language import MlpRow
from unmemorize.records import Progress, ProgressCallback
from unmemorize.remove.matrices import (
    EditCost,
    batches,
    chosen_layers,
    evaluating,
    find_matrices,
    require_texts,
)
from unmemorize.remove.objectives import Objective, forget_scale, forget_terms, padded, text_nll_nats
from unmemorize.remove.settings import KINDS, UnlearningSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Texts = Sequence[Sequence[int]]


def unlearn(
    model: PreTrainedModel,
    targets: Texts,
    retain: Texts,
    objective: Objective,
    settings: UnlearningSettings,
    *,
    cost: EditCost,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Fine-tune a model away from targets, in place; computes in the model's dtype, which should be float32.

    Args:
        model: changed.
        targets: what should go, as token ids.
        retain: what should stay; its last part is kept back for the budget.
        objective: which.
        settings: settings.
        cost: counted here.
        row: site table row, for an architecture that the table does not know.
        progress: called after every step.

    Returns:
        `steps` taken and kept; `is_stopped` by the budget; `perplexity_rise_frac` of the texts kept back, or None.

    Raises:
        DataError: if texts are missing or do not fit.
        ConfigError: if the loss is no number and there is no budget to go back to.
    """
    require_texts("target", targets, model, max(2, settings.prefix_tokens + 1))
    trained, kept_back = _split(retain, objective, settings, model)
    parameters = _trained_parameters(model, settings, row)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = list(_steps(targets, trained, settings))
    with evaluating(model):
        reference = _losses(model, targets, settings, cost) if objective == "npo" else None
        budget = _Budget(model, parameters, kept_back, settings, cost)
        taken = 0
        for number, (forget, keep) in enumerate(steps, start=1):
            loss = _backward(model, targets, forget, keep, objective, settings, reference, cost)
            if not math.isfinite(loss) and not kept_back:
                raise ConfigError(f"the loss is {loss} at step {number}; lower learning_rate or set a budget")
            nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            taken = number
            if progress is not None:
                progress(Progress(objective, number, len(steps), "steps", f"loss {loss:.3f}"))
            is_due = number % settings.check_every_steps == 0 or number == len(steps)
            if is_due and kept_back and not budget.holds(number):
                break
    return {
        "steps": budget.steps if kept_back else taken,
        "is_stopped": budget.is_exceeded,
        "perplexity_rise_frac": budget.rise_frac if kept_back else None,
    }


class _Budget:
    """The perplexity of texts that are not trained on, and the last weights that stayed within it."""

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: list[nn.Parameter],
        kept_back: Texts,
        settings: UnlearningSettings,
        cost: EditCost,
    ) -> None:
        self._model, self._parameters, self._texts = model, parameters, kept_back
        self._settings, self._cost = settings, cost
        self.steps, self.rise_frac, self.is_exceeded = 0, 0.0, False
        if kept_back:
            self._before = self._mean_nats()
            self._weights = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def holds(self, step: int) -> bool:
        """Look at the budget; within it remember the weights, beyond it put the last ones back."""
        rise_frac = math.expm1(min(self._mean_nats() - self._before, 100.0))
        limit = self._settings.perplexity_budget_frac
        if limit is not None and not rise_frac <= limit:  # also when it is no number
            for parameter, weight in zip(self._parameters, self._weights, strict=True):
                parameter.copy_(weight)
            self.is_exceeded = True
            return False
        for parameter, weight in zip(self._parameters, self._weights, strict=True):
            weight.copy_(parameter)
        self.steps, self.rise_frac = step, rise_frac
        return True

    @torch.no_grad()
    def _mean_nats(self) -> float:
        total, num_tokens = 0.0, 0
        for texts in batches(self._texts, self._settings.micro_size):
            nll_N, num_N = _nll(self._model, texts, 0)
            total += float(nll_N.double().sum())
            num_tokens += int(num_N.sum())
            self._cost.add(len(texts))
        return total / num_tokens


def _backward(
    model: PreTrainedModel,
    targets: Texts,
    forget: Sequence[int],
    keep: Texts,
    objective: Objective,
    settings: UnlearningSettings,
    reference: Tensor | None,
    cost: EditCost,
) -> float:
    """Add up the gradient of one step; returns its loss."""
    prefix = settings.prefix_tokens
    num_tokens_N = torch.tensor([len(targets[n]) - max(1, prefix) for n in forget])
    scale = settings.forget_weight_of(objective) * forget_scale(objective, num_tokens_N)
    total = 0.0
    for numbers in (forget[i : i + settings.micro_size] for i in range(0, len(forget), settings.micro_size)):
        nll_N, num_N = _nll(model, [targets[n] for n in numbers], prefix)
        terms_N = forget_terms(
            objective,
            nll_N,
            num_N,
            reference_nll_N=None if reference is None else reference[list(numbers)].to(nll_N),
            beta=settings.beta_of(objective),
            delta=settings.delta,
        )
        total += _accumulate(terms_N.sum() * scale)
        cost.add(len(numbers), has_backward=True)
    num_kept = sum(len(text) - 1 for text in keep)
    for texts in batches(keep, settings.micro_size):
        nll_N, _ = _nll(model, texts, 0)
        total += _accumulate(nll_N.sum() * (settings.retain_weight / num_kept))
        cost.add(len(texts), has_backward=True)
    return total


def _accumulate(loss: Tensor) -> float:
    loss.backward()
    return float(loss.detach())


def _nll(model: PreTrainedModel, texts: Texts, prefix_tokens: int) -> tuple[Tensor, Tensor]:
    batch = padded(texts, prefix_tokens=prefix_tokens, device=model.device)
    logits = model(input_ids=batch.tokens_NT, use_cache=False).logits
    return text_nll_nats(logits, batch.labels_NT)


@torch.no_grad()
def _losses(model: PreTrainedModel, targets: Texts, settings: UnlearningSettings, cost: EditCost) -> Tensor:
    """Each target's summed loss before unlearning, nats, shape (N,)."""
    parts = []
    for texts in batches(targets, settings.micro_size):
        parts.append(_nll(model, texts, settings.prefix_tokens)[0])
        cost.add(len(texts))
    return torch.cat(parts)


def _split(
    retain: Texts, objective: Objective, settings: UnlearningSettings, model: PreTrainedModel
) -> tuple[Texts, Texts]:
    """Split retained texts into those to train on and those kept back for the budget."""
    is_trained = objective != "gradient-ascent" and settings.retain_weight > 0
    has_budget = settings.perplexity_budget_frac is not None
    if not is_trained and not has_budget:
        return [], []
    require_texts("retained", retain, model)
    num = min(settings.num_check, max(1, len(retain) // 4)) if has_budget else 0
    if num >= len(retain) and is_trained:
        raise ConfigError("one retained text cannot both be trained on and watch the budget; give more")
    cut = len(retain) - num
    return (list(retain[:cut]) if is_trained else []), list(retain[cut:])


def _trained_parameters(
    model: PreTrainedModel, settings: UnlearningSettings, row: MlpRow | None
) -> list[nn.Parameter]:
    """Switch gradients on for what may change, and off for the rest."""
    chosen = {id(parameter) for parameter in model.parameters()}
    if settings.mlp_only:
        layers = chosen_layers(model, None, None, row)
        paths = {matrix.path for matrix in find_matrices(model, layers, KINDS, row)}
        chosen = {id(model.get_parameter(f"{path}.weight")) for path in paths}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return [parameter for parameter in model.parameters() if id(parameter) in chosen]


def _steps(
    targets: Texts, trained: Texts, settings: UnlearningSettings
) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
    """Shuffle targets anew in every epoch, and put as many retained texts beside each batch."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(trained), generator=generator).tolist() if trained else []
    place = 0
    for _ in range(settings.epochs):
        shuffled = torch.randperm(len(targets), generator=generator).tolist()
        for start in range(0, len(shuffled), settings.batch_size):
            forget = shuffled[start : start + settings.batch_size]
            keep = [trained[order[(place + i) % len(order)]] for i in range(len(forget))] if order else []
            place += len(keep)
            yield forget, keep
