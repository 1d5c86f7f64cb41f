"""Are the pictures of a state distributed like real ones? FID and KID through torchmetrics.

Both compare features of generated pictures with features of reference pictures, under a network that the user names:
FID by mean and covariance, as if features were Gaussian; KID by a polynomial kernel, without bias. Each seed is one
sample with one picture a prompt; the figure is the mean over seeds with a Student-t interval, so it covers the choice
of noise, not of prompts or of reference pictures.

FID of a small sample is too large, by an amount that depends on the model: below five pictures per feature it is
refused (10,240 for the 2,048 features of Inception). KID has no such bias and is refused below 100 pictures. Copies of
reference pictures improve both, so that training pictures of the audited prompts are refused among them.

Letters: N pictures, D features. Source: Heusel et al. 2017 (FID); Binkowski et al. 2018 (KID); the refusals are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unmemorize.audit.pictures import Picture, PictureSource, PromptCase, read_picture
from unmemorize.audit.statistics import MIN_SEEDS, mean_over_seeds, refused
from unmemorize.corpus.pictures import resized
from unmemorize.errors import DataError, missing_extra
from unmemorize.records import Group, Measure

MIN_PICTURES_PER_FEATURE = 5
MIN_PICTURES = 100

_BATCH = 32
_KID_BLOCK = 1000  # pictures whose kernel is held in memory at once
_THUMBNAIL_PX = 16
_ALIKE = 8.0  # mean difference of thumbnails, of 255, from which two pictures are not compared pixel by pixel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PictureQuality:
    """What FID and KID are computed with.

    Attributes:
        features: a module that maps pictures (B, 3, H, W), uint8, to features (B, D), float. FID values of different
            networks, or of one network behind another way of resizing, must not be compared.
        reference: real pictures as arrays or paths, never those that the model was audited on.
        name: what the features are, for reports.
        group: prompts whose pictures are compared.
    """

    features: nn.Module
    reference: Sequence[PictureSource] = field(repr=False)
    name: str
    group: Group = "ordinary"

    @property
    def description(self) -> str:
        """One line for reports."""
        return f"Distance to {len(self.reference):,} reference pictures by the features of {self.name}; 0 is best."


def require_unseen(
    quality: PictureQuality, cases: Sequence[PromptCase], pictures: Sequence[Sequence[Picture]]
) -> None:
    """Refuse reference pictures that prompts of the audit may have memorized; those of ordinary prompts are allowed.

    Two pictures are the same if their central squares, brought to the side of the smaller one, have equal pixels.

    Args:
        quality: features and reference pictures.
        cases: N prompts.
        pictures: the training pictures of each of them, length N.

    Raises:
        DataError: if a reference picture is one of them, or cannot be read.
    """
    trained = [
        one for case, own in zip(cases, pictures, strict=True) if case.group != "ordinary" for one in own
    ]
    if not trained:
        return
    thumbnails = np.stack([_thumbnail(one) for one in trained])
    seen = []
    for number, source in enumerate(quality.reference, start=1):
        picture = read_picture(source)
        differences = np.abs(thumbnails - _thumbnail(picture)).mean(axis=1)
        if any(_is_same(picture, trained[row]) for row in np.flatnonzero(differences <= _ALIKE)):
            seen.append(f"number {number}" if isinstance(source, np.ndarray) else str(source))
    if seen:
        raise DataError(
            f"{len(seen)} of {len(quality.reference):,} reference pictures are training pictures of the audited "
            f"prompts (first: {seen[0]}); a distance to them would praise memorization: take them out"
        )


def _thumbnail(picture: Picture) -> NDArray[np.int16]:
    return resized(picture, _THUMBNAIL_PX).astype(np.int16).ravel()


def _is_same(one: Picture, other: Picture) -> bool:
    side = min(*one.shape[:2], *other.shape[:2])
    return np.array_equal(resized(one, side), resized(other, side))


def fid_and_kid(
    quality: PictureQuality,
    pictures_by_seed: Sequence[Sequence[PictureSource]],
    *,
    reference_ND: Tensor | None = None,
) -> tuple[Measure, Measure]:
    """Compute FID and KID of the pictures of one state.

    Args:
        quality: features and reference pictures.
        pictures_by_seed: for each seed N pictures, one a prompt, as arrays or paths.
        reference_ND: features of the reference pictures where they are known, shape (N, D).

    Returns:
        FID (squared distance in feature units) and KID (unbiased squared kernel distance, unitless, slightly negative
        values occur), each a mean over seeds; refused where a sample is too small.

    Raises:
        DataError: if the features are not one vector a picture.
        MissingExtra: without torchmetrics.
    """
    seeds = len(pictures_by_seed)
    smallest = min([len(quality.reference), *map(len, pictures_by_seed)])
    if seeds < MIN_SEEDS or smallest < MIN_PICTURES:
        reason = (
            f"{seeds} seeds; an interval over seeds needs {MIN_SEEDS}"
            if seeds < MIN_SEEDS
            else f"{smallest} pictures in the smallest sample; KID needs {MIN_PICTURES}, FID more"
        )
        return refused(reason, smallest), refused(reason, smallest)
    real = features_of(quality.features, quality.reference) if reference_ND is None else reference_ND
    made = [features_of(quality.features, pictures) for pictures in pictures_by_seed]
    kid = mean_over_seeds([_kid(real, sample) for sample in made])
    needed = MIN_PICTURES_PER_FEATURE * real.shape[1]
    if smallest < needed:
        reason = (
            f"{smallest} pictures in the smallest sample; FID with {real.shape[1]} features needs {needed}"
        )
        return refused(reason, smallest), kid
    return mean_over_seeds([_fid(real, sample) for sample in made]), kid


@torch.no_grad()
def features_of(network: nn.Module, pictures: Sequence[PictureSource]) -> Tensor:
    """Compute features of N pictures, arrays or paths; only pictures of equal size share a pass.

    Returns:
        Shape (N, D), float32, on the CPU.

    Raises:
        DataError: if the features are not one vector a picture.
    """
    first = next(iter(network.parameters()), None)
    device = torch.device("cpu") if first is None else first.device
    parts: list[Tensor] = []
    waiting: list[Picture] = []
    for source in pictures:
        picture = read_picture(source)
        if waiting and (len(waiting) == _BATCH or picture.shape != waiting[0].shape):
            parts.append(_pass(network, waiting, device))
            waiting = []
        waiting.append(picture)
    parts.append(_pass(network, waiting, device))
    return torch.cat(parts)


def _pass(network: nn.Module, pictures: Sequence[Picture], device: torch.device) -> Tensor:
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    found = network(batch.to(device))
    if not isinstance(found, Tensor) or found.shape[:1] != batch.shape[:1] or found.dim() != 2:
        raise DataError(
            f"the feature network gives {getattr(found, 'shape', type(found).__name__)} for {len(batch)} pictures; "
            "expected one vector a picture"
        )
    return found.float().cpu()


class _Computed(nn.Module):
    """Hands features that were computed already to a torchmetrics metric."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Return the features as they are."""
        return features


def _fid(real_ND: Tensor, made_ND: Tensor) -> float:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise missing_extra("torchmetrics", "images") from error
    metric = FrechetInceptionDistance(feature=_Computed(real_ND.shape[1]))
    metric.update(real_ND, real=True)
    metric.update(made_ND, real=False)
    return float(metric.compute())


def _kid(real_ND: Tensor, made_ND: Tensor) -> float:
    """Mean over disjoint blocks of both samples in random order; what is left over at the end is not used."""
    try:
        from torchmetrics.image.kid import poly_mmd
    except ImportError as error:
        raise missing_extra("torchmetrics", "images") from error
    size = min(len(real_ND), len(made_ND))
    block = min(size, _KID_BLOCK)
    generator = torch.Generator().manual_seed(0)
    real_ND, made_ND = (
        sample[torch.randperm(len(sample), generator=generator)].double() for sample in (real_ND, made_ND)
    )
    starts = range(0, size - block + 1, block)
    values = [poly_mmd(real_ND[start : start + block], made_ND[start : start + block]) for start in starts]
    return float(torch.stack(values).mean())
