"""A closed-form, low-rank edit of linear layers: quiet on memorized inputs, unchanged on ordinary ones. Pure.

Let the columns of X be n memorized inputs of a layer with weight W (rows are neurons), C the mean of x x^T over
ordinary inputs, and M what the layer should see in place of X: 0, or ordinary inputs. The new weight minimizes

    s ||W' X - W M||^2  +  tr((W' - W) A (W' - W)^T),        A = C + ridge * mean(diag C) * I

The first term asks for the values of M at the memorized inputs, the second is the squared change of ordinary values
(and, through the ridge, of everything never seen). Setting the derivative to zero gives

    (W' - W) (A + s X X^T) = -s W (X - M) X^T

With A = L L^T, Y = L^-1 X and the eigenvectors P and eigenvalues l of Y Y^T this is

    W' = W (I - left right),    left = (X - M) X^T L^-T P f(l),    right = P^T L^-1,    f(l) = s / (1 + s l)

so that the change does not depend on W: it acts as a correction of the input, its rank is at most n, and every row is
edited by itself (an edit of some rows equals those rows of the full edit). For M = 0 and one memorized input x its
value is multiplied by exactly 1 / (1 + s x^T A^-1 x); inputs that are orthogonal to A^-1 X do not change at all.
An infinite s makes the first term a constraint, f(l) = 1 / l: W' X = W M.

Only X X^T and (X - M) X^T enter, so memorized inputs can be streamed. Biases are left alone. All in float64.

Source: ours; the two-term objective is that of closed-form model editing (MEMIT, unified concept editing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, ShapeMismatch


@dataclass(frozen=True, slots=True)
class Memorized:
    """What has to be known of n memorized inputs X and of what the layer should see in their place, M.

    Attributes:
        inputs: X X^T, shape (D, D), float64, in squared units of the input.
        crossed: (X - M) X^T, same shape and unit; equal to `inputs` if M = 0.
        surplus: (X - M) (X - M)^T, same shape and unit.
        count: n, an upper bound of the edit's rank.
    """

    inputs: Tensor
    crossed: Tensor
    surplus: Tensor
    count: int

    @classmethod
    def of(cls, inputs: Tensor, wanted: Tensor | None = None) -> Memorized:
        """Take the moments of inputs (n, D) and of what should be seen instead (n, D; zeros if None)."""
        inputs = inputs.detach().double().cpu()
        surplus = inputs if wanted is None else inputs - wanted.detach().double().cpu()
        return cls(inputs.T @ inputs, surplus.T @ inputs, surplus.T @ surplus, len(inputs))

    def __add__(self, other: Memorized) -> Memorized:
        return Memorized(
            self.inputs + other.inputs,
            self.crossed + other.crossed,
            self.surplus + other.surplus,
            self.count + other.count,
        )


@dataclass(frozen=True, slots=True)
class Correction:
    """A low-rank correction of a layer's input; the weight becomes W - (W left) right.

    Attributes:
        left: shape (D, r), float64.
        right: shape (r, D), float64.
        shrink_frac: what is left of each memorized direction if M = 0, shape (r,), 0 to 1; 1 is untouched.
    """

    left: Tensor
    right: Tensor
    shrink_frac: Tensor

    @property
    def rank(self) -> int:
        """Number of directions that are changed."""
        return int(self.left.shape[1])

    def applied(self, weight: Tensor) -> Tensor:
        """Return edited rows.

        Args:
            weight: shape (F, D), any floating dtype and device.

        Returns:
            Same shape, dtype and device; computed in float64 and rounded once.
        """
        if self.rank == 0:
            return weight.detach().clone()
        exact = weight.detach().double().cpu()
        return (exact - (exact @ self.left) @ self.right).to(weight)


def correction(memorized: Memorized, ordinary: Tensor, *, strength: float, ridge_frac: float) -> Correction:
    """Solve for the edit.

    Args:
        memorized: moments of the memorized inputs.
        ordinary: C, shape (D, D), in squared units of the input.
        strength: s, unitless, from 0 to infinity: the squared error at one memorized input counts s times the mean
            squared change of ordinary values.
        ridge_frac: ridge as a fraction of the mean of C's diagonal, above 0.

    Raises:
        ConfigError: if strength or ridge are out of range, or C is zero.
        ShapeMismatch: if the matrices differ in shape.

    Source: ours.
    """
    if not strength >= 0 or not (ridge_frac > 0 and math.isfinite(ridge_frac)):
        raise ConfigError(f"strength {strength} and ridge {ridge_frac}: expected strength >= 0 and ridge > 0")
    if memorized.inputs.shape != ordinary.shape:
        shapes = f"{tuple(memorized.inputs.shape)} and {tuple(ordinary.shape)}"
        raise ShapeMismatch(
            f"second moments of shapes {shapes} do not fit together; collect them on one model"
        )
    ordinary = ordinary.double().cpu()
    width = len(ordinary)
    ridge = ridge_frac * float(ordinary.diagonal().mean())
    if not ridge > 0:
        raise ConfigError("ordinary second moments are zero; collect them from captions with words")
    lower = torch.linalg.cholesky(ordinary + ridge * torch.eye(width, dtype=torch.float64))
    half = torch.linalg.solve_triangular(lower, memorized.inputs, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.T, upper=False)
    values, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
    order = values.argsort(descending=True)[: min(memorized.count, width)]
    floor = width * torch.finfo(torch.float64).eps * float(values.max().clamp(min=0))
    order = order[values[order] > floor] if strength > 0 else order[:0]
    values, vectors = values[order], vectors[:, order]
    factor = 1 / values if math.isinf(strength) else strength / (1 + strength * values)
    crossed = torch.linalg.solve_triangular(lower, memorized.crossed.T, upper=False).T
    right = torch.linalg.solve_triangular(lower.T, vectors, upper=True).T
    return Correction(crossed @ vectors * factor, right, 1 - factor * values)


def drift_frac(before: Tensor, after: Tensor, ordinary: Tensor) -> float:
    """Return the root mean square change of ordinary values, as a fraction of the values' root mean square.

    Args:
        before: weight, shape (F, D).
        after: edited weight, same shape.
        ordinary: C, shape (D, D).

    Returns:
        sqrt(tr(E C E^T) / tr(W C W^T)) with E = after - before, unitless, at least 0; 0 where W is zero.

    Source: ours.
    """
    before, after = before.double().cpu(), after.double().cpu()
    change = after - before
    total = float(((before @ ordinary) * before).sum())
    return math.sqrt(max(float(((change @ ordinary) * change).sum()), 0.0) / total) if total > 0 else 0.0


def kept_frac(before: Tensor, after: Tensor, memorized: Memorized) -> float:
    """Return how far memorized values are from what they should be, as a fraction of how far they were.

    Args:
        before: weight, shape (F, D).
        after: edited weight, same shape.
        memorized: moments of the memorized inputs and of what should be seen in their place.

    Returns:
        ||W' X - W M|| / ||W X - W M||, unitless, at least 0; 1 where nothing was there.

    Source: ours.
    """
    before, after = before.double().cpu(), after.double().cpu()
    change = after - before
    then = float(((before @ memorized.surplus) * before).sum())
    mixed = 2 * float(((before @ memorized.crossed) * change).sum())
    moved = float(((change @ memorized.inputs) * change).sum())
    return math.sqrt(max(then + mixed + moved, 0.0) / then) if then > 0 else 1.0
