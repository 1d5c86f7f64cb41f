"""Denoiser passes of text-to-image models for one prompt: made, gated per sample, and counted, only here.

A backward pass is counted as two forward passes, so that one gradient of one sample costs three.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, UnmemorizeWarning
from unmemorize.gates import capture
from unmemorize.localize.results import Cost
from unmemorize.localize.scores import correlation, mean_absolute, scaled_maps
from unmemorize.localize.search import Neuron, SearchSettings
from unmemorize.models.denoising import DenoiserCall, Pipeline, record
from unmemorize.neurons import Site

Mode = Literal["compat", "paper", "fast"]
Ranking = Literal["unusual", "gradient"]

_LOSS_SCALE = 1024.0  # keeps half-precision gradients above the smallest number; divided out again


@dataclass(frozen=True, slots=True, kw_only=True)
class NemoSettings:
    """How a prompt's neurons are looked for.

    Attributes:
        mode: "compat", "paper" or "fast".
        search: thresholds and candidate schedule.
        num_samples: samples per prompt; by default 10, in fast mode 4.
        seed: compat and fast draw all latents at once from it; paper takes seed, seed + 1, … one per sample.
        num_steps: length of the sampling schedule, in steps.
        guidance: guidance scale of the passes, unitless; 0 for none.
        gate_samples: fast mode's first look, in samples: a prompt whose best pair stays below `clear_frac` of the gate
            threshold is cleared after it. LIMIT: a prompt that copies in few of its samples can pass unseen.
        clear_frac: see `gate_samples`; 0..1.
        ranking: fast mode's order of the candidates: "unusual" (absolute z-scores, then top-k) or "gradient" (all
            neurons by the slope of the memory, see `Passes.slopes`; z-scores where slopes are equal).
        gradient_level: how far all neurons are open where the slope is taken, unitless, above 0 and below 1.
        is_reusing: whether compat looks up passes that the released code repeats, and leaves out the pass it discards.
        batch_size: samples per denoiser pass; halved when memory runs out.
    """

    mode: Mode = "fast"
    search: SearchSettings = field(default_factory=SearchSettings)
    num_samples: int | None = None
    seed: int = 1
    num_steps: int = 50
    guidance: float = 0.0
    gate_samples: int = 2
    clear_frac: float = 0.5
    ranking: Ranking = "unusual"
    gradient_level: float = 0.5
    is_reusing: bool = True
    batch_size: int = 10

    def __post_init__(self) -> None:
        if self.mode not in ("compat", "paper", "fast"):
            raise ConfigError(f"unknown mode {self.mode!r}; expected compat, paper or fast")
        if min(self.samples, self.gate_samples) < 2 or self.num_steps < 2 or self.batch_size < 1:
            raise ConfigError(
                f"num_samples {self.samples}, gate_samples {self.gate_samples}, num_steps {self.num_steps}, batch_size "
                f"{self.batch_size}; samples are compared in pairs, so expected 2, 2, 2 and 1 or more"
            )

        if self.ranking not in ("unusual", "gradient") or not 0 < self.gradient_level < 1:
            raise ConfigError(
                f"ranking {self.ranking!r} at gradient_level {self.gradient_level}; expected unusual or gradient, and "
                "a level between 0 and 1: with all neurons open or closed a memory hardly moves"
            )
        if self.ranking == "gradient" and self.mode != "fast":
            raise ConfigError(f"ranking 'gradient' orders fast mode's candidates; mode is {self.mode}")

    @property
    def samples(self) -> int:
        """Samples per prompt."""
        default = 4 if self.mode == "fast" else 10
        return default if self.num_samples is None else self.num_samples


class Passes:
    """Denoiser passes for one prompt: made, remembered and counted here and nowhere else."""

    def __init__(
        self, call: DenoiserCall, sites: Sequence[Site], settings: NemoSettings, step_idx: int
    ) -> None:
        self.call, self.sites, self.settings, self.step_idx = call, tuple(sites), settings, step_idx
        self.cost = Cost()
        self.batch_size = settings.batch_size
        self.activations: tuple[Tensor, ...] | None = None

    def maps(self, jobs: Sequence[tuple[int, frozenset[Neuron]]], *, is_capturing: bool = False) -> Tensor:
        """Return scaled maps for (sample, neurons that are off), shape (M, C, H, W), float32."""
        parts: list[Tensor] = []
        start, before = 0, self.batch_size
        while start < len(jobs):
            try:
                parts.append(self._run(jobs[start : start + self.batch_size], self.step_idx, is_capturing))
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                continue
            start += len(parts[-1])
        if self.batch_size < before:
            self.warn(f"out of memory with {before} samples a pass; going on with {self.batch_size}")
        return torch.cat(parts)

    def warn(self, message: str) -> None:
        """Say that work goes on otherwise than asked for."""
        warnings.warn(message, UnmemorizeWarning, stacklevel=2)

    def slopes(self, sample: int, plain: Tensor) -> tuple[Tensor, ...]:
        """Return how much of the memory each neuron holds, to first order: one tensor of shape (F,) per site, float32.

        The similarity of a blocked and the unblocked prediction is at its maximum where every neuron is open, so its
        slope there is zero; and where several neurons hold one picture, it hardly moves until most are closed. The
        slope is therefore taken half-way: all neurons are open by `gradient_level`, and

            slope = d correlation(prediction, unblocked prediction) / d openness of the neuron

        Neurons with a large positive slope pull the prediction towards the picture. One forward and one backward pass
        of one sample; gates are the only leaves, so that no parameter gets a gradient.

        Args:
            sample: the sample.
            plain: its scaled map with nothing closed, shape (C, H, W).

        Source: ours.
        """
        level = self.settings.gradient_level
        device = self.call.latents.device
        gates = {
            site: torch.full((1, site.width), level, device=device, requires_grad=True) for site in self.sites
        }
        with torch.enable_grad():
            rows = self.call.predict([sample], step_idx=self.step_idx, gates=gates, has_gradient=True)
            maps = self.call.clean_direction(self._combined(rows), [sample], step_idx=self.step_idx)
            score = correlation(maps, plain[None].to(maps.device)).sum() * _LOSS_SCALE
            found = torch.autograd.grad(score, list(gates.values()), allow_unused=True)
        self.cost.sample_backwards += self.call.rows
        self.cost.sample_forwards_run += 3 * self.call.rows
        self.cost.denoiser_calls_run += 1
        return tuple(
            torch.zeros(site.width)
            if slope is None
            else (slope[0].float() / _LOSS_SCALE).nan_to_num(0.0, 0.0, 0.0).cpu()
            for site, slope in zip(self.sites, found, strict=True)
        )

    def discard(self, jobs: Sequence[tuple[int, frozenset[Neuron]]]) -> None:
        """Make the pass at the first timestep, whose outcome the released code throws away."""
        for start in range(0, len(jobs), self.batch_size):
            self._run(jobs[start : start + self.batch_size], 0, False)

    def _run(
        self, jobs: Sequence[tuple[int, frozenset[Neuron]]], step_idx: int, is_capturing: bool
    ) -> Tensor:
        samples = [sample for sample, _ in jobs]
        gates: dict[Site, Tensor] = {}
        for number, site in enumerate(self.sites):
            if any(layer == number for _, off in jobs for layer, _ in off):
                gate = torch.ones(len(jobs), site.width)
                for row, (_, off) in enumerate(jobs):
                    gate[row, [index for layer, index in off if layer == number]] = self.settings.search.scale
                gates[site] = gate
        with torch.no_grad(), capture(self.call.denoiser, self.sites if is_capturing else ()) as seen:
            rows = self.call.predict(samples, step_idx=step_idx, gates=gates)
        self.cost.sample_forwards_run += self.call.rows * len(jobs)
        self.cost.denoiser_calls_run += 1
        if is_capturing and self.activations is None:
            last = [seen[site][0].flatten(1, -2)[-len(jobs) :] for site in self.sites]
            self.activations = tuple(mean_absolute(values)[0].cpu() for values in last)
        return scaled_maps(self.call.clean_direction(self._combined(rows), samples, step_idx=step_idx)).cpu()

    def _combined(self, rows: Tensor) -> Tensor:
        """Return the prediction, guided where the call has two rows."""
        if self.call.rows == 1:
            return rows[-1]
        empty, text = rows
        first, second = (text, empty) if self.settings.mode == "compat" else (empty, text)
        guided: Tensor = first + self.settings.guidance * (second - first)
        return guided


def first_step(pipe: Pipeline, prompt: str, sites: Sequence[Site], settings: NemoSettings) -> Passes:
    """Prepare the passes of one prompt: its latents, and the step at which the mode looks."""
    seeds = tuple(range(settings.seed, settings.seed + settings.samples))
    call = record(
        pipe,
        prompt,
        num_samples=settings.samples,
        seeds=seeds if settings.mode == "paper" else seeds[:1],
        num_steps=settings.num_steps,
        guidance=settings.guidance,
    )
    return Passes(call, sites, settings, 0 if settings.mode == "paper" else 1)
