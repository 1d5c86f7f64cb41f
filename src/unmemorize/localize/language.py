"""Which neurons of a language model hold texts that it recites. One front for all localizers.

A neuron is an input channel of the MLP's last projection: its activation is act(up(x)), or act(gate(x)) * up(x) in a
gated MLP. Every localizer gives each neuron a score (`NeuronScores`); `top` makes a neuron set of them, and
`recital.smallest_set` looks for the few neurons without which a text is no longer recited.

Methods, cheapest first: "random" and "magnitude" (controls), "activations", "outliers", "gradient", "slimming",
"integrated-gradients-together", "hard-concrete", "integrated-gradients", "zero-out". docs/localize_language.md defines
them and says where each one misleads. The formulas are in `attribution.py`, the passes in `gradients.py`, `masks.py`
and `outliers.py`.

Source: Chang, Thomason and Jia 2024; "gradient" and "outliers" are ours (the latter after Hintersdorf et al. 2024).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from unmemorize.corpus.memorized import MemorizedExample
from unmemorize.errors import ConfigError, DataError
from unmemorize.localize.attribution import Reading
from unmemorize.localize.gradients import (
    Scored,
    Tick,
    activations,
    gradient,
    integrated_gradients,
    output_norms,
    zero_out,
)
from unmemorize.localize.masks import LearnedMask, MaskSettings, hard_concrete, slimming
from unmemorize.localize.neuron_scores import NeuronScores, ScoringCost, load_scores
from unmemorize.localize.outliers import outlier_scores
from unmemorize.localize.results import start_folder
from unmemorize.localize.scores import ActivationStatistics
from unmemorize.localize.suffix import measured, require_fitting
from unmemorize.models.language import MlpRow, find_mlps, fingerprint
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
    "slimming",
    "integrated-gradients-together",
    "hard-concrete",
    "integrated-gradients",
    "zero-out",
]
METHODS: tuple[Method, ...] = get_args(Method)

_CONTROLS = ("random", "magnitude")


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
    is_forced: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.batch_size < 1 or (self.num_candidates is not None and self.num_candidates < 1):
            raise ConfigError(
                f"batch_size {self.batch_size} and num_candidates {self.num_candidates}; expected 1 or more"
            )
        if self.candidate_method not in METHODS or self.candidate_method in ("zero-out", "outliers"):
            raise ConfigError(
                f"candidate_method is {self.candidate_method!r}; expected another method, such as 'gradient'"
            )


def localize(
    model: PreTrainedModel,
    examples: Sequence[MemorizedExample],
    method: Method = "gradient",
    settings: LocalizeSettings | None = None,
    *,
    statistics: ActivationStatistics | None = None,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> NeuronScores:
    """Score every neuron by how much it holds of a set of memorized examples.

    Args:
        model: a causal language model; it is left as it was.
        examples: one example, or several that are scored together: their scores are averaged, learned masks are shared.
        method: one of `METHODS`.
        settings: by default `LocalizeSettings()`.
        statistics: "outliers": activations on ordinary text (`collect_statistics`).
        row: site table row, for an architecture that the table does not know.
        progress: called during the work.

    Raises:
        DataError: if there are no examples, the model cannot read one, or it recites none of them.
        ConfigError: if the method is unknown, or lacks its statistics.
        NeuronSetMismatch: if the statistics belong to another model.
    """
    return next(iter(_localized(model, [examples], method, settings, statistics, row, progress)))


def localize_each(
    model: PreTrainedModel,
    examples: Sequence[MemorizedExample],
    method: Method = "gradient",
    settings: LocalizeSettings | None = None,
    *,
    statistics: ActivationStatistics | None = None,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> Iterator[NeuronScores]:
    """Score neurons for each example by itself, one result after the other; arguments and errors as for `localize`.

    Examples that are not recited are scored too as long as one is; `details["is_recited"]` tells.
    """
    return _localized(model, [[example] for example in examples], method, settings, statistics, row, progress)


def localize_into(
    folder: str | Path,
    model: PreTrainedModel,
    examples: Sequence[MemorizedExample],
    method: Method = "gradient",
    settings: LocalizeSettings | None = None,
    *,
    statistics: ActivationStatistics | None = None,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> list[NeuronScores]:
    """Do what `localize_each` does, keep every result in a run folder, and continue there if interrupted.

    The folder gets `localization.json` and `scores/<digest of the example>.safetensors`.

    Raises:
        RunFolderError: if the folder holds a run with another model, method, settings or statistics.
    """
    settings = settings or LocalizeSettings()
    header = {
        "family": "language",
        "model_id": fingerprint(model, row),
        "method": method,
        "settings": asdict(settings),
        "statistics": None if statistics is None else [statistics.model_id, statistics.digest],
    }
    start_folder(folder, header)
    paths = {
        example.digest: Path(folder) / "scores" / f"{example.digest}.safetensors" for example in examples
    }
    found = {digest: load_scores(path) for digest, path in paths.items() if path.is_file()}
    missing = {example.digest: example for example in examples if example.digest not in found}
    if missing or not examples:
        groups = [[example] for example in missing.values()]
        for scores in _localized(
            model, groups, method, settings, statistics, row, progress, examples=examples
        ):
            (digest,) = scores.examples
            scores.save(paths[digest])
            found[digest] = scores
    return [found[example.digest] for example in examples]


def _localized(
    model: PreTrainedModel,
    groups: Sequence[Sequence[MemorizedExample]],
    method: Method,
    settings: LocalizeSettings | None,
    statistics: ActivationStatistics | None,
    row: MlpRow | None,
    progress: ProgressCallback | None,
    examples: Sequence[MemorizedExample] | None = None,
) -> Iterator[NeuronScores]:
    """Check arguments at once, then score group by group; `examples` are those checked, by default those scored."""
    settings = settings or LocalizeSettings()
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if (method == "outliers") != (statistics is not None):
        raise ConfigError(
            "'outliers' compares with ordinary text: pass statistics= as collect_statistics returns them"
            if statistics is None
            else f"{method!r} takes no statistics; leave them out or use 'outliers'"
        )
    everything = [example for group in groups for example in group] if examples is None else examples
    require_fitting(model, everything)
    is_recited = _require_recited(model, everything, settings)
    sites = tuple(mlp.site for mlp in find_mlps(model, row))
    model_id = fingerprint(model, row)

    def results() -> Iterator[NeuronScores]:
        for number, group in enumerate(groups, start=1):
            started = time.monotonic()
            values, cost, details = _scored(
                model, model_id, sites, group, method, settings, statistics, progress
            )
            recited = [is_recited[example.digest] for example in group]
            yield NeuronScores(
                model_id=model_id,
                sites=sites,
                values=values,
                method=method,
                cost=ScoringCost(forward_equivalents=cost, seconds=time.monotonic() - started),
                examples=tuple(example.digest for example in group),
                details={"settings": asdict(settings), "is_recited": recited, **details},
            )
            if progress is not None and len(groups) > 1:
                progress(Progress("localize", number, len(groups), "examples", method))

    return results()


def _require_recited(
    model: PreTrainedModel, examples: Sequence[MemorizedExample], settings: LocalizeSettings
) -> dict[str, bool]:
    """Measure which examples are recited, by digest, and refuse if none is."""
    _, tokens = measured(model, examples, batch_size=settings.batch_size)
    shares = [int(n) / len(example.suffix) for n, example in zip(tokens, examples, strict=True)]
    if max(shares) < 1 and not settings.is_forced:
        raise DataError(
            f"the model recites 0 of {len(examples)} examples (the best goes wrong after {max(shares):.0%} of its "
            "suffix), so there is no memory to localize; pass memorized texts, a shorter suffix, or is_forced=True"
        )
    return {example.digest: share == 1 for example, share in zip(examples, shares, strict=True)}


def _scored(
    model: PreTrainedModel,
    model_id: str,
    sites: tuple[Site, ...],
    examples: Sequence[MemorizedExample],
    method: Method,
    settings: LocalizeSettings,
    statistics: ActivationStatistics | None,
    progress: ProgressCallback | None,
) -> tuple[tuple[torch.Tensor, ...], float, dict[str, Any]]:
    """Return scores, forward-equivalents and figures of the run."""
    size, tick = settings.batch_size, _tick(method, progress)
    details: dict[str, Any] = {}
    learned: LearnedMask | None = None
    scored: Scored
    if method in _CONTROLS:
        scored = _control(model, sites, method, settings.seed), 0.0
    elif method == "activations":
        scored = activations(model, sites, examples, batch_size=size, reading=settings.reading, tick=tick)
    elif method == "gradient":
        scored = gradient(model, sites, examples, batch_size=size, tick=tick)
    elif method == "outliers":
        assert statistics is not None
        scored = outlier_scores(model, model_id, examples, statistics, batch_size=size)
    elif method in ("integrated-gradients", "integrated-gradients-together"):
        is_together = method.endswith("together")
        points = settings.num_points
        scored = integrated_gradients(
            model, sites, examples, batch_size=size, num_points=points, is_together=is_together, tick=tick
        )
    elif method == "zero-out":
        candidates, cost = None, 0.0
        if settings.num_candidates is not None:
            how = settings.candidate_method
            values, cost, _ = _scored(model, model_id, sites, examples, how, settings, None, progress)
            cheap = NeuronScores(model_id=model_id, sites=sites, values=values, method=how)
            candidates = cheap.ranked()[: settings.num_candidates]
        values, own_cost = zero_out(model, sites, examples, batch_size=size, candidates=candidates, tick=tick)
        scored = values, cost + own_cost
    elif method == "slimming":
        learned = slimming(model, sites, examples, settings.slimming, batch_size=size, progress=progress)
    else:
        choice, seed = settings.hard_concrete, settings.seed
        learned = hard_concrete(model, sites, examples, choice, seed=seed, batch_size=size, progress=progress)
    if learned is not None:
        scored, details = (learned.values, learned.forward_equivalents), learned.details
    return *scored, details


def _control(
    model: PreTrainedModel, sites: Sequence[Site], method: str, seed: int
) -> tuple[torch.Tensor, ...]:
    """Score at random, or by the norm of what a neuron writes."""
    if method == "magnitude":
        return output_norms(model, sites)
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(site.width, generator=generator) for site in sites)


def _tick(method: str, progress: ProgressCallback | None) -> Tick | None:
    if progress is None:
        return None
    report: Callable[[Progress], None] = progress
    return lambda done, total: report(Progress(method, done, total, "passes"))
