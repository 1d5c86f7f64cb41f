"""Which neurons of a text-to-image model hold the pictures that prompts reproduce (NeMo), wired to a pipeline.

A prompt is memorized when the first predictions of different samples point to the same picture; neurons hold it when
closing them makes the prediction leave that picture. Three modes: "compat" gives what the released code gives, quirks
included; "paper" follows the paper's text where the code differs; "fast" (the default) asks the same question with the
same scores on fewer samples, and searches by bisection. docs/nemo.md lists the differences.

The mathematics is in `scores.py` and `search.py`; `passes.py` is the only place where passes are made and counted.

Source: Hintersdorf et al. 2024, Finding NeMo.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unmemorize.errors import DataError, NeuronSetMismatch
from unmemorize.localize.activations import activations_of
from unmemorize.localize.passes import NemoSettings, Passes, first_step
from unmemorize.localize.results import PromptResult, add_result, finish_folder, start_folder
from unmemorize.localize.scores import (
    ActivationStatistics,
    best_match,
    map_similarity,
    pair_similarities,
    z_scores,
)
from unmemorize.localize.search import (
    Entries,
    Neuron,
    candidate_sets,
    importance_order,
    refine,
    select,
    smallest,
)
from unmemorize.models.denoising import Pipeline
from unmemorize.models.diffusion import DenoiserRow, Kind, find_sites, fingerprint, row_for
from unmemorize.neurons import same_model
from unmemorize.records import Progress, ProgressCallback


def localize(
    pipe: Pipeline,
    prompts: Sequence[str],
    statistics: ActivationStatistics,
    settings: NemoSettings | None = None,
    *,
    row: DenoiserRow | None = None,
    progress: ProgressCallback | None = None,
) -> Iterator[PromptResult]:
    """Look for the neurons of each prompt, one result after the other.

    Args:
        pipe: the pipeline; it is not changed.
        prompts: prompts; what exceeds the text encoder's length is cut off by the encoder.
        statistics: activations of ordinary prompts, at the sites to search.
        settings: by default fast mode.
        row: site table row, for a denoiser that the table does not know.
        progress: called after each prompt.

    Raises:
        DataError: if there are no prompts, or one is empty.
        NeuronSetMismatch: if the statistics belong to another model or other sites.
    """
    settings = settings or NemoSettings()
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise DataError(
            "the prompt list is empty or holds an empty prompt; pass at least one prompt with words"
        )
    _require_sites(pipe, statistics, row)
    return _localized(pipe, prompts, statistics, settings, row, progress)


def localize_into(
    folder: str | Path,
    pipe: Pipeline,
    prompts: Sequence[str],
    statistics: ActivationStatistics,
    settings: NemoSettings | None = None,
    *,
    row: DenoiserRow | None = None,
    progress: ProgressCallback | None = None,
) -> list[PromptResult]:
    """Do what `localize` does, keep every result in a run folder, and continue there if interrupted.

    Raises:
        RunFolderError: if the folder holds a run with other settings, another model or other statistics.
        DataError: if there are no prompts, or one is empty.
        NeuronSetMismatch: if the statistics belong to another model or other sites.
    """
    settings = settings or NemoSettings()
    model_id = fingerprint(pipe, row)
    header = {
        "family": "diffusion",
        "model_id": model_id,
        "settings": asdict(settings),
        "statistics": {
            name: getattr(statistics, name) for name in ("model_id", "count", "positions", "digest")
        },
        "sites": [asdict(site) for site in statistics.sites],
    }
    done = start_folder(folder, header)
    remaining = [prompt for prompt in dict.fromkeys(prompts) if prompt not in done]
    if remaining or not prompts:
        for result in localize(pipe, remaining, statistics, settings, row=row, progress=progress):
            add_result(folder, result)
            done[result.prompt] = result
    results = [done[prompt] for prompt in dict.fromkeys(prompts)]
    finish_folder(folder, results, model_id, statistics.sites)
    return results


def _localized(
    pipe: Pipeline,
    prompts: Sequence[str],
    statistics: ActivationStatistics,
    settings: NemoSettings,
    row: DenoiserRow | None,
    progress: ProgressCallback | None,
) -> Iterator[PromptResult]:
    for number, prompt in enumerate(prompts, start=1):
        started = time.monotonic()
        passes = first_step(pipe, prompt, statistics.sites, settings)
        candidates = _Candidates(pipe, prompt, statistics, settings, row, passes)
        run = _fast if settings.mode == "fast" else _released
        result = run(prompt, passes, candidates, settings)
        passes.cost.seconds = time.monotonic() - started
        yield result
        if progress is not None:
            message = f"{sum(map(len, result.refined))} neurons" if result.is_memorized else "not memorized"
            progress(Progress("localize", number, len(prompts), "prompts", message))


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Activations and z-scores of one prompt, computed when first asked for."""

    pipe: Pipeline
    prompt: str
    statistics: ActivationStatistics
    settings: NemoSettings
    row: DenoiserRow | None
    passes: Passes

    def scores(self) -> tuple[list[Tensor], list[Tensor]]:
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


def _released(prompt: str, passes: Passes, candidates: _Candidates, settings: NemoSettings) -> PromptResult:
    """Do what the released code (compat) or the paper's text (paper) does for one prompt."""
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
        "prompt": prompt,
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

    activations, z = candidates.scores()
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


def _fast(prompt: str, passes: Passes, candidates: _Candidates, settings: NemoSettings) -> PromptResult:
    """Gate on few samples, search by bisection on one, verify on all."""
    search = settings.search
    plain = _first_look(passes, settings)
    similarities, pairs = pair_similarities(plain)
    best = best_match(similarities, pairs, len(plain))
    kept = [sample for sample in range(len(plain)) if best[sample] > search.gate_threshold]
    if kept and len(plain) < settings.samples:
        plain = torch.cat(
            [plain, passes.maps([(i, frozenset()) for i in range(len(plain), settings.samples)])]
        )
        similarities, pairs = pair_similarities(plain)
        best = best_match(similarities, pairs, len(plain))
        kept = [sample for sample in range(len(plain)) if best[sample] > search.gate_threshold]
    result: dict[str, Any] = {
        "prompt": prompt,
        "is_memorized": bool(kept),
        "best_pair": float(best.max()),
        "pairs": tuple(similarities.tolist()),
        "cost": passes.cost,
    }
    if not kept:
        return PromptResult(**_counted(result, passes))
    remembered: dict[tuple[int, frozenset[Neuron]], float] = {}

    def effect(neurons: Sequence[Neuron], samples: Sequence[int]) -> tuple[float, ...]:
        off = frozenset(neurons)
        missing = [sample for sample in samples if (sample, off) not in remembered]
        if missing:
            maps = passes.maps([(sample, off) for sample in missing])
            scores = map_similarity(plain[missing], maps).tolist()
            remembered.update({(sample, off): score for sample, score in zip(missing, scores, strict=True)})
        return tuple(remembered[sample, off] for sample in samples)

    activations, z = candidates.scores()
    order = importance_order(candidate_sets(activations, z, search, is_compat=False), z)
    strongest = sorted(kept, key=lambda sample: -float(best[sample]))
    found = smallest(order, effect, search.refinement_threshold, strongest)
    by_sample = dict(zip(strongest, found.scores, strict=True))
    num_sites = len(candidates.statistics.sites)
    return PromptResult(
        **_counted(result, passes),
        kept=tuple(kept),
        initial=_by_site(found.prefix, num_sites),
        initial_score=found.prefix_score,
        refined=_by_site(found.neurons, num_sites),
        refined_score=max(found.scores),
        refined_scores=tuple(by_sample[sample] for sample in kept),
        threshold=found.threshold,
        is_replaced=found.is_replaced,
    )


def _first_look(passes: Passes, settings: NemoSettings) -> Tensor:
    """Return maps of the first samples, or of all if these leave doubt."""
    first = min(settings.gate_samples, settings.samples)
    plain = passes.maps([(sample, frozenset()) for sample in range(first)], is_capturing=True)
    best = float(pair_similarities(plain)[0].max())
    threshold = settings.search.gate_threshold
    if settings.clear_frac * threshold < best <= threshold and first < settings.samples:
        rest = passes.maps([(sample, frozenset()) for sample in range(first, settings.samples)])
        plain = torch.cat([plain, rest])
    return plain


def _counted(result: dict[str, Any], passes: Passes) -> dict[str, Any]:
    passes.cost.sample_forwards = passes.cost.sample_forwards_run
    passes.cost.denoiser_calls = passes.cost.denoiser_calls_run
    return result


def _by_site(neurons: Iterable[Neuron], num_sites: int) -> Entries:
    chosen: list[list[int]] = [[] for _ in range(num_sites)]
    for layer, index in neurons:
        chosen[layer].append(index)
    return tuple(tuple(sorted(indices)) for indices in chosen)


def _require_sites(pipe: Pipeline, statistics: ActivationStatistics, row: DenoiserRow | None) -> None:
    kinds: tuple[Kind, ...] = ("values", "hidden")
    names = [name for name, _ in (row or row_for(pipe)).blocks]
    known = {site for kind in kinds for site in find_sites(pipe, kind, blocks=names, row=row)}
    stray = [site for site in statistics.sites if site not in known]
    ours = fingerprint(pipe, row)
    is_other = bool(statistics.model_id) and not same_model(statistics.model_id, ours)
    if stray or is_other:
        what = f"site {stray[0].path} of width {stray[0].width}" if stray else statistics.model_id
        raise NeuronSetMismatch(
            f"the activation statistics are for {what}, which this model ({ours}) is not; collect them on this model"
        )
