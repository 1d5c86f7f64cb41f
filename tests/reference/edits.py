"""Literal references of the weight edits: loops over positions, pairs and texts, on matrices written as (out, in).

Nothing of the fast path is shared: inputs and gradients come from a model whose linear layer is replaced by one that
keeps its output as a leaf, matrices are built entry by entry, and losses are sums over tokens in plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Texts = Sequence[Sequence[int]]


def matrix_of(linear: nn.Module, rows: slice = slice(None)) -> Tensor:
    """A copy of a layer's weight as (out, in)."""
    weight = linear.weight.detach()
    return (weight.t() if type(linear).__name__ == "Conv1D" else weight)[rows].clone()


def inputs_and_gradients(
    model: nn.Module, linear: nn.Module, text: Sequence[int], labels: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """(x, g) of a layer at every position but the last; g of the summed loss against `labels`, one a position."""
    seen: list[tuple[Tensor, Tensor]] = []

    def forward(x: Tensor) -> Tensor:
        weight, bias = linear.weight, linear.bias
        out = x @ weight if type(linear).__name__ == "Conv1D" else x @ weight.t()
        out = out if bias is None else out + bias
        leaf = out.detach().requires_grad_()
        seen.append((x.detach().reshape(-1, x.shape[-1]), leaf))
        return leaf

    linear.forward = forward
    try:
        logits = model(input_ids=torch.tensor([list(text)]), use_cache=False).logits[0]
    finally:
        del linear.forward
    loss = torch.zeros(())
    for position in range(len(text) - 1):
        loss = loss - logits[position].log_softmax(-1)[labels[position]]
    ((x, leaf),) = seen
    gradient = torch.autograd.grad(loss, leaf)[0].reshape(-1, leaf.shape[-1])
    return [(x[i].double(), gradient[i].double()) for i in range(len(text) - 1)]


def factors(pairs: Sequence[tuple[Tensor, Tensor]], rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """A and G as means of outer products, one position at a time."""
    first_x, first_g = pairs[0]
    inputs = torch.zeros(len(first_x), len(first_x), dtype=torch.float64)
    gradients = torch.zeros(len(first_g[rows]), len(first_g[rows]), dtype=torch.float64)
    for x, g in pairs:
        inputs += torch.outer(x, x)
        gradients += torch.outer(g[rows], g[rows])
    return inputs / len(pairs), gradients / len(pairs)


def kept(mass: dict[tuple[int, int], float], keep_frac: float) -> set[tuple[int, int]]:
    """Pairs in order of falling mass until their sum reaches a share of the total."""
    total, reached, chosen = sum(mass.values()), 0.0, set()
    for pair in sorted(mass, key=lambda pair: -mass[pair]):
        if keep_frac < 1 and reached >= keep_frac * total:
            break
        chosen.add(pair)
        reached += mass[pair]
    return chosen


def curvature_edit(
    weight: Tensor,
    inputs: Tensor,
    gradients: Tensor,
    keep_frac: float,
    protect: tuple[Tensor, Tensor] | None = None,
    protect_frac: float = 1.0,
) -> Tensor:
    """W' as the sum of the rank-one components that are kept."""
    mass_in, right = torch.linalg.eigh(inputs)
    mass_out, left = torch.linalg.eigh(gradients)
    places = [(i, j) for i in range(len(mass_out)) for j in range(len(mass_in))]
    chosen = kept(
        {(i, j): max(0, float(mass_out[i])) * max(0, float(mass_in[j])) for i, j in places}, keep_frac
    )
    if protect is not None:
        second: dict[tuple[int, int], float] = {}
        for i, j in places:
            out = float(left[:, i] @ protect[1] @ left[:, i])
            second[i, j] = max(0, out) * max(0, float(right[:, j] @ protect[0] @ right[:, j]))
        chosen |= kept(second, protect_frac)
    edited = torch.zeros_like(weight, dtype=torch.float64)
    for i, j in chosen:
        edited += (left[:, i] @ weight.double() @ right[:, j]) * torch.outer(left[:, i], right[:, j])
    return edited


def singular_edit(weight: Tensor, num_dropped: int) -> Tensor:
    """W' as the sum of the largest singular components, from the eigenvectors of W^T W."""
    values, right = torch.linalg.eigh(weight.double().T @ weight.double())
    order = values.argsort(descending=True)[: min(weight.shape) - num_dropped]
    edited = torch.zeros_like(weight, dtype=torch.float64)
    for place in order.tolist():
        v = right[:, place]
        edited += torch.outer(weight.double() @ v, v)
    return edited


def text_nll(model: nn.Module, text: Sequence[int], prefix_tokens: int = 0) -> Tensor:
    """-log p of a text's tokens after the prefix (after its first token, if there is none), one at a time, nats."""
    logits = model(input_ids=torch.tensor([list(text)]), use_cache=False).logits[0]
    total = torch.zeros(())
    for position in range(max(1, prefix_tokens), len(text)):
        scores = logits[position - 1]
        total = total + (scores.exp().sum().log() - scores[text[position]])
    return total


def mean_nll(model: nn.Module, texts: Texts, prefix_tokens: int = 0) -> Tensor:
    """Mean over the tokens of all texts, nats per token."""
    num = sum(len(text) - max(1, prefix_tokens) for text in texts)
    return torch.stack([text_nll(model, text, prefix_tokens) for text in texts]).sum() / num


def ascent_loss(forget: float, retain: float, gamma: float, alpha: float) -> float:
    """Gradient difference; gradient ascent with alpha = 0."""
    return -gamma * forget + alpha * retain


def npo_loss(log_probabilities: Sequence[float], before: Sequence[float], beta: float) -> float:
    """NPO from summed log-probabilities of texts."""
    terms = []
    for now, then in zip(log_probabilities, before, strict=True):
        ratio = math.exp(now - then)
        terms.append(2 / beta * math.log(1 + ratio**beta))
    return sum(terms) / len(terms)


def simnpo_loss(nll: Sequence[float], tokens: Sequence[int], beta: float, delta: float) -> float:
    """SimNPO from summed losses and lengths."""
    terms = []
    for total, length in zip(nll, tokens, strict=True):
        terms.append(-2 / beta * math.log(1 / (1 + math.exp(-beta * (total / length - delta)))))
    return sum(terms) / len(terms)


def subnet_gradient(
    model: nn.Module,
    weights: dict[str, Tensor],
    scores: dict[str, Tensor],
    forget: Texts,
    keep: Texts,
    retain_weight: float,
    drop_frac: float,
) -> dict[str, Tensor]:
    """d loss / d scores: sign(s) * W * gradient of the loss by the masked weight, entry by entry."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            size = scores[name].abs().flatten().tolist()
            gone = sorted(range(len(size)), key=lambda place: size[place])[: int(drop_frac * len(size))]
            masked = weight.clone().flatten()
            for place in gone:
                masked[place] = 0
            parameters[name].copy_(masked.view(weight.shape))
    loss = -(1 - retain_weight) * mean_nll(model, forget) + retain_weight * mean_nll(model, keep)
    found = torch.autograd.grad(loss, [parameters[name] for name in weights])
    model.load_state_dict(state)
    result: dict[str, Tensor] = {}
    for (name, weight), gradient in zip(weights.items(), found, strict=True):
        flat = torch.zeros(weight.numel())
        for place in range(weight.numel()):
            sign = 1.0 if scores[name].flatten()[place] > 0 else -1.0
            flat[place] = sign * weight.flatten()[place] * gradient.flatten()[place]
        result[name] = flat.view(weight.shape)
    return result
