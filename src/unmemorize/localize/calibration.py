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

from unmemorize.errors import DataError, FileFormatError, RunFolderError
from unmemorize.files import read_json, write_json
from unmemorize.localize.passes import NemoSettings, first_step
from unmemorize.localize.scores import Ranges, pair_similarities
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


def best_pair(pipe: Pipeline, prompt: str, settings: NemoSettings | None = None) -> float:
    """Return the largest similarity between two samples of a prompt, unitless; every sample is compared.

    A prompt is memorized if this exceeds the gate threshold.
    """
    settings = settings or NemoSettings()
    passes = first_step(pipe, prompt, (), settings)
    maps = passes.maps([(sample, frozenset()) for sample in range(settings.samples)])
    ranges: Ranges = "call" if settings.mode == "compat" else "pair"
    num_scales = 1 if settings.mode == "paper" else 3
    return float(pair_similarities(maps, ranges=ranges, num_scales=num_scales)[0].max())


def calibrate(
    pipe: Pipeline,
    prompts: Sequence[str],
    settings: NemoSettings | None = None,
    *,
    stds: float = 1.0,
    path: str | Path | None = None,
    row: DenoiserRow | None = None,
    progress: ProgressCallback | None = None,
) -> Calibration:
    """Choose the gate threshold from ordinary prompts: mean plus one standard deviation of their best pairs.

    Args:
        pipe: the pipeline.
        prompts: prompts known not to be memorized, at least two.
        settings: samples, seed, steps and score are those of its mode; every sample is always compared.
        stds: standard deviations above the mean.
        path: file that is written at the end, and read instead if it exists.
        row: site table row, for a denoiser that the table does not know.
        progress: called after each prompt.

    Raises:
        DataError: if there are fewer than two prompts.
        RunFolderError: if the file was made on another model, other prompts or with other settings.

    Source: Hintersdorf et al. 2024, section 3.1 (per-prompt maximum; 0.358 + 0.070 for SD 1.4).
    """
    settings = settings or NemoSettings()
    if len(prompts) < 2:
        raise DataError(
            f"{len(prompts)} prompts give no threshold; pass at least two ordinary prompts, better hundreds"
        )
    kept = {"mode": settings.mode, "num_samples": settings.samples, "seed": settings.seed}
    facts: dict[str, Any] = {
        "stds": stds,
        "num_prompts": len(prompts),
        "digest": hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16],
        "model_id": fingerprint(pipe, row),
        "settings": {**kept, "num_steps": settings.num_steps, "guidance": settings.guidance},
    }
    if path is not None and Path(path).exists():
        return _same(load_calibration(path), facts, path)
    best: list[float] = []
    for number, prompt in enumerate(prompts, start=1):
        best.append(best_pair(pipe, prompt, settings))
        if progress is not None:
            progress(Progress("calibrate", number, len(prompts), "prompts", f"best pair {best[-1]:.3f}"))
    mean, std = float(torch.tensor(best).mean()), float(torch.tensor(best).std())
    found = Calibration(threshold=mean + stds * std, mean=mean, std=std, **facts)
    if path is not None:
        found.save(path)
    return found


def _same(stored: Calibration, facts: dict[str, Any], path: str | Path) -> Calibration:
    changed = [name for name, value in facts.items() if getattr(stored, name) != value]
    if changed:
        raise RunFolderError(
            f"{path} was calibrated with another {' and '.join(changed)}; choose a new folder, or delete the file"
        )
    return stored
