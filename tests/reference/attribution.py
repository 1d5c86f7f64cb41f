"""Slow, literal versions of the localizers' formulas: loops over neurons, positions and points, one example each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Change = Callable[[int, Tensor], Tensor]
"""(number of the layer, its activations of shape (T, F)) -> activations to go on with."""

Example = tuple[Sequence[int], Sequence[int]]
"""(prefix, suffix)."""


def logits(model: nn.Module, downs: Sequence[nn.Module], tokens: Sequence[int], change: Change) -> Tensor:
    """Run one sequence, with the input of every last projection changed; shape (T, V)."""
    handles = []
    for layer, down in enumerate(downs):

        def hook(_: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> tuple[Tensor, ...]:
            values = args[0].reshape(len(tokens), -1)
            return (change(layer, values).reshape(args[0].shape),)

        handles.append(down.register_forward_pre_hook(hook))
    try:
        return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def suffix_loss(all_logits: Tensor, example: Example) -> Tensor:
    """Mean of -log p over the suffix, token by token."""
    prefix, suffix = example
    total = torch.zeros(())
    for place, token in enumerate(suffix):
        row = all_logits[len(prefix) - 1 + place]
        total = total - (row[token] - torch.logsumexp(row, 0))
    return total / len(suffix)


def activations_at(model: nn.Module, downs: Sequence[nn.Module], tokens: Sequence[int]) -> list[Tensor]:
    seen: list[Tensor] = [torch.empty(0)] * len(downs)

    def keep(layer: int, values: Tensor) -> Tensor:
        seen[layer] = values.detach().clone()
        return values

    with torch.no_grad():
        logits(model, downs, tokens, keep)
    return seen


def written_vector(down: nn.Module, neuron: int) -> Tensor:
    """What a neuron adds to the output of its MLP per unit of activation."""
    weight = down.weight.detach()
    return weight[neuron] if type(down).__name__ == "Conv1D" else weight[:, neuron]


def activation_scores(
    model: nn.Module, downs: Sequence[nn.Module], example: Example, *, is_signed: bool
) -> list[list[float]]:
    prefix, suffix = example
    seen = activations_at(model, downs, [*prefix, *suffix])
    scores = []
    for layer, down in enumerate(downs):
        row = []
        for neuron in range(seen[layer].shape[1]):
            values = [float(seen[layer][len(prefix) - 1 + t, neuron]) for t in range(len(suffix))]
            total = abs(sum(values)) if is_signed else sum(abs(value) for value in values)
            mean = total / len(values)
            row.append(mean * math.sqrt(float((written_vector(down, neuron) ** 2).sum())))
        scores.append(row)
    return scores


def gradient_scores(model: nn.Module, downs: Sequence[nn.Module], example: Example) -> list[list[float]]:
    """Minus the sum over positions of activation times derivative of the loss by it, layer by layer."""
    prefix, suffix = example
    tokens = [*prefix, *suffix]
    scores = []
    for wanted in range(len(downs)):
        leaf: list[Tensor] = []

        def change(layer: int, values: Tensor, wanted: int = wanted, leaf: list[Tensor] = leaf) -> Tensor:
            if layer != wanted:
                return values
            leaf.append(values.detach().clone().requires_grad_())
            return leaf[0]

        loss = suffix_loss(logits(model, downs, tokens, change), example)
        (slope,) = torch.autograd.grad(loss, leaf[0])
        row = []
        for neuron in range(slope.shape[1]):
            row.append(
                -sum(float(leaf[0][t, neuron].detach() * slope[t, neuron]) for t in range(len(tokens)))
            )
        scores.append(row)
    return scores


def contrast_scores(
    model: nn.Module, downs: Sequence[nn.Module], example: Example, texts: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Gradient score less its mean over texts, over one plus its mean square in units of the mean over all neurons."""
    own = gradient_scores(model, downs, example)
    ordinary = [gradient_scores(model, downs, (text[:1], text[1:])) for text in texts]
    places = [(layer, neuron) for layer, row in enumerate(own) for neuron in range(len(row))]
    squares = {(i, j): sum(one[i][j] ** 2 for one in ordinary) / len(texts) for i, j in places}
    typical = sum(squares.values()) / len(squares)
    for i, j in places:
        usual = sum(one[i][j] for one in ordinary) / len(texts)
        own[i][j] = (own[i][j] - usual) / (1 + squares[i, j] / typical)
    return own


def integrated_scores(
    model: nn.Module, downs: Sequence[nn.Module], example: Example, num_points: int, *, is_together: bool
) -> list[list[float]]:
    """Integrated gradients of suffix probabilities, one layer, position and point at a time."""
    prefix, suffix = example
    whole = [*prefix, *suffix]
    seen = activations_at(model, downs, whole)
    places = [len(prefix) - 1 + t for t in range(len(suffix))]
    groups = [places] if is_together else [[place] for place in places]
    scores = []
    for wanted in range(len(downs)):
        row = [0.0] * seen[wanted].shape[1]
        for group in groups:
            for step in range(num_points):
                alpha = step / (num_points - 1)
                slopes = _slopes(model, downs, whole[: group[-1] + 1], whole, wanted, group, alpha)
                for neuron in range(len(row)):
                    for place in group:
                        part = float(seen[wanted][place, neuron] * slopes[place, neuron])
                        row[neuron] += part / num_points / len(places)
        scores.append(row)
    return scores


def _slopes(
    model: nn.Module,
    downs: Sequence[nn.Module],
    tokens: Sequence[int],
    whole: Sequence[int],
    wanted: int,
    group: Sequence[int],
    alpha: float,
) -> Tensor:
    """Derivative of the summed probabilities by activations, with those of the group scaled by alpha."""
    leaf: list[Tensor] = []

    def change(layer: int, values: Tensor) -> Tensor:
        if layer != wanted:
            return values
        scaled = values.detach().clone()
        for place in group:
            scaled[place] *= alpha
        leaf.append(scaled.requires_grad_())
        return leaf[0]

    rows = logits(model, downs, tokens, change)
    probability = sum(rows[place].softmax(0)[whole[place + 1]] for place in group)
    (slopes,) = torch.autograd.grad(probability, leaf[0])
    return slopes


def zero_out_scores(model: nn.Module, downs: Sequence[nn.Module], example: Example) -> list[list[float]]:
    """Loss with a neuron off at all positions, minus loss as it is; one run a neuron."""
    tokens = [*example[0], *example[1]]
    with torch.no_grad():
        plain = suffix_loss(logits(model, downs, tokens, lambda _, values: values), example)
        scores = []
        for wanted, down in enumerate(downs):
            width = activations_at(model, downs, tokens)[wanted].shape[1]
            row = []
            for neuron in range(width):

                def off(layer: int, values: Tensor, wanted: int = wanted, neuron: int = neuron) -> Tensor:
                    values = values.clone()
                    if layer == wanted:
                        values[:, neuron] = 0
                    return values

                row.append(float(suffix_loss(logits(model, downs, tokens, off), example) - plain))
            scores.append(row)
            assert down is downs[wanted]
    return scores


class Adam:
    """The update rule as published, on one tensor, with its default constants."""

    def __init__(self, rate: float) -> None:
        self.rate, self.step = rate, 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def updated(self, value: Tensor, slope: Tensor) -> Tensor:
        self.step += 1
        self.first = 0.9 * self.first + 0.1 * slope
        self.second = 0.999 * self.second + 0.001 * slope**2
        first = self.first / (1 - 0.9**self.step)
        second = self.second / (1 - 0.999**self.step)
        return value - self.rate * first / (second.sqrt() + 1e-8)


def slimming_scores(
    model: nn.Module,
    downs: Sequence[nn.Module],
    example: Example,
    *,
    price: float,
    rate: float,
    steps: int,
    open_frac: float,
) -> list[Tensor]:
    tokens = [*example[0], *example[1]]
    masks = [torch.ones(values.shape[1]) for values in activations_at(model, downs, tokens)]
    rules = [Adam(rate) for _ in masks]
    for _ in range(steps):
        leaves = [mask.clone().requires_grad_() for mask in masks]
        run = logits(model, downs, tokens, lambda i, values, m=leaves: values * m[i].clamp(0, 1))
        objective = suffix_loss(run, example) + price * sum(leaf.abs().sum() for leaf in leaves)
        slopes = torch.autograd.grad(objective, leaves)
        masks = [rule.updated(m, s) for rule, m, s in zip(rules, masks, slopes, strict=True)]
        if float(torch.cat(masks).clamp(0, 1).mean()) < open_frac:
            break
    return [mask.clamp(0, 1) for mask in masks]


def hard_concrete_scores(
    model: nn.Module,
    downs: Sequence[nn.Module],
    example: Example,
    *,
    price: float,
    rate: float,
    steps: int,
    open_frac: float,
    initial: float,
    beta: float,
    seed: int,
) -> list[Tensor]:
    """Louizos et al., written out: stretched to (-0.1, 1.1), clipped; the price is that of not being zero."""
    tokens = [*example[0], *example[1]]
    share = (initial + 0.1) / 1.2
    start = math.log(share) - math.log(1 - share)
    widths = [values.shape[1] for values in activations_at(model, downs, tokens)]
    logit = [torch.full((width,), start) for width in widths]
    rules = [Adam(rate) for _ in logit]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        leaves = [value.clone().requires_grad_() for value in logit]
        gates = []
        for leaf, width in zip(leaves, widths, strict=True):
            noise = torch.rand(1, 1, width, generator=generator).clamp(1e-6, 1 - 1e-6)[0, 0]
            soft = 1 / (1 + torch.exp(-(torch.log(noise) - torch.log(1 - noise) + leaf) / beta))
            gates.append((soft * 1.2 - 0.1).clamp(0, 1))
        run = logits(model, downs, tokens, lambda i, values, g=gates: values * g[i])
        objective = suffix_loss(run, example)
        for leaf in leaves:
            objective = objective + price * (1 / (1 + torch.exp(-(leaf - beta * math.log(0.1 / 1.1))))).sum()
        slopes = torch.autograd.grad(objective, leaves)
        logit = [rule.updated(value, s) for rule, value, s in zip(rules, logit, slopes, strict=True)]
        if float(torch.cat(logit).sigmoid().mean()) < open_frac:
            break
    return [value.sigmoid() for value in logit]
