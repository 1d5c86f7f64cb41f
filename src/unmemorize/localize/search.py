"""Searches for the neurons that hold a memory. Family-free: a search calls an effect and knows no model.

An effect tells how much of a memory is left when neurons are off: a score per sample, 1 when nothing has changed. The
memory counts as broken when the largest score is at most the threshold. Two searches:

- `select` and `refine` do what the released code of NeMo does: candidate sets that grow step by step, then one pass of
  leaving out, first whole layers, then single entries;
- `smallest` orders the candidates by how unusual they are and bisects over prefixes: the last neuron of the smallest
  prefix that breaks the memory is needed, given those before it; with it off, the rest is bisected again. It needs
  about (k + 1) log2(n) evaluations for k neurons out of n, and ends with leaving out each neuron found.

Source: Hintersdorf et al. 2024 (Finding NeMo), section 3.2 and released code; `smallest` is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmemorize.errors import ConfigError

Entries = tuple[tuple[int, ...], ...]
"""Neuron indices by site, in the order they were chosen; an index may occur twice."""

Neuron = tuple[int, int]
"""(number of the site, index)."""

Effect = Callable[[Entries], tuple[float, ...]]
"""Entries that are off -> score per kept sample."""

_MAX_K = 1280  # the released code's bound, the width of its widest layer


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How candidates are chosen and when a memory counts as broken. Defaults: the released code's.

    Attributes:
        gate_threshold: best match between samples above which an example is memorized, unitless.
        selection_threshold: score that candidate sets are grown until, unitless.
        refinement_threshold: score below which an entry may be left out, unitless.
        relative_threshold: if set, an entry is left out while the score's relative change stays below it, unitless.
        initial_theta: first threshold on absolute z-scores, in standard deviations; infinite for none.
        theta_step: by how much it falls from set to set, in standard deviations.
        min_theta: where it stops falling, in standard deviations.
        initial_k: neurons of largest activation per site in the first set.
        has_top_k: whether one more is added per set.
        scale: factor of a neuron that is off, unitless.
    """

    gate_threshold: float = 0.428
    selection_threshold: float = 0.428
    refinement_threshold: float = 0.428
    relative_threshold: float | None = None
    initial_theta: float = 5.0
    theta_step: float = 0.25
    min_theta: float = 1.0
    initial_k: int = 0
    has_top_k: bool = True
    scale: float = 0.0

    def __post_init__(self) -> None:
        if not self.theta_step > 0 or self.initial_k < 0 or self.initial_theta < self.min_theta:
            raise ConfigError(
                f"theta falls from {self.initial_theta} to {self.min_theta} by {self.theta_step} with k from "
                f"{self.initial_k}; expected a fall by more than 0, and k of 0 or more"
            )
        if math.isinf(self.initial_theta) and not self.has_top_k:
            raise ConfigError("neither theta nor top-k chooses any neuron; switch one of them on")

    def at(self, threshold: float) -> SearchSettings:
        """Return the settings with one threshold, unitless, for gate, selection and refinement, as published."""
        return replace(
            self,
            gate_threshold=threshold,
            selection_threshold=threshold,
            refinement_threshold=threshold,
        )


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """Entries with an absolute z-score above theta, then the k of largest activation, per site."""

    theta: float
    k: int
    entries: Entries


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluated set: what was changed, scores per kept sample, and the value that was compared."""

    label: tuple[float, ...]
    entries: Entries
    scores: tuple[float, ...]
    value: float
    is_dropped: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """Outcome of `select`: every set tried, the last one, and the threshold that refinement uses."""

    trials: tuple[Trial, ...]
    entries: Entries
    score: float
    threshold: float
    is_replaced: bool


@dataclass(frozen=True, slots=True)
class Refinement:
    """Outcome of `refine`: all trials in order, and what is left."""

    all_off_scores: tuple[float, ...]
    layer_trials: tuple[Trial, ...]
    neuron_trials: tuple[Trial, ...]
    entries: Entries
    scores: tuple[float, ...]


def candidate_sets(
    activations: Sequence[Tensor], z: Sequence[Tensor], settings: SearchSettings, *, is_compat: bool
) -> Iterator[CandidateSet]:
    """Yield growing candidate sets.

    Args:
        activations: mean absolute activation of the example, shape (F,) per site.
        z: z-scores, shape (F,) per site, in standard deviations.
        settings: the schedule.
        is_compat: whether to stop as the released code does (when theta is exactly 1, which is itself never tried, or k
            reaches 1280) and to list a neuron twice that meets both conditions. Otherwise theta goes down to its
            minimum inclusive, the top-k part stops at the widest site, and every neuron is listed once.
    """
    theta, k = float(settings.initial_theta), settings.initial_k
    ranked = [activation.sort(descending=True, stable=True).indices.tolist() for activation in activations]
    while True:
        unusual = [(scores.abs() > theta).nonzero().flatten().tolist() for scores in z]
        entries = tuple(tuple(chosen + order[:k]) for chosen, order in zip(unusual, ranked, strict=True))
        if not is_compat:
            entries = tuple(tuple(dict.fromkeys(chosen)) for chosen in entries)
        yield CandidateSet(theta, k, entries)
        if is_compat:
            before = (theta, k)
            theta = theta - settings.theta_step if theta > settings.min_theta else theta
            k += settings.has_top_k
            if theta == 1 or k >= _MAX_K or (theta, k) == before:
                return
        else:
            is_complete = all(
                len(chosen) == len(order) for chosen, order in zip(entries, ranked, strict=True)
            )
            if is_complete or theta - settings.theta_step < settings.min_theta:
                return
            theta, k = theta - settings.theta_step, k + settings.has_top_k


def select(sets: Iterator[CandidateSet], effect: Effect, settings: SearchSettings) -> Selection:
    """Try growing sets until one breaks the memory.

    If none does, the last set is kept and the score that it reached becomes the threshold of the refinement.
    """
    trials: list[Trial] = []
    for candidates in sets:
        scores = effect(candidates.entries)
        trials.append(Trial((candidates.theta, float(candidates.k)), candidates.entries, scores, max(scores)))
        if not max(scores) > settings.selection_threshold:
            break
    last = trials[-1]
    is_replaced = last.value > settings.selection_threshold
    threshold = last.value if is_replaced else settings.refinement_threshold
    return Selection(tuple(trials), last.entries, last.value, threshold, is_replaced)


def refine(
    entries: Entries, effect: Effect, threshold: float, relative_threshold: float | None = None
) -> Refinement:
    """Leave out whole layers, then single entries, from the last layer to the first, while the memory stays broken.

    One pass, in stored order; an entry listed twice loses one copy at a time.

    Args:
        entries: the set to start from.
        effect: the effect.
        threshold: an entry is dropped if the largest score without it is below, unitless.
        relative_threshold: if set, compared with the largest relative change of a score instead.
    """
    all_off = effect(entries)
    limit = threshold if relative_threshold is None else relative_threshold

    def tried(label: tuple[float, ...], remaining: Entries) -> Trial:
        scores = effect(remaining)
        value = max(scores)
        if relative_threshold is not None:
            value = _largest_change(scores, all_off)
        return Trial(label, remaining, scores, value, value < limit)

    layer_trials: list[Trial] = []
    for layer in reversed(range(len(entries))):
        if entries[layer]:
            trial = tried((layer,), (*entries[:layer], (), *entries[layer + 1 :]))
            layer_trials.append(trial)
            entries = trial.entries if trial.is_dropped else entries
    neuron_trials: list[Trial] = []
    for layer in reversed(range(len(entries))):
        for neuron in entries[layer]:
            place = entries[layer].index(neuron)
            fewer = (*entries[layer][:place], *entries[layer][place + 1 :])
            trial = tried((layer, neuron), (*entries[:layer], fewer, *entries[layer + 1 :]))
            neuron_trials.append(trial)
            entries = trial.entries if trial.is_dropped else entries
    return Refinement(all_off, tuple(layer_trials), tuple(neuron_trials), entries, effect(entries))


def _largest_change(scores: tuple[float, ...], all_off: tuple[float, ...]) -> float:
    """Return the largest |score - all off| / (|all off| + 1e-9), in float32 as the scores are."""
    now, before = torch.tensor(scores), torch.tensor(all_off)
    return float(((now - before).abs() / (before.abs() + 1e-9)).max())


SampleEffect = Callable[[Sequence[Neuron], Sequence[int]], tuple[float, ...]]
"""(neurons that are off, samples) -> score of each of these samples. Must remember what it has computed."""


@dataclass(frozen=True, slots=True)
class Found:
    """Outcome of `smallest`.

    Attributes:
        neurons: what was found.
        prefix: the shortest prefix of the order that was seen to break the memory.
        prefix_score: its largest score over the samples searched on.
        threshold: the threshold used, unitless.
        is_replaced: whether nothing broke the memory, so that the score of all candidates became the threshold.
        scores: score per sample with the neurons off.
    """

    neurons: tuple[Neuron, ...]
    prefix: tuple[Neuron, ...]
    prefix_score: float
    threshold: float
    is_replaced: bool
    scores: tuple[float, ...]


def smallest(
    order: Sequence[Neuron],
    effect: SampleEffect,
    threshold: float,
    samples: Sequence[int],
    *,
    gives_up: bool = False,
) -> Found:
    """Find a small set of neurons without which the memory is broken in every sample.

    The search looks at one sample; what it finds is verified on all, and the sample that fails worst joins the search.

    Args:
        order: candidates, the most promising first.
        effect: the effect.
        threshold: the memory is broken where the score is at most this, unitless.
        samples: the samples in which it has to be broken, at least one.
        gives_up: whether to return all candidates at once if no prefix of them breaks the memory; otherwise the score
            that all of them reach becomes the threshold.
    """
    if not order:
        scores = effect((), samples)
        return Found((), (), max(scores), max(scores), True, scores)
    limit, is_replaced = threshold, False
    active = [samples[0]]
    while True:
        breaks = _breaking(effect, tuple(active), limit)
        length = _broken_prefix((), order, breaks)
        if length is None:
            scores = effect(order, samples)
            limit, is_replaced = max(scores), True
            if gives_up:
                return Found(tuple(order), tuple(order), limit, limit, is_replaced, scores)
            continue
        prefix = tuple(order[:length])
        needed = _needed(prefix, breaks)
        scores = effect(needed, samples)
        worst = max(range(len(samples)), key=lambda i: scores[i])
        if scores[worst] <= limit or samples[worst] in active:
            return Found(needed, prefix, max(effect(prefix, active)), limit, is_replaced, scores)
        active.append(samples[worst])


_Breaks = Callable[[Sequence[Neuron]], bool]


def _breaking(effect: SampleEffect, samples: Sequence[int], limit: float) -> _Breaks:
    """Return a test whether the memory is broken in all samples; it stops at the first where it is not."""
    return lambda neurons: all(effect(neurons, [sample])[0] <= limit for sample in samples)


def _broken_prefix(fixed: Sequence[Neuron], order: Sequence[Neuron], breaks: _Breaks) -> int | None:
    """Return how many of `order`, beside the fixed ones, break the memory; one less does not. None if no length does.

    Lengths double first; if none breaks, the lengths between are tried before giving up.
    """
    doubled = [1 << power for power in range(len(order).bit_length()) if 1 << power < len(order)]
    between = [3 * length // 2 for length in doubled if length > 1 and 3 * length // 2 < len(order)]
    failed = [0]
    for high in (*doubled, len(order), *between):
        if breaks([*fixed, *order[:high]]):
            low = max(length for length in failed if length < high)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if breaks([*fixed, *order[:middle]]) else (middle, high)
            return high
        failed.append(high)
    return None


def _needed(prefix: Sequence[Neuron], breaks: _Breaks) -> tuple[Neuron, ...]:
    """Reduce a breaking prefix to neurons none of which can be left out alone."""
    needed, rest = [prefix[-1]], list(prefix[:-1])
    while rest and not breaks(needed):
        length = _broken_prefix(needed, rest, breaks)
        assert length is not None, (
            "a prefix that broke the memory breaks it no more: the effect is not repeatable"
        )
        needed.append(rest[length - 1])
        rest = rest[: length - 1]
    for neuron in list(needed):
        fewer = [other for other in needed if other != neuron]
        if fewer and breaks(fewer):
            needed = fewer
    return tuple(needed)
