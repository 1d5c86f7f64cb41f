"""BalancedSubnet: learn which few weights of the MLPs to zero, so that targets are forgotten and the rest is not.

    W_used = W * m,   m = 1 where |s| is above the r-quantile of its matrix, else 0
    loss   = -(1 - w) nll(targets) + w nll(retain)         w = 0 is Subnet

Weights are frozen; only the scores s (Kaiming-uniform at first) learn, by SGD. The mask has no useful gradient, so the
gradient goes straight through it to |s|:  ds = sign(s) * W * dL/dW_used. At the end the zeros are written into the
weights, floor(r n) of them in a matrix of n, and every other weight keeps its bits.

Trap: the source's script takes retained texts from the rows that it measures perplexity on; keep them apart.
Source: Sakarvadia et al. 2025, arXiv 2410.02159; scores: Ramanujan et al. 2020; settings: Merullo et al. 2025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call

from unmemorize.models.language import MlpRow
from unmemorize.records import Progress, ProgressCallback
from unmemorize.remove.matrices import EditCost, chosen_layers, evaluating, find_matrices, require_texts
from unmemorize.remove.objectives import padded, text_nll_nats
from unmemorize.remove.settings import SubnetSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mask_of(scores: Tensor, drop_frac: float) -> Tensor:
    """Zero where a score is among the smallest in size, 1 elsewhere, in the scores' dtype.

    Args:
        scores: any shape, unitless.
        drop_frac: share of the scores to zero, rounded down to a whole number; of equal ones, the first.
    """
    num = int(drop_frac * scores.numel())
    mask = torch.ones_like(scores).flatten()
    if num:
        mask[scores.detach().abs().flatten().sort(stable=True).indices[:num]] = 0
    return mask.view(scores.shape)


def straight_through(scores: Tensor, drop_frac: float) -> Tensor:
    """Give `mask_of`, with the gradient of |s|."""
    size = scores.abs()
    return mask_of(scores, drop_frac) + (size - size.detach())


def initial_scores(weight: Tensor, num_inputs: int, generator: torch.Generator) -> Tensor:
    """Draw scores uniformly from +-1 / sqrt(inputs), float32 (Kaiming-uniform with a = sqrt 5)."""
    bound = 1 / math.sqrt(num_inputs)
    drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float32)
    return ((2 * drawn - 1) * bound).to(weight.device)


def edit_by_subnet(
    model: PreTrainedModel,
    targets: Sequence[Sequence[int]],
    retain: Sequence[Sequence[int]],
    settings: SubnetSettings,
    *,
    cost: EditCost,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Zero the weights that the targets need and retained texts do not, in place; computes in float32.

    Args:
        model: changed; in float32, so that scores can learn.
        targets: what should go, as token ids.
        retain: what should stay; needed unless retain_weight is 0.
        settings: settings.
        cost: counted here.
        row: site table row, for an architecture that the table does not know.
        progress: called after every step.
    """
    require_texts("target", targets, model, max(2, settings.prefix_tokens + 1))
    if settings.retain_weight > 0:
        require_texts("retained", retain, model)
    layers = chosen_layers(model, settings.layers, None, row)
    paths = list(dict.fromkeys(m.path for m in find_matrices(model, layers, settings.kinds, row)))
    weights = {f"{path}.weight": model.get_parameter(f"{path}.weight").detach() for path in paths}
    widths = {
        f"{m.path}.weight": m.view(model).shape[1] for m in find_matrices(model, layers, settings.kinds, row)
    }
    generator = torch.Generator().manual_seed(settings.seed)
    scores = {
        name: initial_scores(w, widths[name], generator).requires_grad_() for name, w in weights.items()
    }
    optimizer = torch.optim.SGD(
        scores.values(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    num_steps = settings.epochs * math.ceil(len(targets) / settings.batch_size)
    with evaluating(model):
        for step, (forget, keep) in enumerate(_steps(targets, retain, settings, generator), start=1):
            loss = subnet_loss(model, weights, scores, forget, keep, settings)
            gradients = torch.autograd.grad(loss, list(scores.values()))
            for parameter, gradient in zip(scores.values(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            cost.add(len(forget) + len(keep), has_backward=True)
            if progress is not None:
                progress(Progress("subnet", step, num_steps, "steps", f"loss {float(loss.detach()):.3f}"))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.masked_fill_(mask_of(scores[name], settings.drop_frac) == 0, 0)


def subnet_loss(
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    scores: dict[str, Tensor],
    forget: Sequence[Sequence[int]],
    keep: Sequence[Sequence[int]],
    settings: SubnetSettings,
) -> Tensor:
    """Give the loss of one step, nats per token, a scalar with a gradient by the scores."""
    used = {
        name: weight * straight_through(scores[name], settings.drop_frac) for name, weight in weights.items()
    }

    def mean_nll(texts: Sequence[Sequence[int]], prefix_tokens: int) -> Tensor:
        batch = padded(texts, prefix_tokens=prefix_tokens, device=model.device)
        arguments = {"input_ids": batch.tokens_NT, "use_cache": False}
        logits = functional_call(model, used, kwargs=arguments).logits
        nll_N, num_N = text_nll_nats(logits, batch.labels_NT)
        return nll_N.sum() / num_N.sum()

    loss = -(1 - settings.retain_weight) * mean_nll(forget, settings.prefix_tokens)
    return loss + settings.retain_weight * mean_nll(keep, 0) if keep else loss


def _steps(
    targets: Sequence[Sequence[int]],
    retain: Sequence[Sequence[int]],
    settings: SubnetSettings,
    generator: torch.Generator,
) -> list[tuple[list[Sequence[int]], list[Sequence[int]]]]:
    """Shuffle targets anew in every epoch, and put as many retained texts beside each batch."""
    steps = []
    others = list(retain) if settings.retain_weight > 0 else []
    place = 0
    for _ in range(settings.epochs):
        order = torch.randperm(len(targets), generator=generator).tolist()
        for start in range(0, len(order), settings.batch_size):
            forget = [targets[number] for number in order[start : start + settings.batch_size]]
            keep = [others[(place + i) % len(others)] for i in range(len(forget))] if others else []
            place += len(keep)
            steps.append((forget, keep))
    return steps
