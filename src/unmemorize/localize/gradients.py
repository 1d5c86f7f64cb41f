"""Localizers of language models that need passes but no training: activations, gradients, and leaving out.

Every function returns scores of shape (F,) per site, averaged over the examples, and its cost in forward-equivalents.
The formulas are in `attribution.py`; here they are wired to forward passes through gates, so that any model with a row
in the site table is served alike.

Source: Chang, Thomason and Jia 2024; gradient by the gate, leaving out many neurons a pass, and integrated gradients
over all positions together: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unmemorize.corpus.memorized import MemorizedExample
from unmemorize.gates import capture, gated, is_transposed, module_at
from unmemorize.localize.attribution import (
    Reading,
    activation_scores,
    integrated_scores,
    interpolation_points,
)
from unmemorize.localize.suffix import (
    Batch,
    batches,
    device_of,
    frozen,
    gradient_scale,
    make_batch,
    suffix_log_probabilities,
    suffix_losses,
)
from unmemorize.neurons import Site

Scored = tuple[tuple[Tensor, ...], float]
"""Scores of shape (F,) per site, float32, and forward-equivalents."""

Tick = Callable[[int, int], None]
"""(done, total)."""


def output_norms(model: nn.Module, sites: Sequence[Site]) -> tuple[Tensor, ...]:
    """Return the norm of the vector that each neuron writes, shape (F,) per site, float32, in units of the weights."""
    norms = []
    for site in sites:
        linear = module_at(model, site.path)
        weight = linear.weight
        assert isinstance(weight, Tensor)
        columns = weight.detach() if is_transposed(linear) else weight.detach().t()
        norms.append(columns[site.start : site.start + site.width].float().norm(dim=1))
    return tuple(norms)


@torch.no_grad()
def activations(
    model: nn.Module,
    sites: Sequence[Site],
    examples: Sequence[MemorizedExample],
    *,
    batch_size: int,
    reading: Reading = "absolute",
    tick: Tick | None = None,
) -> Scored:
    """Score by activations at the positions that predict the suffix: one forward pass."""
    norms = output_norms(model, sites)
    totals = [torch.zeros(site.width, device=norm.device) for site, norm in zip(sites, norms, strict=True)]
    with frozen(model):
        for start, batch in batches(examples, batch_size, device_of(model)):
            with capture(model, sites) as seen:
                model(input_ids=batch.tokens_BT, use_cache=False)
            for total, site, norm in zip(totals, sites, norms, strict=True):
                values = seen[site][0].reshape(*batch.tokens_BT.shape, -1)
                positions = batch.predicts_BT.to(values.device)
                total += activation_scores(values, positions, norm, reading).sum(0)
            _report(tick, start + len(batch.tokens_BT), len(examples))
    return tuple(total / len(examples) for total in totals), float(len(examples))


def gradient(
    model: nn.Module,
    sites: Sequence[Site],
    examples: Sequence[MemorizedExample],
    *,
    batch_size: int,
    tick: Tick | None = None,
) -> Scored:
    """Score by minus the derivative of the suffix loss by each neuron's gate: one forward and one backward pass."""
    device = device_of(model)
    totals = [torch.zeros(site.width, device=device) for site in sites]
    with frozen(model):
        for start, batch in batches(examples, batch_size, device):
            for total, part in zip(totals, gate_derivatives(model, sites, batch), strict=True):
                total -= part.sum(0).to(device)
            _report(tick, start + len(batch.tokens_BT), len(examples))
    return tuple(total / len(examples) for total in totals), 2.0 * len(examples)


def gate_derivatives(model: nn.Module, sites: Sequence[Site], batch: Batch) -> list[Tensor]:
    """Return the derivative of each row's loss by a gate on each neuron, open and alike at all positions.

    Returns:
        Shape (B, F) per site, float32, nats per suffix token; call it inside `frozen`.
    """
    scale, rows = gradient_scale(model), len(batch.tokens_BT)
    gates = {
        site: torch.ones(rows, 1, site.width, device=batch.tokens_BT.device, requires_grad=True)
        for site in sites
    }
    with gated(model, gates):
        loss = suffix_losses(model, batch).sum() * scale
    return [part[:, 0] / scale for part in torch.autograd.grad(loss, list(gates.values()))]


def contrast(found: Scored, means: Sequence[Tensor], mean_squares: Sequence[Tensor]) -> Scored:
    """Subtract from the gradient's scores what they are on ordinary texts, and divide by what neurons are worth there.

    Half the mean square of a derivative by a gate is, by the empirical Fisher matrix's diagonal, what the closed gate
    costs an ordinary text. The mean over all neurons is added, so that a neuron that is worth nothing does not win.

    Args:
        found: what `gradient` returns.
        means: mean derivatives on ordinary texts, shape (F,) per site, nats a token.
        mean_squares: mean squared derivatives, same shapes, nats squared.
    """
    scores, cost = found
    typical = torch.cat(list(mean_squares)).mean()
    worth = mean_squares if not typical > 0 else [values / typical for values in mean_squares]
    return tuple(
        (score + mean.to(score)) / (1 + part.to(score))
        for score, mean, part in zip(scores, means, worth, strict=True)
    ), cost


def integrated_gradients(
    model: nn.Module,
    sites: Sequence[Site],
    examples: Sequence[MemorizedExample],
    *,
    batch_size: int,
    num_points: int = 20,
    is_together: bool = False,
    tick: Tick | None = None,
) -> Scored:
    """Score by integrated gradients of the probabilities of suffix tokens, one layer at a time.

    Args:
        model: the model.
        sites: its sites.
        examples: memorized examples.
        batch_size: rows per pass; every point is a row.
        num_points: points from off to on.
        is_together: False: the activations of one position are scaled, everything before it stays, and the token that
            it predicts is looked at (the paper's; one set of passes a suffix token). True: those of all positions that
            predict the suffix are scaled together, and the sum over its tokens is looked at (cheaper by the number of
            suffix tokens; another quantity, since a scaled position changes later ones too).
        tick: called after each example and layer.
    """
    points = interpolation_points(num_points).to(device_of(model))
    totals = [torch.zeros(site.width, device=points.device) for site in sites]
    cost, done = 0.0, 0
    with frozen(model):
        for example in examples:
            whole = make_batch([example], points.device)
            places = whole.predicts_BT[0].nonzero().flatten().tolist()
            groups = [places] if is_together else [[place] for place in places]
            for total, site in zip(totals, sites, strict=True):
                for group in groups:
                    total += _integrated(model, site, whole, group, points, batch_size) / len(groups)
                    cost += 2.0 * num_points * (group[-1] + 1) / len(example.tokens)
                done += 1
                _report(tick, done, len(examples) * len(sites))
    return tuple(total / len(examples) for total in totals), cost


def _integrated(
    model: nn.Module, site: Site, whole: Batch, places: list[int], points: Tensor, batch_size: int
) -> Tensor:
    """Integrate over the activations at some positions of one example and site; shape (F,)."""
    scale, first, last = gradient_scale(model), places[0], places[-1]
    short = Batch(whole.tokens_BT[:, : last + 2], whole.predicts_BT[:, : last + 2].clone())
    short.predicts_BT[:, :first] = False
    short.predicts_BT[:, last + 1 :] = False
    parts = []
    for some in points.split(batch_size):
        scaled = some.view(-1, 1, 1).expand(-1, len(places), site.width).clone().requires_grad_()
        before = scaled.new_ones(len(some), first, site.width)
        after = scaled.new_ones(len(some), 1, site.width)
        with gated(model, {site: torch.cat([before, scaled, after], dim=1)}):
            probability = suffix_log_probabilities(model, short.repeated(len(some))).exp().sum()
        (gradients,) = torch.autograd.grad(probability * scale, scaled)
        parts.append(gradients / scale)
    return integrated_scores(torch.cat(parts), points)


@torch.no_grad()
def zero_out(
    model: nn.Module,
    sites: Sequence[Site],
    examples: Sequence[MemorizedExample],
    *,
    batch_size: int,
    candidates: Sequence[tuple[int, int]] | None = None,
    tick: Tick | None = None,
) -> Scored:
    """Score by the rise of the suffix loss when a neuron is off at all positions: one forward pass a neuron.

    Args:
        model: the model.
        sites: its sites.
        examples: memorized examples.
        batch_size: rows per pass; every row has another neuron off.
        candidates: (number of the site, index) of the neurons to try, by default all; the others get minus infinity.
        tick: called after each pass.
    """
    device = device_of(model)
    everything = [(layer, index) for layer, site in enumerate(sites) for index in range(site.width)]
    by_site: dict[int, list[int]] = {}
    for layer, index in everything if candidates is None else candidates:
        by_site.setdefault(layer, []).append(index)
    totals = [torch.full((site.width,), -torch.inf, device=device) for site in sites]
    for layer, indices in by_site.items():
        totals[layer][indices] = 0.0
    num_tried, done = sum(map(len, by_site.values())), 0
    with frozen(model):
        for example in examples:
            batch = make_batch([example], device)
            plain = suffix_losses(model, batch)
            for layer, indices in by_site.items():
                for some in torch.tensor(indices, device=device).split(batch_size):
                    gates = torch.ones(len(some), 1, sites[layer].width, device=device)
                    gates[torch.arange(len(some)), 0, some] = 0.0
                    with gated(model, {sites[layer]: gates}):
                        totals[layer][some] += suffix_losses(model, batch.repeated(len(some))) - plain
                    done += len(some)
                    _report(tick, done, num_tried * len(examples))
    return tuple(total / len(examples) for total in totals), float((num_tried + 1) * len(examples))


def _report(tick: Tick | None, done: int, total: int) -> None:
    if tick is not None:
        tick(done, total)
