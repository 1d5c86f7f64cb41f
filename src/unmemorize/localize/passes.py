"""Denoiser passes of text-to-image models for one prompt: made, gated per sample, and counted, only here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from unmemorize.errors import ConfigError
from unmemorize.gates import capture
from unmemorize.localize.results import Cost
from unmemorize.localize.scores import mean_absolute, scaled_maps
from unmemorize.localize.search import Neuron, SearchSettings
from unmemorize.models.denoising import DenoiserCall, Pipeline, record
from unmemorize.neurons import Site

Mode = Literal["compat", "paper", "fast"]


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

    @property
    def samples(self) -> int:
        """Samples per prompt."""
        return self.num_samples or (4 if self.mode == "fast" else 10)


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
        start = 0
        while start < len(jobs):
            try:
                parts.append(self._run(jobs[start : start + self.batch_size], self.step_idx, is_capturing))
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                continue
            start += len(parts[-1])
        return torch.cat(parts)

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
        prediction = rows[-1]
        if self.call.rows == 2:
            empty, text = rows
            first, second = (text, empty) if self.settings.mode == "compat" else (empty, text)
            prediction = first + self.settings.guidance * (second - first)
        return scaled_maps(self.call.clean_direction(prediction, samples, step_idx=step_idx)).cpu()


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
