"""How much single neurons contribute to a memory: the formulas. Pure mathematics on arrays; knows no model.

With a: activation of a neuron (an input channel of the MLP's last projection), g: a gate that multiplies it, w: the
vector that it writes, L: mean negative log-likelihood of the suffix, P(s): probability of a suffix token,

    activations            mean over t of |a_t|, times ||w||                 ("signed": |mean over t of a_t|)
    gradient               - dL/dg at g = 1 = - sum over t of a_t dL/da_t    (first-order form of zero-out)
    integrated gradients   mean over t of a_t / m times the sum over m points alpha of dP(s_t)/da at alpha a_t
    zero-out               L with the neuron off, minus L
    slimming               min over m of L(clip(m)) + price times sum |m|
    hard concrete          min over logits of E[L(z)] + price times sum P(z > 0), z a stretched, clipped concrete
                           variable

Because d/dg = a d/da, gradients by the gates give every product of gradient and activation in one backward pass.

Source: Chang, Thomason and Jia 2024 (activations, integrated gradients, zero-out, slimming, hard concrete as
localizers); Sundararajan et al. 2017; Liu et al. 2017; Louizos et al. 2018. The gradient by the gate is ours.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from unmemorize.errors import ConfigError

Reading = Literal["absolute", "signed"]

STRETCH = 0.1
"""How far the concrete variable is stretched beyond 0 and 1 before it is clipped."""


def activation_scores(
    values_BTF: Tensor, positions_BT: Tensor, norms_F: Tensor, reading: Reading = "absolute"
) -> Tensor:
    """Score neurons by how much they write on average.

    Args:
        values_BTF: activations, shape (B, T, F), in their own unit.
        positions_BT: positions that count, shape (B, T), bool, at least one a row.
        norms_F: norms of the vectors that the neurons write, shape (F,).
        reading: "absolute" averages |a| (the paper); "signed" takes the absolute value of the average (the released
            code), so that a neuron whose sign alternates vanishes.

    Returns:
        Shape (B, F), float32.
    """
    values, weight = values_BTF.float(), positions_BT.float().unsqueeze(-1)
    parts = values.abs() if reading == "absolute" else values
    return (parts * weight).sum(1).abs() / weight.sum(1) * norms_F.float()


def interpolation_points(num_points: int) -> Tensor:
    """Return the points of integrated gradients: equally spaced from 0 to 1, both included; shape (num_points,)."""
    if num_points < 2:
        raise ConfigError(f"integrated gradients over {num_points} points; expected 2 or more")
    return torch.linspace(0.0, 1.0, num_points)


def integrated_scores(gradients_APF: Tensor, points_A: Tensor) -> Tensor:
    """Integrate gradients by the gates along the path from off to on.

    The gate of point alpha is alpha itself, and d/d(gate) = a d/da, so the factor a is contained already.

    Args:
        gradients_APF: derivatives of a probability by the gates at each point, shape (A, P, F): points, positions,
            neurons.
        points_A: the points, shape (A,), unitless; only their number enters, all weigh the same.

    Returns:
        Mean over positions, shape (F,), float32, as a probability.
    """
    return gradients_APF.float().sum(0).mean(0) / len(points_A)


def initial_logit(open_frac: float) -> float:
    """Return the logit at which a gate without noise is open by a given fraction, 0 to 1."""
    if not -STRETCH < open_frac < 1 + STRETCH:
        raise ConfigError(f"gates start open by {open_frac}, expected a fraction from 0 to 1")
    share = (open_frac + STRETCH) / (1 + 2 * STRETCH)
    return math.log(share / (1 - share))


def concrete_gates(logits: Tensor, uniform: Tensor, sharpness: float) -> Tensor:
    """Draw gates: a concrete variable, stretched to (-0.1, 1.1) and clipped to [0, 1], so that exact 0 and 1 occur.

    Args:
        logits: any shape, unitless.
        uniform: noise strictly between 0 and 1, same shape.
        sharpness: beta; the smaller, the closer to a coin.

    Source: Louizos et al. 2018, equations 10 and 11.
    """
    soft = torch.sigmoid((uniform.log() - (1 - uniform).log() + logits) / sharpness)
    return (soft * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def concrete_open(logits: Tensor, sharpness: float) -> Tensor:
    """Return each gate's probability not to be 0, any shape.

    Source: Louizos et al. 2018, equation 12.
    """
    return torch.sigmoid(logits - sharpness * math.log(STRETCH / (1 + STRETCH)))
