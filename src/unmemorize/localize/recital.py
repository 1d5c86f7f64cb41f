"""NeMo for language models, second half: the few neurons without which a text is no longer recited.

The search is the one used for pictures (`search.py`), with another effect: how much of a recital is left when neurons
are off, 1 when nothing has changed. It takes any ranking: outliers, as in NeMo, or the scores of another localizer.
With several examples it looks for one set that breaks them all. What `search_log.py` keeps, an interrupted search does
not measure again.

Source: Hintersdorf et al. 2024 (threshold search, refinement), for text-to-image models; both effects are ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from unmemorize.corpus.memorized import MemorizedExample
from unmemorize.errors import ConfigError
from unmemorize.gates import closed
from unmemorize.localize.neuron_scores import NeuronScores, ScoringCost
from unmemorize.localize.search import (
    Entries,
    Neuron,
    SearchSettings,
    candidate_sets,
    refine,
    select,
    smallest,
)
from unmemorize.localize.search_log import SearchLog
from unmemorize.localize.suffix import device_of, measured
from unmemorize.models.language import MlpRow, fingerprint, require_same_model
from unmemorize.neurons import NeuronSet, Site
from unmemorize.records import Progress, ProgressCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EffectKind = Literal["likelihood", "recital"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakSettings:
    """When a recital counts as broken, and how the neurons that hold it are searched for.

    Attributes:
        effect: "likelihood": geometric mean probability of a suffix token, relative to the model as it is; "recital":
            share of the suffix that is recited before the first mistake.
        threshold_frac: the recital is broken where the effect is at most this, 0 to 1.
        search: "bisection" over prefixes of the ranking (few passes, no neuron left over), or "growing" sets and one
            pass of leaving out, as the released code of NeMo does (outliers only).
        growing: schedule of the growing sets.
        gives_up: bisection: whether to return all candidates at once when no prefix of the ranking breaks the recital;
            otherwise the search goes on with what all of them together leave as the threshold.
        batch_size: examples per pass.
    """

    effect: EffectKind = "likelihood"
    threshold_frac: float = 0.5
    search: Literal["bisection", "growing"] = "bisection"
    growing: SearchSettings = field(default_factory=SearchSettings)
    gives_up: bool = False
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 <= self.threshold_frac < 1 or self.batch_size < 1:
            raise ConfigError(
                f"threshold_frac {self.threshold_frac} and batch_size {self.batch_size}; expected a fraction below 1, "
                "and 1 or more"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """The neurons without which recitals are broken.

    Attributes:
        neurons: what was found.
        effects_frac: effect left with them off, per example.
        is_broken: whether every effect is at most the threshold; if not, nothing tried reached it.
        threshold_frac: threshold used; where all candidates together did not reach the one asked for, what they did.
        num_evaluated: sets of neurons that were switched off.
        cost: passes and seconds, without those of the scores; with those of an interrupted search that was continued.
    """

    neurons: NeuronSet
    effects_frac: tuple[float, ...]
    is_broken: bool
    threshold_frac: float
    num_evaluated: int
    cost: ScoringCost


def smallest_set(
    model: PreTrainedModel,
    examples: Sequence[MemorizedExample],
    scores: NeuronScores,
    settings: BreakSettings | None = None,
    *,
    row: MlpRow | None = None,
    path: str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> Broken:
    """Find a small set of neurons that breaks the recital of all examples, along a ranking.

    Args:
        model: the model; it is left as it was.
        examples: recited examples.
        scores: any localizer's scores on this model; the search looks at neurons in their order.
        settings: by default half the likelihood, by bisection.
        row: site table row, for an architecture that the table does not know.
        path: file that gets a line after every set that was switched off, and that an interrupted search continues
            from; what it holds of other weights, examples, devices or versions is begun anew.
        progress: called after every set that was switched off, those that the file answers included; how many there
            will be is not known.

    Raises:
        ConfigError: if growing sets are asked for with scores that are no outliers.
        NeuronSetMismatch: if the scores belong to another model.
        RunFolderError: if the file cannot be written.
    """
    settings = settings or BreakSettings()
    require_same_model(NeuronSet(scores.model_id, {}), model, row)
    if settings.search == "growing" and scores.method != "outliers":
        raise ConfigError(
            f"growing sets follow z-scores, these scores are by {scores.method!r}; use search='bisection'"
        )
    started = time.monotonic()
    log = SearchLog(path, {} if path is None else _inputs(model, examples, settings, row))
    effect = _Effect(model, examples, scores, settings, log, progress)
    samples = range(len(examples))
    if settings.search == "bisection":
        found = smallest(
            scores.ranked(), effect, settings.threshold_frac, samples, gives_up=settings.gives_up
        )
        chosen, threshold = found.neurons, found.threshold
    else:
        chosen, threshold = _grown(scores, lambda neurons: effect(neurons, samples), settings)
    left = effect(chosen, samples)
    return Broken(
        neurons=effect.neuron_set(chosen),
        effects_frac=left,
        is_broken=max(left) <= settings.threshold_frac,
        threshold_frac=threshold,
        num_evaluated=len(effect.sets_seen),
        cost=ScoringCost(
            forward_equivalents=float(effect.num_passes),
            seconds=time.monotonic() - started + log.earlier_s,
        ),
    )


def _inputs(
    model: PreTrainedModel, examples: Sequence[MemorizedExample], settings: BreakSettings, row: MlpRow | None
) -> dict[str, Any]:
    """Return what measurements follow from, beside the neurons that are off."""
    return {
        "model_id": fingerprint(model, row),
        "device": str(device_of(model)),
        "examples": [example.digest for example in examples],
        "batch_size": settings.batch_size,
        "versions": {name: version(name) for name in ("unmemorize", "torch", "transformers")},
    }


def _grown(
    scores: NeuronScores, effect: Callable[[Sequence[Neuron]], tuple[float, ...]], settings: BreakSettings
) -> tuple[tuple[Neuron, ...], float]:
    """Search as the released code of NeMo does: sets grow until one breaks the recital, then entries are left out."""
    limit = settings.threshold_frac
    search = replace(settings.growing, selection_threshold=limit, refinement_threshold=limit)

    def on_entries(entries: Entries) -> tuple[float, ...]:
        return effect([(layer, index) for layer, chosen in enumerate(entries) for index in chosen])

    sets = candidate_sets(scores.values, scores.values, search, is_compat=False)
    selection = select(sets, on_entries, search)
    refined = refine(selection.entries, on_entries, selection.threshold, search.relative_threshold)
    chosen = tuple((layer, index) for layer, indices in enumerate(refined.entries) for index in indices)
    return chosen, selection.threshold


class _Effect:
    """How much of each recital is left with neurons off; remembers what it has computed.

    Sets and passes are counted as the search asks for them, whether the log answers or the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Sequence[MemorizedExample],
        scores: NeuronScores,
        settings: BreakSettings,
        log: SearchLog,
        progress: ProgressCallback | None = None,
    ) -> None:
        self._model, self._examples, self._scores, self._settings = model, examples, scores, settings
        self._log, self._progress = log, progress
        self._known: dict[tuple[int, frozenset[Neuron]], float] = {}
        self.num_passes = len(examples)
        self.sets_seen: set[frozenset[Neuron]] = set()
        self._plain, _ = self._measured((), range(len(examples)))

    def neuron_set(self, neurons: Iterable[Neuron]) -> NeuronSet:
        indices: dict[Site, list[int]] = {}
        for layer, index in neurons:
            indices.setdefault(self._scores.sites[layer], []).append(index)
        return NeuronSet(self._scores.model_id, {site: tuple(chosen) for site, chosen in indices.items()})

    def __call__(self, neurons: Sequence[Neuron], samples: Sequence[int]) -> tuple[float, ...]:
        off = frozenset(neurons)
        missing = [sample for sample in samples if (sample, off) not in self._known]
        if missing:
            losses, recited = self._measured(off, missing)
            if self._settings.effect == "likelihood":
                left = (self._plain[missing] - losses).exp()
            else:
                left = recited / torch.tensor([len(self._examples[sample].suffix) for sample in missing])
            self._known.update({(sample, off): float(e) for sample, e in zip(missing, left, strict=True)})
            self.num_passes += len(missing)
            if self._progress is not None and off not in self.sets_seen:
                done = len(self.sets_seen) + 1
                self._progress(Progress("search", done, 0, "sets", f"{len(off)} neurons off"))
            self.sets_seen.add(off)
        return tuple(self._known[sample, off] for sample in samples)

    def _measured(self, off: Iterable[Neuron], samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        neurons = self.neuron_set(off)

        def measure() -> tuple[Tensor, Tensor]:
            gates: dict[Site, Any] = closed(neurons)
            some = [self._examples[sample] for sample in samples]
            return measured(self._model, some, batch_size=self._settings.batch_size, gates=gates)

        return self._log.measured(neurons, samples, measure)
