"""How unusual a neuron is, and how alike two predictions are. Pure mathematics on arrays; knows no model.

    z = (a - mean) / std          a: a neuron's mean absolute activation for one example
    similarity = product over scales of (contrast and structure), times luminance at the last scale, each to its weight

Means and standard deviations over many examples are collected in `neuron_statistics.py`.

Source: Hintersdorf et al. 2024 (Finding NeMo), sections 3.1 and 3.2, and its released code where the two differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from unmemorize.errors import ShapeMismatch, missing_extra

Ranges = Literal["call", "pair"]

_SCALE_WEIGHT = 0.33  # the released code's weight of each of three scales
_WINDOW = 11


def mean_absolute(values: Tensor, positions: Tensor | None = None) -> Tensor:
    """Average absolute activations over token positions.

    Args:
        values: shape (N, T, F), in units of the activation.
        positions: which positions count, shape (N, T), bool; by default all.

    Returns:
        Shape (N, F), float32; 0 for an example without such positions.

    Source: Hintersdorf et al. 2024, released code (all positions, padding included).
    """
    sizes = values.float().abs()
    if positions is None:
        return sizes.mean(1)
    weight = positions.to(sizes).unsqueeze(-1)
    return (sizes * weight).sum(1) / weight.sum(1).clamp(min=1)


def z_scores(activation: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return how many standard deviations activations are off the mean; shape (F,), float32, unitless.

    A neuron that does not vary (spread below a millionth of its mean, as at a start token that sees itself alone) is
    never unusual: 0. What divides by such a spread is rounding.
    """
    mean, std = mean.float(), std.float()
    varies = std > 1e-6 * mean.abs()
    return torch.where(varies, (activation.float() - mean) / torch.where(varies, std, 1.0), 0.0)


def scaled_maps(maps: Tensor) -> Tensor:
    """Move and stretch every map to [0, 1], each sample and channel by itself.

    Args:
        maps: shape (N, C, H, W).

    Returns:
        Same shape, float32, unitless; a constant map becomes 0.
    """
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    spread = torch.where(high > low, high - low, torch.ones_like(high))
    return (maps - low) / spread


def map_similarity(first: Tensor, second: Tensor, *, ranges: Ranges = "pair", num_scales: int = 3) -> Tensor:
    """Compare pairs of maps by multi-scale structural similarity.

    The constants of the measure depend on the data range, which is taken anew at each scale. "call" takes it from all
    maps of the call, as the released code does, so that a score depends on what is scored beside it; "pair" takes it
    from the pair alone (scores move by about 0.01) and is the same however calls are grouped.

    Args:
        first: shape (N, C, H, W), unitless, in [0, 1].
        second: same shape.
        ranges: "call" or "pair".
        num_scales: scales; fewer are used where the maps are too small, 1 is plain SSIM.

    Returns:
        Shape (N,), float32, unitless: at most 1, which means equal; negative contributions count as 0.

    Raises:
        ShapeMismatch: if the shapes differ, or the maps are too small for the window of 11.

    Source: Hintersdorf et al. 2024, released code (weights 0.33, which do not add up to 1); "pair" is ours.
    """
    try:
        from torchmetrics.functional.image import (
            multiscale_structural_similarity_index_measure as multi_scale,
        )
        from torchmetrics.functional.image import structural_similarity_index_measure as single_scale
    except ImportError as error:
        raise missing_extra("torchmetrics", "images") from error
    if first.shape != second.shape or first.dim() != 4:
        raise ShapeMismatch(
            f"maps of shapes {tuple(first.shape)} and {tuple(second.shape)} cannot be compared"
        )
    scales = min(num_scales, _num_scales(min(first.shape[2:])))

    def compare(a: Tensor, b: Tensor) -> Tensor:
        options: dict[str, Any] = {"reduction": "none"}
        if scales == 1:
            result = single_scale(a, b, **options)
        else:
            result = multi_scale(a, b, betas=(_SCALE_WEIGHT,) * scales, normalize="relu", **options)
        assert isinstance(result, Tensor)
        return result.reshape(-1)

    if ranges == "call":
        return compare(first, second)
    return torch.cat([compare(first[i : i + 1], second[i : i + 1]) for i in range(len(first))])


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlate maps channel by channel and average over channels: a similarity that can be differentiated everywhere.

    Args:
        first: shape (N, C, H, W), any unit; moving or stretching a channel changes nothing.
        second: same shape.

    Returns:
        Shape (N,), unitless, -1 to 1; a constant channel counts as 0.

    Source: Pearson's coefficient.
    """
    a, b = (maps.flatten(2) - maps.flatten(2).mean(2, keepdim=True) for maps in (first, second))
    return torch.nn.functional.cosine_similarity(a, b, dim=2).mean(1)


def _num_scales(side: int) -> int:
    """Return how many scales fit the window into maps of a side (in latent pixels), at most 3."""
    if side < _WINDOW:
        raise ShapeMismatch(
            f"maps of {side} x {side} are smaller than the window of {_WINDOW}; use larger pictures"
        )
    fitting = [scales for scales in (3, 2) if side // (scales - 1) ** 2 > _WINDOW - 1]
    return fitting[0] if fitting else 1


def pair_similarities(
    maps: Tensor, *, ranges: Ranges = "pair", num_scales: int = 3
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Compare all pairs of samples of one example.

    Args:
        maps: shape (N, C, H, W), unitless, in [0, 1].
        ranges: as for `map_similarity`.
        num_scales: as for `map_similarity`.

    Returns:
        Similarities of shape (N (N - 1) / 2,), and their pairs in the order (0, 1), (0, 2), …, (1, 2), ….
    """
    pairs = [(a, b) for a in range(len(maps)) for b in range(a + 1, len(maps))]
    first, second = (maps[[pair[side] for pair in pairs]] for side in (0, 1))
    return map_similarity(first, second, ranges=ranges, num_scales=num_scales), pairs


def best_match(similarities: Tensor, pairs: Sequence[tuple[int, int]], num_samples: int) -> Tensor:
    """Return each sample's largest similarity to another one, shape (num_samples,), unitless."""
    best = torch.full((num_samples,), -torch.inf)
    for value, pair in zip(similarities.cpu(), pairs, strict=True):
        for sample in pair:
            best[sample] = torch.maximum(best[sample], value)
    return best
