"""What happens to prompts that are localized: the released procedure for one, the fast one for one or several.

    released   gate on all samples, candidate sets that grow until one breaks the memory, one pass of leaving out
    fast       gate on few samples, bisection on one, verified on all; several prompts share one set of neurons

With several members (near duplicates that reproduce the same picture) a score belongs to one sample of one member, and
the memory is broken when it is broken in every kept sample of every member that passed the gate.

Passes are made in `passes.py`; nothing here writes files.

Source: Hintersdorf et al. 2024 and its released code; the fast procedure is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unmemorize.localize.activations import activations_of
from unmemorize.localize.neuron_statistics import NeuronStatistics
from unmemorize.localize.orders import importance_order, slope_order
from unmemorize.localize.passes import NemoSettings, Passes, first_step
from unmemorize.localize.results import PromptResult
from unmemorize.localize.scores import best_match, map_similarity, pair_similarities, z_scores
from unmemorize.localize.search import Entries, Found, Neuron, candidate_sets, refine, select, smallest
from unmemorize.models.denoising import Pipeline
from unmemorize.models.diffusion import DenoiserRow, row_for


@dataclass(frozen=True, slots=True)
class Member:
    """One prompt with its passes; activations are computed when first asked for."""

    pipe: Pipeline
    prompt: str
    statistics: NeuronStatistics
    settings: NemoSettings
    row: DenoiserRow | None
    passes: Passes

    @classmethod
    def start(
        cls,
        pipe: Pipeline,
        prompt: str,
        statistics: NeuronStatistics,
        settings: NemoSettings,
        row: DenoiserRow | None,
    ) -> Member:
        """Prepare the passes of one prompt; none is made yet."""
        passes = first_step(pipe, prompt, statistics.sites, settings)
        return cls(pipe, prompt, statistics, settings, row, passes)

    def scores(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return activations and z-scores, each one tensor of shape (F,) per site."""
        if (self.row or row_for(self.pipe)).has_joint_values or self.statistics.sites[0].side == "in":
            if self.passes.activations is None:
                self.passes.maps([(0, frozenset())], is_capturing=True)
            assert self.passes.activations is not None
            activations = list(self.passes.activations)
        else:
            (found,) = activations_of(
                self.pipe, [self.prompt], self.statistics.sites, self.statistics.positions, row=self.row
            )
            activations = list(found)
        stats = self.statistics
        z = [z_scores(a, m, s) for a, m, s in zip(activations, stats.means, stats.stds, strict=True)]
        return activations, z


@dataclass(frozen=True, slots=True)
class Look:
    """What the gate saw of one member.

    Attributes:
        plain: scaled maps with nothing closed, shape (N, C, H, W).
        pairs: similarities between samples, in order of the pairs, unitless.
        best: each sample's best match, shape (N,), unitless.
        kept: samples that passed the gate, the strongest first.
    """

    plain: Tensor
    pairs: tuple[float, ...]
    best: Tensor
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FastOutcome:
    """What `fast` found for its members: looks, and scores per kept sample (in the order of `Look.kept`)."""

    looks: tuple[Look, ...]
    found: Found | None
    scores: tuple[tuple[float, ...], ...]


def fast(members: Sequence[Member]) -> FastOutcome:
    """Find one small set of neurons that breaks the memory in all kept samples of every member.

    Members that do not pass the gate take no part. With one member this is `localize` in fast mode.

    Args:
        members: prompts of one model, with the same statistics and settings; at least one.
    """
    settings = members[0].settings
    looks = tuple(_look(member) for member in members)
    units = [(number, sample) for number, look in enumerate(looks) for sample in look.kept]
    if not units:
        return FastOutcome(looks, None, ((),) * len(members))
    units.sort(key=lambda unit: -float(looks[unit[0]].best[unit[1]]))
    remembered: dict[tuple[int, frozenset[Neuron]], float] = {}

    def effect(neurons: Sequence[Neuron], wanted: Sequence[int]) -> tuple[float, ...]:
        off = frozenset(neurons)
        missing = [unit for unit in wanted if (unit, off) not in remembered]
        for number in dict.fromkeys(units[unit][0] for unit in missing):
            own = [unit for unit in missing if units[unit][0] == number]
            samples = [units[unit][1] for unit in own]
            maps = members[number].passes.maps([(sample, off) for sample in samples])
            scores = map_similarity(looks[number].plain[samples], maps).tolist()
            remembered.update({(unit, off): score for unit, score in zip(own, scores, strict=True)})
        return tuple(remembered[unit, off] for unit in wanted)

    order = _order([(member, look) for member, look in zip(members, looks, strict=True) if look.kept])
    found = smallest(order, effect, settings.search.refinement_threshold, range(len(units)))
    by_unit = dict(zip(units, found.scores, strict=True))
    scores = tuple(
        tuple(by_unit[number, sample] for sample in look.kept) for number, look in enumerate(looks)
    )
    return FastOutcome(looks, found, scores)


def single(member: Member, outcome: FastOutcome) -> PromptResult:
    """Turn the outcome for one member into its result."""
    (look,), (scores,) = outcome.looks, outcome.scores
    cost = member.passes.cost
    cost.sample_forwards, cost.denoiser_calls = cost.sample_forwards_run, cost.denoiser_calls_run
    by_sample = dict(zip(look.kept, scores, strict=True))
    return PromptResult(
        prompt=member.prompt,
        is_memorized=bool(look.kept),
        best_pair=float(look.best.max()),
        pairs=look.pairs,
        cost=cost,
        kept=tuple(sorted(look.kept)),
        refined_scores=tuple(by_sample[sample] for sample in sorted(look.kept)),
        **found_fields(outcome.found, len(member.statistics.sites)),
    )


def found_fields(found: Found | None, num_sites: int) -> dict[str, Any]:
    """Return what results of prompts and of clusters say about the set that was found."""
    if found is None:
        return {}
    return {
        "initial": by_site(found.prefix, num_sites),
        "initial_score": found.prefix_score,
        "refined": by_site(found.neurons, num_sites),
        "refined_score": max(found.scores),
        "threshold": found.threshold,
        "is_replaced": found.is_replaced,
    }


def by_site(neurons: Iterable[Neuron], num_sites: int) -> Entries:
    """Sort neurons into one tuple of indices per site."""
    chosen: list[list[int]] = [[] for _ in range(num_sites)]
    for layer, index in neurons:
        chosen[layer].append(index)
    return tuple(tuple(sorted(indices)) for indices in chosen)


def _look(member: Member) -> Look:
    """Look at the first samples; at all of them if these leave doubt or show a memory."""
    settings, passes = member.settings, member.passes
    threshold = settings.search.gate_threshold
    first = min(settings.gate_samples, settings.samples)
    plain = passes.maps([(sample, frozenset()) for sample in range(first)], is_capturing=True)
    similarities, pairs = pair_similarities(plain)
    if first < settings.samples and float(similarities.max()) > settings.clear_frac * threshold:
        rest = passes.maps([(sample, frozenset()) for sample in range(first, settings.samples)])
        plain = torch.cat([plain, rest])
        similarities, pairs = pair_similarities(plain)
    best = best_match(similarities, pairs, len(plain))
    kept = [sample for sample in range(len(plain)) if best[sample] > threshold]
    kept.sort(key=lambda sample: -float(best[sample]))
    return Look(plain, tuple(similarities.tolist()), best, tuple(kept))


def _order(parts: Sequence[tuple[Member, Look]]) -> list[Neuron]:
    """Order the candidates of one or several members.

    Over several members: candidates are those of any of them (largest absolute z-score and activation), and what is
    unusual, or holds the memory, in all of them comes first (means of absolute z-scores and of slopes).
    """
    settings = parts[0][0].settings
    scored = [member.scores() for member, _ in parts]
    sites = range(len(parts[0][0].statistics.sites))
    typical = [torch.stack([z[i].abs() for _, z in scored]).mean(0) for i in sites]
    if settings.ranking == "gradient":
        try:
            slopes = [member.passes.slopes(look.kept[0], look.plain[look.kept[0]]) for member, look in parts]
            return slope_order([torch.stack([one[i] for one in slopes]).mean(0) for i in sites], typical)
        except torch.OutOfMemoryError:
            parts[0][0].passes.warn("out of memory in the backward pass; candidates are ordered by z-scores")
    activations = [torch.stack([a[i] for a, _ in scored]).amax(0) for i in sites]
    largest = [torch.stack([z[i].abs() for _, z in scored]).amax(0) for i in sites]
    return importance_order(candidate_sets(activations, largest, settings.search, is_compat=False), typical)


def released(member: Member) -> PromptResult:
    """Do what the released code (compat) or the paper's text (paper) does for one prompt."""
    settings, passes = member.settings, member.passes
    is_compat = settings.mode == "compat"
    ranges: Literal["call", "pair"] = "call" if is_compat else "pair"
    num_scales = 3 if is_compat else 1
    everyone = range(settings.samples)
    remembered: dict[frozenset[Neuron], Tensor] = {}

    def evaluated(off: frozenset[Neuron]) -> Tensor:
        """Return the maps of all samples; the released code computes all and then picks the kept ones."""
        passes.cost.denoiser_calls += 2 if is_compat else 1
        passes.cost.sample_forwards += (2 if is_compat else 1) * settings.samples * passes.call.rows
        if settings.is_reusing and off in remembered:
            return remembered[off]
        jobs = [(sample, off) for sample in everyone]
        if is_compat and not settings.is_reusing:
            passes.discard(jobs)
        maps = passes.maps(jobs)
        if settings.is_reusing:
            remembered[off] = maps
        return maps

    similarities, pairs = pair_similarities(evaluated(frozenset()), ranges=ranges, num_scales=num_scales)
    best = best_match(similarities, pairs, settings.samples)
    kept = [sample for sample in everyone if best[sample] > settings.search.gate_threshold]
    result: dict[str, Any] = {
        "prompt": member.prompt,
        "is_memorized": bool(kept),
        "best_pair": float(best.max()),
        "pairs": tuple(similarities.tolist()),
        "cost": passes.cost,
    }
    if not kept:
        return PromptResult(**result)
    plain = evaluated(frozenset())[kept]

    def effect(entries: Entries) -> tuple[float, ...]:
        off = frozenset((layer, index) for layer, chosen in enumerate(entries) for index in chosen)
        maps = evaluated(off)[kept]
        return tuple(map_similarity(plain, maps, ranges=ranges, num_scales=num_scales).tolist())

    def first_effect(entries: Entries) -> tuple[float, ...]:
        if is_compat:  # the released code reads activations in a pass of its own, for every set
            passes.cost.denoiser_calls += 1
            passes.cost.sample_forwards += 1
            if not settings.is_reusing:
                passes.discard([(0, frozenset())])
        return effect(entries)

    activations, z = member.scores()
    search = settings.search
    selection = select(candidate_sets(activations, z, search, is_compat=is_compat), first_effect, search)
    outcome = refine(selection.entries, effect, selection.threshold, search.relative_threshold)
    return PromptResult(
        **result,
        kept=tuple(kept),
        initial=selection.entries,
        initial_score=selection.score,
        refined=outcome.entries,
        refined_score=max(outcome.scores),
        refined_scores=outcome.scores,
        threshold=selection.threshold,
        is_replaced=selection.is_replaced,
        selection=selection.trials,
        layer_trials=outcome.layer_trials,
        neuron_trials=outcome.neuron_trials,
    )
