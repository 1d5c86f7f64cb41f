"""Weight edits in a basis of eigenvectors or singular vectors. Pure mathematics: knows no model.

A matrix W of shape (out, in) is written as a sum of rank-one components, those that carry little are taken away, and
the rest stays as it was:

    curvature   C = U_G^T W U_A     with G = E[g g^T] = U_G diag(mu) U_G^T  and  A = E[x x^T] = U_A diag(lambda) U_A^T
                W' = W - U_G (C * dropped) U_A^T
    singular    W = U diag(s) V^T,  W' = W - U_r diag(s_r) V_r^T  for the r smallest singular values

The mass of the component (i, j) is mu_i lambda_j, its share of the curvature that a Kronecker-factored Hessian sees.
Memorized text lives in components that generic text does not need, so what is dropped takes it along. Subtracting
what is dropped, instead of adding up what is kept, makes an edit that drops nothing the identity bit for bit.

Letters: O outputs, I inputs of a matrix, R retained directions.
Source: the curvature edit after Merullo et al. 2025, arXiv 2510.24256; what protects a second kind of text by union
after a later replication of it; protection by projection is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, ShapeMismatch


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """The two Kronecker factors of one matrix.

    Attributes:
        inputs_II: A = E[x x^T] over positions, x the matrix's input, shape (I, I), float64.
        gradients_OO: G = E[g g^T] over positions, g the gradient of a text's summed loss in nats by the matrix's
            output, shape (O, O), float64.
    """

    inputs_II: Tensor
    gradients_OO: Tensor


def kept_pairs(mass_OI: Tensor, keep_frac: float) -> Tensor:
    """Tell which components carry the most: the fewest whose masses add up to a share of the total.

    Args:
        mass_OI: mass of each component, shape (O, I), at least 0.
        keep_frac: share of the total mass to keep, 0 to 1; 1 keeps every component, also those without mass.

    Returns:
        Flags of shape (O, I). Components that tie with the last one kept are kept as well.
    """
    require_frac("keep_frac", keep_frac)
    if keep_frac >= 1:
        return torch.ones_like(mass_OI, dtype=torch.bool)
    if keep_frac <= 0:
        return torch.zeros_like(mass_OI, dtype=torch.bool)
    ordered = mass_OI.flatten().sort(descending=True).values
    reached = ordered.cumsum(0)
    place = int(torch.searchsorted(reached, keep_frac * reached[-1:]).clamp(max=len(ordered) - 1))
    return mass_OI >= ordered[place]


def without_low_curvature(
    weight_OI: Tensor,
    factors: Factors,
    keep_frac: float,
    *,
    protect: Factors | None = None,
    protect_frac: float = 0.9,
    protect_by: str = "union",
) -> Tensor:
    """Take away the components of a matrix that a text's curvature gives little mass.

    Args:
        weight_OI: W, shape (O, I), any floating dtype; computed in float64.
        factors: of generic text.
        keep_frac: share of the curvature mass to keep, 0 to 1.
        protect: factors of text whose abilities should stay.
        protect_frac: share of the protected mass to keep, 0 to 1.
        protect_by: "union" keeps a component if either curvature ranks it high; the second one is read in the basis
            of the first, where its mass of (i, j) is (u_i^T G' u_i)(v_j^T A' v_j). "projection" takes nothing away
            in the directions that hold `protect_frac` of the protected inputs: W' x = W x for every x among them.

    Returns:
        W', shape (O, I), in W's dtype.

    Raises:
        ShapeMismatch: if factors and matrix do not fit.
        ConfigError: if a share is outside 0 to 1, or protect_by is unknown.
    """
    for given in (factors, protect):
        if given is not None:
            _require_fit(weight_OI, given)
    require_frac("protect_frac", protect_frac)
    if protect_by not in ("union", "projection"):
        raise ConfigError(f"protect_by is {protect_by!r}, expected union or projection")
    mass_O, basis_OO = _spectrum(factors.gradients_OO)
    mass_I, basis_II = _spectrum(factors.inputs_II)
    is_kept_OI = kept_pairs(torch.outer(mass_O, mass_I), keep_frac)
    if protect is not None and protect_by == "union":
        theirs_O = _mass_along(protect.gradients_OO, basis_OO)
        theirs_I = _mass_along(protect.inputs_II, basis_II)
        is_kept_OI |= kept_pairs(torch.outer(theirs_O, theirs_I), protect_frac)
    if bool(is_kept_OI.all()):
        return weight_OI.clone()
    exact_OI = weight_OI.to(torch.float64)
    components_OI = basis_OO.T @ exact_OI @ basis_II
    dropped_OI = basis_OO @ components_OI.masked_fill(is_kept_OI, 0) @ basis_II.T
    if protect is not None and protect_by == "projection":
        kept_IR = main_directions(protect.inputs_II, protect_frac)
        dropped_OI = dropped_OI - (dropped_OI @ kept_IR) @ kept_IR.T
    return (exact_OI - dropped_OI).to(weight_OI.dtype)


def without_small_singular(weight_OI: Tensor, drop_frac: float) -> Tensor:
    """Take away the smallest singular values of a matrix, whatever text it has seen.

    Args:
        weight_OI: W, shape (O, I), any floating dtype; computed in float64.
        drop_frac: share of the min(O, I) singular values, by number, to the nearest whole one; 0 to 1.

    Returns:
        W', shape (O, I), in W's dtype.
    """
    require_frac("drop_frac", drop_frac)
    num = int(drop_frac * min(weight_OI.shape) + 0.5)
    if num == 0:
        return weight_OI.clone()
    exact_OI = weight_OI.to(torch.float64)
    left_OR, values_R, right_RI = torch.linalg.svd(exact_OI, full_matrices=False)
    dropped_OI: Tensor = (left_OR[:, -num:] * values_R[-num:]) @ right_RI[-num:]
    return (exact_OI - dropped_OI).to(weight_OI.dtype)


def main_directions(moment_II: Tensor, share_frac: float) -> Tensor:
    """Give the fewest eigenvectors that hold a share of a second moment's trace.

    Args:
        moment_II: symmetric, shape (I, I).
        share_frac: share of the trace, 0 to 1; 1 takes every direction above rounding.

    Returns:
        Orthonormal columns, shape (I, R), float64.
    """
    values_I, vectors_II = _spectrum(moment_II)
    if share_frac >= 1:
        return vectors_II[:, values_I > values_I.max() * 1e-12]
    return vectors_II[:, kept_pairs(values_I[None], share_frac)[0]]


def require_frac(name: str, value: float) -> None:
    """Raise `ConfigError` unless a share is a number from 0 to 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}, expected 0 to 1")


def _spectrum(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (not below 0) and eigenvectors (columns) of a second moment, float64."""
    values, vectors = torch.linalg.eigh(moment.to(torch.float64))
    return values.clamp(min=0), vectors


def _mass_along(moment: Tensor, basis: Tensor) -> Tensor:
    """Second moment along each column of a basis."""
    return ((moment.to(basis) @ basis) * basis).sum(0).clamp(min=0)


def _require_fit(weight_OI: Tensor, factors: Factors) -> None:
    outputs, inputs = weight_OI.shape
    shapes = (tuple(factors.gradients_OO.shape), tuple(factors.inputs_II.shape))
    if shapes != ((outputs, outputs), (inputs, inputs)):
        raise ShapeMismatch(
            f"factors of shapes {shapes[0]} and {shapes[1]} do not fit a matrix of shape {(outputs, inputs)}; "
            "collect them from the model that is edited"
        )
