"""How alike two pictures are: learned copy detectors from a file, and a measure that needs none.

A measure turns each picture into a vector; the similarity of two pictures is the cosine of their vectors, 1 for equal
pictures, near 0 for unrelated ones. Three are here:

    sscd_disc_mixup, sscd_disc_large    networks trained to find copies; the user names the TorchScript file
    structure                           edges on a raster of 32 x 32, after removing brightness and contrast

From which similarity on a picture counts as a copy is part of the claim (`copy_threshold.py`): 0.7 for SSCD, by
convention; for `structure`, which has no convention, it is computed from pictures that are known not to be copies.

What this file does not do: decide what is compared with what (`picture_figures.py`). Letters: N pictures, D features.
Source: Pizzi et al. 2022, "A Self-Supervised Descriptor for Image Copy Detection" (SSCD); `structure` is ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from unmemorize.audit.pictures import Picture, resized, short_side_crop
from unmemorize.errors import ConfigError, ModelNotSupported

SscdVariant = Literal["sscd_disc_mixup", "sscd_disc_large"]

SSCD_THRESHOLD = (
    0.7  # convention since Somepalli et al. 2023; strict variants ask for it in the mean over seeds
)
STRUCTURE_LEAST = 0.4  # below all thresholds that testbeds have given (0.48 to 0.64)

_RASTER_PX = 32
_SMOOTH_PX = 1.5  # of the raster; larger forgives shifts, smaller tells more pictures apart
_LOCAL_PX = 3.0  # of the raster; contrast is evened out over this distance
_FAINT = 0.05  # gradients below this per pixel (of 1) count as flat


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityMeasure:
    """A way to compare two pictures.

    Attributes:
        name: its name in records and reports.
        description: one line for reports.
        definition: how it is computed.
        source: where it comes from.
        embed: N pictures -> vectors of length 1, shape (N, D), float32, on the CPU.
        copy_threshold: similarity from which a picture is a copy, by convention; None if it has to be computed.
        least_threshold: a computed threshold is never below it.
        unit: of the similarity.
    """

    name: str
    description: str
    definition: str
    source: str
    embed: Callable[[Sequence[Picture]], Tensor]
    copy_threshold: float | None = None
    least_threshold: float = 0.0
    unit: str = "unitless, -1 to 1; 1 for equal pictures"

    def similarity(self, first: Picture, second: Picture) -> float:
        """Compare two pictures of any size; unitless, 1 for equal ones."""
        one, other = self.embed([first, second])
        return float(one @ other)


def structure() -> SimilarityMeasure:
    """Make the measure that needs no download: do two pictures have the same edges in the same places?

    Equal under changes of brightness and contrast, and nearly so under noise, JPEG and blur, at 32 pixels as at 512. It
    misleads in three ways: a copy that is shifted by a twentieth of the picture, mirrored, cropped or set into
    another picture is missed, where SSCD finds it; drawings made to one template (flags, clocks, faces) are alike
    without being copies, which is why its threshold comes from controls; a picture without edges is unlike
    everything, itself included.

    Source: ours. Orientation fields with local normalization go back to Dalal and Triggs 2005.
    """
    return SimilarityMeasure(
        name="structure",
        description="Same edges in the same places, whatever the brightness; needs no downloaded model.",
        definition=(
            f"Area average to {_RASTER_PX} x {_RASTER_PX} pixels; mean and two differences of the colours; Gaussian of "
            f"{_SMOOTH_PX} pixels; horizontal and vertical gradients, divided by their root mean square over a "
            f"Gaussian of {_LOCAL_PX} pixels plus {_FAINT}; cosine."
        ),
        source="ours",
        embed=structure_vectors,
        least_threshold=STRUCTURE_LEAST,
    )


def structure_vectors(pictures: Sequence[Picture]) -> Tensor:
    """Compute the vectors of `structure`.

    Args:
        pictures: N pictures of any size.

    Returns:
        Vectors of length 1 (0 for a picture without edges), shape (N, 6 x 32 x 32), float32.
    """
    if not pictures:
        return torch.zeros(0, 6 * _RASTER_PX**2)
    small = np.stack([resized(picture, _RASTER_PX, _RASTER_PX, "box") for picture in pictures])
    red, green, blue = (torch.from_numpy(small).float() / 255).permute(3, 0, 1, 2)
    colours = torch.stack([(red + green + blue) / 3, (red - green) / 2, (red + green - 2 * blue) / 4], dim=1)
    smooth = _gaussian(colours, _SMOOTH_PX)
    across = functional.pad(smooth[..., :, 2:] - smooth[..., :, :-2], (1, 1, 0, 0))
    down = functional.pad(smooth[..., 2:, :] - smooth[..., :-2, :], (0, 0, 1, 1))
    gradients = torch.cat([across, down], dim=1)
    local = _gaussian(gradients.square().sum(1, keepdim=True), _LOCAL_PX).clamp_min(0).sqrt()
    return functional.normalize((gradients / (local + _FAINT)).flatten(1), dim=1, eps=1e-6)


def _gaussian(maps: Tensor, sigma_px: float) -> Tensor:
    """Smooth maps of shape (N, C, H, W) by a Gaussian; edge pixels are continued outwards."""
    radius = math.ceil(3 * sigma_px)
    places = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-places.square() / (2 * sigma_px**2))
    kernel = kernel / kernel.sum()
    channels = maps.shape[1]
    padded = functional.pad(maps, (radius,) * 4, mode="replicate")
    rows = functional.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return functional.conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


@dataclass(frozen=True, slots=True)
class _Preparation:
    """How a network wants its pictures; `mean` and `std` per colour, of values from 0 to 1."""

    prepare: Callable[[Picture], Picture]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    words: str


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)
_PREPARATIONS: dict[str, _Preparation] = {
    "sscd_disc_mixup": _Preparation(
        lambda picture: resized(picture, 320, 320),
        _IMAGENET_MEAN,
        _IMAGENET_STD,
        "squashed to 320 x 320 pixels, ImageNet mean and deviation",
    ),
    "sscd_disc_large": _Preparation(
        lambda picture: short_side_crop(picture, 256, 224),
        _HALF,
        _HALF,
        "short side 256 pixels, centre 224 x 224, mean and deviation 0.5",
    ),
}


def sscd(
    path: str | Path, variant: SscdVariant = "sscd_disc_mixup", *, device: str = "cpu", batch_size: int = 16
) -> SimilarityMeasure:
    """Load an SSCD copy detector from its TorchScript file.

    A TorchScript file holds a program: load only one that you trust. The two variants give different values; figures
    of one must not be compared with figures of the other. It misleads on pictures far smaller than its input (64
    pixels and below), which it was not trained on, and calls portraits or products in the same pose alike.

    Args:
        path: the file that its authors publish (`sscd_disc_mixup.torchscript.pt`, ...).
        variant: which preparation of pictures belongs to it.
        device: where it runs.
        batch_size: pictures per pass.

    Raises:
        ConfigError: if the variant is unknown.
        ModelNotSupported: if the file is missing or no TorchScript module, or does not map pictures to vectors.

    Source: Pizzi et al. 2022; mixup variant and preparation as in Hintersdorf et al. 2024, large variant as in
    Somepalli et al. 2023 and Wen et al. 2024.
    """
    if variant not in _PREPARATIONS:
        raise ConfigError(f"no SSCD variant {variant!r}; choose among {', '.join(_PREPARATIONS)}")
    how = _PREPARATIONS[variant]
    network = _torch_script(Path(path), device)

    def embed(pictures: Sequence[Picture]) -> Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (how.mean, how.std))
        parts = []
        for start in range(0, len(pictures), batch_size):
            ready = np.stack([how.prepare(picture) for picture in pictures[start : start + batch_size]])
            inputs = (torch.from_numpy(ready).permute(0, 3, 1, 2).float() / 255 - mean) / std
            with torch.no_grad():
                vectors = network(inputs.to(device))
            if not isinstance(vectors, Tensor) or vectors.dim() != 2:
                raise ModelNotSupported(
                    f"{path} does not turn pictures into vectors; pass an SSCD TorchScript file"
                )
            parts.append(functional.normalize(vectors.float().cpu(), dim=1))
        return torch.cat(parts) if parts else torch.zeros(0, 0)

    return SimilarityMeasure(
        name=variant,
        description="Learned copy detector SSCD; finds copies after cropping, recolouring and blending.",
        definition=f"Pictures {how.words}; cosine of the network's outputs.",
        source="Pizzi et al. 2022",
        embed=embed,
        copy_threshold=SSCD_THRESHOLD,
    )


def _torch_script(path: Path, device: str) -> Callable[[Tensor], Tensor]:
    if not path.is_file():
        raise ModelNotSupported(f"{path} does not exist; pass the TorchScript file of an SSCD model")
    try:
        with (
            warnings.catch_warnings()
        ):  # torch announces the end of TorchScript; SSCD is published in no other form
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-any-return]
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelNotSupported(
            f"{path} is no TorchScript file ({first}); pass the file that the authors of SSCD publish"
        ) from error
