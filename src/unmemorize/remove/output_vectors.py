"""Output-vector edit: a few neurons that write a memorized token are made to write a distractor instead.

At one position of a target the true token t wins by a margin m = logit_t - max over other tokens. For each layer let
g be the gradient of logit_t - logit_d by the MLP's output there (d the runner-up), and a the hidden neurons. Neuron n
adds a_n (w_n . g) to the margin, w_n its output vector; the neurons that add most are chosen, over all layers. Their
output vectors change along -g alone, so that each layer's change has rank one:

    w_n' = w_n - c_n g / |g|,     c = s M^-1 b / (b^T M^-1 b),     b_n = a_n |g|,     M = 1 + locality C / mean diag C

which is the smallest change, measured by c^T M c, that lowers the margin by s to first order; C is the second moment
of the chosen neurons on retained positions (between layers 0), so a change is dear where ordinary text would see it.
s starts at what first order asks for and grows by a quarter until the token loses by `margin_nats` in a real pass, or
the change reaches its cap: then the target is left as it was, and counted.

Activations stay, and so does everything that a neuron does to other positions up to the locality term. One token that
loses ends a verbatim recitation; the rest of the text is still in the weights, and a longer prefix brings it back.
Targets are taken in order, and a later edit may undo an earlier one: `num_reached` is counted at the end.

Source: ours, in the spirit of output vector editing, arXiv 2606.18767, whose algorithm we have not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmemorize.gates import capture
from unmemorize.models.language import MlpRow, find_mlps
from unmemorize.neurons import Site
from unmemorize.records import Progress, ProgressCallback
from unmemorize.remove.matrices import (
    EditCost,
    MlpMatrix,
    batches,
    chosen_layers,
    evaluating,
    find_matrices,
    probed,
    require_texts,
)
from unmemorize.remove.objectives import padded
from unmemorize.remove.settings import OutputVectorSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_POSITIONS = 512
"""Retained positions that the locality term is computed on."""
GROWTH = 1.25
"""Factor between two sizes of a change that are tried."""


def smallest_change(effect_N: Tensor, moment_NN: Tensor, shift: float, locality: float) -> Tensor:
    """Give the coefficients of the smallest change that has an effect of `shift` to first order.

    Args:
        effect_N: effect of each coefficient, shape (N,), not all 0.
        moment_NN: second moment of the neurons on text that should not change, shape (N, N), symmetric.
        shift: s, in the unit of the effect.
        locality: weight of the moment, after scaling it to a mean diagonal of 1.

    Returns:
        c, shape (N,), with c . effect = shift.
    """
    scale = moment_NN.diagonal().mean().clamp(min=torch.finfo(moment_NN.dtype).tiny)
    metric_NN = torch.eye(len(effect_N), dtype=effect_N.dtype, device=effect_N.device)
    metric_NN = metric_NN + locality * (moment_NN / scale).to(metric_NN)
    solved_N: Tensor = torch.linalg.solve(metric_NN, effect_N)
    return shift * solved_N / (effect_N @ solved_N)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a target is attacked: its tokens before the position, the true token, the runner-up, the margin."""

    context: list[int]
    token: int
    distractor: int
    margin: float


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Neurons that are changed in one layer, and how: c enters by `coefficients`."""

    matrix: MlpMatrix
    neurons: Tensor
    direction_O: Tensor
    effect_N: Tensor
    vectors_ON: Tensor


def edit_output_vectors(
    model: PreTrainedModel,
    targets: Sequence[Sequence[int]],
    retain: Sequence[Sequence[int]],
    settings: OutputVectorSettings,
    *,
    cost: EditCost,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Change output vectors target by target, in place; computes in the model's dtype, which should be float32.

    Args:
        model: changed.
        targets: texts as token ids, longer than `prefix_tokens`.
        retain: what should stay; needed unless locality is 0.
        settings: settings.
        cost: counted here.
        row: site table row, for an architecture that the table does not know.
        progress: called after every target.

    Returns:
        `num_reached`: targets whose token loses at the end; `num_unreached`; `num_edited`: targets that were changed.
    """
    require_texts("target", targets, model, settings.prefix_tokens + 1)
    mlps = find_mlps(model, row)
    layers = chosen_layers(model, settings.layers, None, row)
    matrices = find_matrices(model, layers, ("down",), row)
    num_edited = 0
    with evaluating(model):
        retained = _retained_neurons(model, [mlps[m.layer].site for m in matrices], retain, settings, cost)
        places = []
        for number, target in enumerate(targets, start=1):
            place = _place(model, target, settings, cost)
            if place is not None:
                places.append(place)
                num_edited += _edit_one(model, place, matrices, retained, settings, cost)
            if progress is not None:
                progress(Progress("output vectors", number, len(targets), "targets", f"{num_edited} changed"))
        open_places = [place for place in places if _margin(model, place, cost) > 0]
    return {
        "num_reached": len(targets) - len(open_places),
        "num_unreached": len(open_places),
        "num_edited": num_edited,
    }


@torch.no_grad()
def _place(
    model: PreTrainedModel, target: Sequence[int], settings: OutputVectorSettings, cost: EditCost
) -> _Place | None:
    """Find the position to attack; None if no suffix token that is asked about wins."""
    tokens = list(target)
    batch = torch.tensor([tokens[:-1]], device=model.device)
    logits_TV = model(input_ids=batch, use_cache=False).logits[0, settings.prefix_tokens - 1 :].float()
    cost.add(1)
    truth_T = torch.tensor(tokens[settings.prefix_tokens :], device=model.device)
    own_T = logits_TV.gather(1, truth_T[:, None]).squeeze(1)
    others_T = logits_TV.scatter(1, truth_T[:, None], -torch.inf).max(1)
    margins_T = own_T - others_T.values
    if settings.position == "first":
        margins_T = margins_T[:1]
    winning = (margins_T > 0).nonzero().flatten()
    if not len(winning):
        return None
    offset = int(winning[margins_T[winning].argmin()])
    return _Place(
        context=tokens[: settings.prefix_tokens + offset],
        token=int(truth_T[offset]),
        distractor=int(others_T.indices[offset]),
        margin=float(margins_T[offset]),
    )


def _edit_one(
    model: PreTrainedModel,
    place: _Place,
    matrices: Sequence[MlpMatrix],
    retained: Mapping[str, Tensor],
    settings: OutputVectorSettings,
    cost: EditCost,
) -> bool:
    """Make the token at one place lose, or leave the model as it was; returns whether it was changed."""
    chosen = _choose(model, place, matrices, settings, cost)
    if not chosen:
        return False
    effect_N = torch.cat([part.effect_N for part in chosen])
    moment_NN = torch.zeros(len(effect_N), len(effect_N), dtype=effect_N.dtype, device=effect_N.device)
    start = 0
    for part in chosen:
        stop = start + len(part.neurons)
        if settings.locality > 0:
            seen_PN = retained[part.matrix.path][:, part.neurons].to(effect_N)
            moment_NN[start:stop, start:stop] = seen_PN.T @ seen_PN / len(seen_PN)
        start = stop
    wanted = place.margin + settings.margin_nats
    unit_N = smallest_change(effect_N, moment_NN, 1.0, settings.locality)
    length = float(torch.cat([part.vectors_ON.flatten() for part in chosen]).norm())
    largest = settings.max_change_frac * length / float(unit_N.norm())
    shift = wanted
    while shift <= largest:
        _write(model, chosen, shift * unit_N)
        if _margin(model, place, cost) <= -settings.margin_nats:
            return True
        shift *= GROWTH
    _write(model, chosen, torch.zeros_like(unit_N))
    return False


def _choose(
    model: PreTrainedModel,
    place: _Place,
    matrices: Sequence[MlpMatrix],
    settings: OutputVectorSettings,
    cost: EditCost,
) -> list[_Chosen]:
    """Choose the neurons that add most to the margin, and the direction of each layer's change."""
    paths = [matrix.path for matrix in matrices]
    tokens = torch.tensor([place.context], device=model.device)
    with torch.enable_grad(), probed(model, paths) as records:
        logits_V = model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        margin = logits_V[place.token] - logits_V[place.distractor]
        gradients = torch.autograd.grad(margin, [records[path].zeros for path in paths])
    cost.add(1, has_backward=True)
    added, parts = [], []
    for matrix, gradient in zip(matrices, gradients, strict=True):
        neurons_F = records[matrix.path].inputs.reshape(len(place.context), -1)[-1]
        gradient_O = gradient.reshape(len(place.context), -1)[-1].to(neurons_F)
        added.append(neurons_F * (matrix.view(model).T @ gradient_O))
        parts.append((matrix, neurons_F, gradient_O))
    sizes = [len(values) for values in added]
    best = torch.cat(added).topk(min(settings.num_neurons, sum(sizes)))
    picked = best.indices[best.values > 0]
    chosen, start = [], 0
    for (matrix, neurons_F, gradient_O), size in zip(parts, sizes, strict=True):
        mine = picked[(picked >= start) & (picked < start + size)].sort().values - start
        start += size
        if not len(mine):
            continue
        length = gradient_O.norm()
        vectors_ON = matrix.view(model)[:, mine].clone()
        chosen.append(_Chosen(matrix, mine, -gradient_O / length, neurons_F[mine] * length, vectors_ON))
    return chosen


@torch.no_grad()
def _write(model: PreTrainedModel, chosen: Sequence[_Chosen], coefficients_N: Tensor) -> None:
    """Write the chosen neurons' output vectors, changed by coefficients; 0 puts the old bits back."""
    start = 0
    for part in chosen:
        mine = coefficients_N[start : start + len(part.neurons)]
        start += len(part.neurons)
        changed_ON = (
            part.vectors_ON + torch.outer(part.direction_O, mine) if bool(mine.any()) else part.vectors_ON
        )
        part.matrix.view(model)[:, part.neurons] = changed_ON


@torch.no_grad()
def _margin(model: PreTrainedModel, place: _Place, cost: EditCost) -> float:
    """By how much the true token beats the best other one, in nats; below 0 it loses."""
    tokens = torch.tensor([place.context], device=model.device)
    logits_V = model(input_ids=tokens, use_cache=False).logits[0, -1].float()
    cost.add(1)
    own = float(logits_V[place.token])
    logits_V[place.token] = -torch.inf
    return own - float(logits_V.max())


@torch.no_grad()
def _retained_neurons(
    model: PreTrainedModel,
    sites: Sequence[Site],
    retain: Sequence[Sequence[int]],
    settings: OutputVectorSettings,
    cost: EditCost,
) -> dict[str, Tensor]:
    """Collect hidden neurons at some retained positions, evenly spread; by path, shape (positions, F)."""
    if settings.locality == 0:
        return {}
    require_texts("retained", retain, model)
    total = sum(len(text) for text in retain)
    step = max(1, total // NUM_POSITIONS)
    parts: dict[str, list[Tensor]] = {site.path: [] for site in sites}
    for texts in batches(retain, settings.batch_size):
        batch = padded(texts, prefix_tokens=0, device=model.device)
        is_text = torch.zeros_like(batch.tokens_NT, dtype=torch.bool)
        for place, text in enumerate(texts):
            is_text[place, : len(text)] = True
        with capture(model, sites) as record:
            model(input_ids=batch.tokens_NT, use_cache=False)
        for site in sites:
            (neurons,) = record[site]
            parts[site.path].append(neurons.reshape(-1, site.width)[is_text.flatten()][::step])
        cost.add(len(texts))
    return {path: torch.cat(rows) for path, rows in parts.items()}
