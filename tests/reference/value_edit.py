"""The closed-form edit as its definition: one least-squares problem per row, solved by stacking both terms."""

from __future__ import annotations

import torch
from torch import Tensor


def edited_rows(
    weight: Tensor, inputs: Tensor, wanted: Tensor, ordinary: list[Tensor], strength: float, ridge_frac: float
) -> Tensor:
    """Minimize s |W' x - W m|^2 over memorized pairs (x, m) plus the mean of |(W' - W) o|^2 over ordinary inputs o.

    weight (F, D); inputs and wanted (n, D); ordinary: tensors of shape (D,). The ridge is added as D more inputs.
    """
    width = weight.shape[1]
    mean_square = sum(float((o * o).mean()) for o in ordinary) / len(ordinary)
    rows = []
    for row in weight.double():
        left, right = [], []
        for x, m in zip(inputs.double(), wanted.double(), strict=True):
            left.append(strength**0.5 * x)
            right.append(strength**0.5 * (row @ m))
        for o in ordinary:
            left.append(o.double() / len(ordinary) ** 0.5)
            right.append((row @ o.double()) / len(ordinary) ** 0.5)
        for axis in range(width):
            unit = torch.zeros(width, dtype=torch.float64)
            unit[axis] = (ridge_frac * mean_square) ** 0.5
            left.append(unit)
            right.append(row @ unit)
        solution = torch.linalg.lstsq(torch.stack(left), torch.stack(right)[:, None], driver="gelsd").solution
        rows.append(solution[:, 0])
    return torch.stack(rows)
