"""The gate's threshold, chosen from ordinary prompts, and what it was chosen on.

    threshold = mean + stds * standard deviation, over each ordinary prompt's best pair of samples

A threshold holds for one model, mode and number of samples; 0.428 is the published one for SD 1.4 with 10 samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unmemorize.errors import DataError, FileFormatError
from unmemorize.files import read_json, write_json
from unmemorize.localize.passes import NemoSettings, first_step
from unmemorize.localize.scores import pair_similarities
from unmemorize.models.denoising import Pipeline
from unmemorize.models.diffusion import DenoiserRow, fingerprint
from unmemorize.records import Progress, ProgressCallback

CALIBRATION_FORMAT = "unmemorize.calibration"
CALIBRATION_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A gate threshold and what it was computed on.

    Attributes:
        threshold: mean + stds times the standard deviation of the best pairs, unitless.
        mean: mean of the best pairs of ordinary prompts, unitless.
        std: their standard deviation (divisor n - 1), unitless.
        stds: how many standard deviations were added.
        num_prompts: ordinary prompts.
        digest: digest of the prompts in order.
        model_id: fingerprint of the model.
        settings: mode, samples, seed, steps and guidance of the passes.
    """

    threshold: float
    mean: float
    std: float
    stds: float
    num_prompts: int
    digest: str
    model_id: str
    settings: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON, atomically."""
        header = {"format": CALIBRATION_FORMAT, "format_version": CALIBRATION_VERSION}
        return write_json(path, {**header, **asdict(self)})


def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration saved by `Calibration.save`.

    Raises:
        FileFormatError: if the file is missing, torn, of another version, or lacks a field.
    """
    value = read_json(path, format=CALIBRATION_FORMAT, version=CALIBRATION_VERSION)
    try:
        return Calibration(**{name: part for name, part in value.items() if not name.startswith("format")})
    except TypeError as error:
        raise FileFormatError(
            f"{path} does not fit the calibration format ({error}); calibrate again"
        ) from error


def calibrate(
    pipe: Pipeline,
    prompts: Sequence[str],
    settings: NemoSettings | None = None,
    *,
    stds: float = 1.0,
    row: DenoiserRow | None = None,
    progress: ProgressCallback | None = None,
) -> Calibration:
    """Choose the gate threshold from ordinary prompts: mean plus one standard deviation of their best pairs.

    Args:
        pipe: the pipeline.
        prompts: prompts known not to be memorized, at least two.
        settings: samples, seed, steps and score are those of its mode; every sample is always compared.
        stds: standard deviations above the mean.
        row: site table row, for a denoiser that the table does not know.
        progress: called after each prompt.

    Raises:
        DataError: if there are fewer than two prompts.

    Source: Hintersdorf et al. 2024, section 3.1 (per-prompt maximum; 0.358 + 0.070 for SD 1.4).
    """
    settings = settings or NemoSettings()
    if len(prompts) < 2:
        raise DataError(
            f"{len(prompts)} prompts give no threshold; pass at least two ordinary prompts, better hundreds"
        )
    best: list[float] = []
    is_compat = settings.mode == "compat"
    for number, prompt in enumerate(prompts, start=1):
        passes = first_step(pipe, prompt, (), settings)
        maps = passes.maps([(sample, frozenset()) for sample in range(settings.samples)])
        scales = 1 if settings.mode == "paper" else 3
        best.append(
            float(pair_similarities(maps, ranges="call" if is_compat else "pair", num_scales=scales)[0].max())
        )
        if progress is not None:
            progress(Progress("calibrate", number, len(prompts), "prompts", f"best pair {best[-1]:.3f}"))
    mean, std = float(torch.tensor(best).mean()), float(torch.tensor(best).std())
    kept = {"mode": settings.mode, "num_samples": settings.samples, "seed": settings.seed}
    return Calibration(
        threshold=mean + stds * std,
        mean=mean,
        std=std,
        stds=stds,
        num_prompts=len(prompts),
        digest=hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16],
        model_id=fingerprint(pipe, row),
        settings={**kept, "num_steps": settings.num_steps, "guidance": settings.guidance},
    )
