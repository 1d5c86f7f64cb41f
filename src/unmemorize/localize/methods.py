"""The localizers of language models by name, and their settings.

A method gives every neuron of the layers that are not left out a score; docs/localize_language.md defines them and says
where each one misleads. The formulas are in `attribution.py`, the passes in `gradients.py`, `masks.py` and
`outliers.py`.

Source: Chang, Thomason and Jia 2024; "gradient", "contrast" and "outliers" are ours (the last after Hintersdorf et al.
2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from unmemorize.corpus.memorized import MemorizedExample
from unmemorize.errors import ConfigError
from unmemorize.localize.attribution import Reading
from unmemorize.localize.gradients import (
    Tick,
    activations,
    contrast,
    gradient,
    integrated_gradients,
    output_norms,
    zero_out,
)
from unmemorize.localize.masks import LearnedMask, MaskSettings, hard_concrete, slimming
from unmemorize.localize.neuron_scores import NeuronScores
from unmemorize.localize.neuron_statistics import NeuronStatistics, Quantity
from unmemorize.localize.outliers import outlier_scores
from unmemorize.neurons import Site
from unmemorize.records import Progress, ProgressCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal[
    "random",
    "magnitude",
    "activations",
    "outliers",
    "gradient",
    "contrast",
    "slimming",
    "integrated-gradients-together",
    "hard-concrete",
    "integrated-gradients",
    "zero-out",
]
METHODS: tuple[Method, ...] = get_args(Method)

COMPARED: Mapping[str, Quantity] = MappingProxyType({"outliers": "activation", "contrast": "derivative"})
"""Methods that compare with ordinary texts, and the statistics they take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalizeSettings:
    """How neurons are scored.

    Attributes:
        batch_size: rows per pass: examples, points of a path, or neurons that are left out.
        seed: seed of "random" and "hard-concrete".
        reading: "activations": the paper's mean of |a| ("absolute") or the released code's |mean of a| ("signed").
        num_points: integrated gradients: points from off to on.
        num_candidates: "zero-out": neurons to try, the best by `candidate_method`; None tries all.
        candidate_method: what chooses them.
        slimming: how its mask is learned.
        hard_concrete: how its mask is learned.
        exclude_layers: numbers of layers that are left alone: not masked, not examined (the published removal
            experiments leave out layer 0).
        is_forced: whether to score examples none of which the model recites.
    """

    batch_size: int = 8
    seed: int = 0
    reading: Reading = "absolute"
    num_points: int = 20
    num_candidates: int | None = None
    candidate_method: Method = "gradient"
    slimming: MaskSettings = field(default_factory=lambda: MaskSettings(price_nats=0.001))
    hard_concrete: MaskSettings = field(default_factory=lambda: MaskSettings(price_nats=0.03))
    exclude_layers: tuple[int, ...] = ()
    is_forced: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.batch_size < 1 or (self.num_candidates is not None and self.num_candidates < 1):
            raise ConfigError(
                f"batch_size {self.batch_size} and num_candidates {self.num_candidates}; expected 1 or more"
            )
        if self.candidate_method not in METHODS or self.candidate_method in ("zero-out", *COMPARED):
            raise ConfigError(
                f"candidate_method is {self.candidate_method!r}; expected another method, such as 'gradient'"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the scores of all examples of a run have in common; `sites` are all of the model's."""

    model: PreTrainedModel
    model_id: str
    sites: tuple[Site, ...]
    settings: LocalizeSettings
    statistics: NeuronStatistics | None = None
    progress: ProgressCallback | None = None

    @property
    def searched(self) -> tuple[int, ...]:
        """Numbers of the layers that are not left out."""
        return tuple(i for i in range(len(self.sites)) if i not in self.settings.exclude_layers)


def score(
    job: Job, examples: Sequence[MemorizedExample], method: Method
) -> tuple[tuple[Tensor, ...], float, dict[str, Any]]:
    """Score neurons.

    Returns:
        Scores of shape (F,) per site, minus infinity in layers that are left out; forward-equivalents; figures of the
        run.
    """
    sites = tuple(job.sites[layer] for layer in job.searched)
    if method in ("slimming", "hard-concrete"):
        mask = _mask(job, sites, examples, method)
        found, cost, details = mask.values, mask.forward_equivalents, mask.details
    else:
        found, cost = _passes(job, sites, examples, method)
        details = {}
    values = [torch.full((site.width,), -math.inf) for site in job.sites]
    for layer, part in zip(job.searched, found, strict=True):
        values[layer] = part
    return tuple(values), cost, details


def _passes(
    job: Job, sites: tuple[Site, ...], examples: Sequence[MemorizedExample], method: Method
) -> tuple[tuple[Tensor, ...], float]:
    """Run a method that learns nothing."""
    model, settings, tick = job.model, job.settings, _tick(method, job.progress)
    size = settings.batch_size
    if method == "random":
        generator = torch.Generator().manual_seed(settings.seed)
        return tuple(torch.rand(site.width, generator=generator) for site in sites), 0.0
    if method == "magnitude":
        return output_norms(model, sites), 0.0
    if method == "activations":
        return activations(model, sites, examples, batch_size=size, reading=settings.reading, tick=tick)
    if method == "gradient":
        return gradient(model, sites, examples, batch_size=size, tick=tick)
    if method == "contrast":
        assert job.statistics is not None
        means, squares = (
            [values[layer] for layer in job.searched]
            for values in (job.statistics.means, job.statistics.mean_squares)
        )
        return contrast(gradient(model, sites, examples, batch_size=size, tick=tick), means, squares)
    if method == "outliers":
        assert job.statistics is not None
        found, cost = outlier_scores(model, job.model_id, examples, job.statistics, batch_size=size)
        return tuple(found[layer] for layer in job.searched), cost
    if method == "zero-out":
        return _zero_out(job, sites, examples, tick)
    together, points = method == "integrated-gradients-together", settings.num_points
    return integrated_gradients(
        model, sites, examples, batch_size=size, num_points=points, is_together=together, tick=tick
    )


def _zero_out(
    job: Job, sites: tuple[Site, ...], examples: Sequence[MemorizedExample], tick: Tick | None
) -> tuple[tuple[Tensor, ...], float]:
    """Leave out all neurons, or the best of a cheap method."""
    settings, candidates, cost = job.settings, None, 0.0
    if settings.num_candidates is not None:
        how = settings.candidate_method
        values, cost, _ = score(job, examples, how)
        searched = tuple(values[layer] for layer in job.searched)
        cheap = NeuronScores(model_id=job.model_id, sites=sites, values=searched, method=how)
        candidates = cheap.ranked()[: settings.num_candidates]
    found, own_cost = zero_out(
        job.model, sites, examples, batch_size=settings.batch_size, candidates=candidates, tick=tick
    )
    return found, cost + own_cost


def _mask(
    job: Job, sites: tuple[Site, ...], examples: Sequence[MemorizedExample], method: Method
) -> LearnedMask:
    settings, size, progress = job.settings, job.settings.batch_size, job.progress
    if method == "slimming":
        return slimming(job.model, sites, examples, settings.slimming, batch_size=size, progress=progress)
    choice, seed = settings.hard_concrete, settings.seed
    return hard_concrete(job.model, sites, examples, choice, seed=seed, batch_size=size, progress=progress)


def _tick(method: str, progress: ProgressCallback | None) -> Tick | None:
    if progress is None:
        return None
    report: Callable[[Progress], None] = progress
    return lambda done, total: report(Progress(method, done, total, "passes"))
