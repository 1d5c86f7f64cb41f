"""Which neurons of a text-to-image model hold the pictures that prompts reproduce (NeMo), wired to a pipeline.

A prompt is memorized when the first predictions of different samples point to the same picture; neurons hold it when
closing them makes the prediction leave that picture. Three modes: "compat" gives what the released code gives, quirks
included; "paper" follows the paper's text where the code differs; "fast" (the default) asks the same question with the
same scores on fewer samples, and searches by bisection. docs/nemo.md lists the differences.

The mathematics is in `scores.py` and `search.py`. `Passes` is the only place where passes are made and counted.

Source: Hintersdorf et al. 2024, Finding NeMo.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, DataError, NeuronSetMismatch
from unmemorize.gates import capture
from unmemorize.localize.scores import (
    ActivationStatistics,
    best_match,
    load_statistics,
    map_similarity,
    mean_absolute,
    pair_similarities,
    scaled_maps,
    z_scores,
)
from unmemorize.localize.search import (
    Entries,
    Neuron,
    SearchSettings,
    Trial,
    candidate_sets,
    importance_order,
    refine,
    select,
    smallest,
)
from unmemorize.models.denoising import DenoiserCall, denoiser_of, record
from unmemorize.models.diffusion import DenoiserRow, find_sites, fingerprint, row_for, signature, text_values
from unmemorize.neurons import NeuronSet, Site, same_model
from unmemorize.records import Progress, ProgressCallback

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Mode = Literal["compat", "paper", "fast"]
Positions = Literal["all", "start", "words", "end", "padding"]


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


@dataclass(slots=True)
class Cost:
    """What was spent on a prompt.

    Attributes:
        sample_forwards: denoiser passes times samples that the method asks for (twice that with guidance).
        denoiser_calls: passes that it asks for, each of any number of samples.
        sample_forwards_run: those that were computed and not looked up.
        seconds: wall time, in seconds.
    """

    sample_forwards: int = 0
    denoiser_calls: int = 0
    sample_forwards_run: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """What was found for one prompt.

    Attributes:
        prompt: the prompt.
        is_memorized: whether any sample passed the gate.
        best_pair: largest similarity between two samples, unitless.
        kept: samples that passed the gate.
        initial: entries that broke the memory first, by site (copies included in compat mode).
        initial_score: largest score with them off, unitless.
        refined: entries that are left, by site.
        refined_score: largest score with them off, unitless.
        refined_scores: the same per kept sample.
        threshold: the threshold that refinement used, unitless.
        is_replaced: whether no candidate set reached the threshold, so that the score reached took its place.
        cost: what it took.
        pairs: similarities between samples, in order of the pairs.
        selection: compat and paper: every candidate set tried.
        layer_trials: compat and paper: layers left out.
        neuron_trials: compat and paper: entries left out.
    """

    prompt: str
    is_memorized: bool
    best_pair: float
    kept: tuple[int, ...] = ()
    initial: Entries = ()
    initial_score: float = 0.0
    refined: Entries = ()
    refined_score: float = 0.0
    refined_scores: tuple[float, ...] = ()
    threshold: float = 0.0
    is_replaced: bool = False
    cost: Cost = field(default_factory=Cost)
    pairs: tuple[float, ...] = ()
    selection: tuple[Trial, ...] = ()
    layer_trials: tuple[Trial, ...] = ()
    neuron_trials: tuple[Trial, ...] = ()

    def neurons(self, model_id: str, sites: Sequence[Site]) -> NeuronSet:
        """Return the refined neurons as a set."""
        return NeuronSet(model_id, dict(zip(sites, self.refined, strict=True)) if self.refined else {})


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
        if is_capturing and self.activations is None:
            last = [seen[site][0].flatten(1, -2)[-len(jobs) :] for site in self.sites]
            self.activations = tuple(mean_absolute(values)[0].cpu() for values in last)
        prediction = rows[-1]
        if self.call.rows == 2:
            empty, text = rows
            first, second = (text, empty) if self.settings.mode == "compat" else (empty, text)
            prediction = first + self.settings.guidance * (second - first)
        return scaled_maps(self.call.clean_direction(prediction, samples, step_idx=step_idx)).cpu()


def localize(
    pipe: DiffusionPipeline,
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


def _localized(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    statistics: ActivationStatistics,
    settings: NemoSettings,
    row: DenoiserRow | None,
    progress: ProgressCallback | None,
) -> Iterator[PromptResult]:
    for number, prompt in enumerate(prompts, start=1):
        started = time.monotonic()
        seeds = range(settings.seed, settings.seed + settings.samples)
        call = record(
            pipe,
            prompt,
            num_samples=settings.samples,
            seeds=tuple(seeds) if settings.mode == "paper" else (settings.seed,),
            num_steps=settings.num_steps,
            guidance=settings.guidance,
        )
        passes = Passes(call, statistics.sites, settings, 0 if settings.mode == "paper" else 1)
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

    pipe: DiffusionPipeline
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
    result = {
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
    result = {
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
    return result


def _by_site(neurons: Iterable[Neuron], num_sites: int) -> Entries:
    chosen: list[list[int]] = [[] for _ in range(num_sites)]
    for layer, index in neurons:
        chosen[layer].append(index)
    return tuple(tuple(sorted(indices)) for indices in chosen)


def _require_sites(
    pipe: DiffusionPipeline, statistics: ActivationStatistics, row: DenoiserRow | None
) -> None:
    known = {site for kind in ("values", "hidden") for site in _every_site(pipe, kind, row)}
    stray = [site for site in statistics.sites if site not in known]
    ours = signature(pipe, row)
    is_other = statistics.model_id and not same_model(statistics.model_id, ours)
    if stray or (is_other and not same_model(statistics.model_id, fingerprint(pipe, row))):
        what = f"site {stray[0].path} of width {stray[0].width}" if stray else statistics.model_id
        raise NeuronSetMismatch(
            f"the activation statistics are for {what}, which this model ({ours}) is not; collect them on this model"
        )


def _every_site(pipe: DiffusionPipeline, kind: Any, row: DenoiserRow | None) -> tuple[Site, ...]:
    names = [name for name, _ in (row or row_for(pipe)).blocks]
    return find_sites(pipe, kind, blocks=names, row=row)


# Activations and their statistics.


@torch.no_grad()
def activations_of(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    sites: Sequence[Site],
    positions: str = "all",
    *,
    row: DenoiserRow | None = None,
) -> list[tuple[Tensor, ...]]:
    """Return each prompt's mean absolute activations, one tensor of shape (F,) per site, float32.

    Cross-attention values need no denoiser pass. Other sites depend on the picture too: they are captured in one pass
    per prompt, at the second step of 50, on the latents of seed 1.

    Args:
        pipe: the pipeline.
        prompts: N prompts.
        sites: the sites.
        positions: token positions that are averaged: "all", "start", "words", "end" or "padding".
        row: site table row, for a denoiser that the table does not know.

    Raises:
        ConfigError: if positions are named for sites whose tokens are not the prompt's.
    """
    if (row or row_for(pipe)).has_joint_values or sites[0].side == "in":
        if positions != "all":
            raise ConfigError(f"positions {positions!r} need cross-attention values; use positions='all'")
        found: list[tuple[Tensor, ...]] = []
        for prompt in prompts:
            call = record(pipe, prompt, seeds=(1,))
            with capture(denoiser_of(pipe), sites) as seen:
                call.predict([0], step_idx=1)
            found.append(tuple(mean_absolute(seen[site][0].flatten(1, -2))[0].cpu() for site in sites))
        return found
    values = text_values(pipe, prompts, sites, row)
    chosen = None if positions == "all" else token_positions(pipe, prompts, positions)
    means = [mean_absolute(values[site], chosen).cpu() for site in sites]
    return [tuple(mean[i] for mean in means) for i in range(len(prompts))]


def token_positions(pipe: DiffusionPipeline, prompts: Sequence[str], positions: str) -> Tensor:
    """Mark token positions of one kind, shape (N, T), bool: start token, words, first end token, or what follows it.

    Raises:
        ConfigError: if the kind is unknown.
    """
    tokenizer = pipe.tokenizer
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    place = torch.arange(tokens.shape[1]).expand_as(tokens)
    end = (tokens == tokenizer.eos_token_id).int().argmax(1, keepdim=True)
    has_start = tokenizer.bos_token_id is not None and bool((tokens[:, 0] == tokenizer.bos_token_id).all())
    kinds = {
        "start": (place == 0) & has_start,
        "words": (place < end) & (place >= int(has_start)),
        "end": place == end,
        "padding": place > end,
    }
    if positions not in kinds:
        raise ConfigError(f"unknown positions {positions!r}; expected all, {', '.join(kinds)}")
    return kinds[positions]


def collect_statistics(
    pipe: DiffusionPipeline,
    captions: Iterable[str],
    sites: Sequence[Site] | None = None,
    *,
    positions: Positions = "all",
    batch_size: int = 64,
    path: str | Path | None = None,
    row: DenoiserRow | None = None,
    progress: ProgressCallback | None = None,
) -> ActivationStatistics:
    """Compute activation statistics of ordinary captions, streamed.

    Args:
        pipe: the pipeline.
        captions: captions; read once, never held together.
        sites: by default the row's default value sites.
        positions: token positions that are averaged.
        batch_size: captions per batch.
        path: file that is written after every batch and continued from if it exists.
        row: site table row, for a denoiser that the table does not know.
        progress: called after each batch.

    Raises:
        DataError: if there are fewer than two captions, or the file was made from others.
        NeuronSetMismatch: if the file was made for another model.
    """
    sites = tuple(sites or find_sites(pipe, row=row))
    model_id = fingerprint(pipe, row)
    total = ActivationStatistics.empty(model_id, sites, positions)
    remaining = iter(captions)
    if path is not None and Path(path).exists():
        total = load_statistics(path)
        if (total.model_id, total.sites, total.positions) != (model_id, sites, positions):
            raise NeuronSetMismatch(
                f"{path} was made for {total.model_id}, this model is {model_id}; choose a new file"
            )
        _skip(remaining, total, path)
    while batch := list(islice(remaining, batch_size)):
        found = activations_of(pipe, batch, sites, positions, row=row)
        columns = [torch.stack([one[i] for one in found]) for i in range(len(sites))]
        total = total.updated(columns, batch)
        if path is not None:
            total.save(path)
        if progress is not None:
            progress(Progress("statistics", total.count, 0, "captions"))
    if total.count < 2:
        raise DataError(
            f"{total.count} captions give no standard deviation; pass at least two, better thousands"
        )
    return total


def _skip(captions: Iterator[str], total: ActivationStatistics, path: str | Path) -> None:
    """Read over the captions that a file already holds, and check that they are the same."""
    done = list(islice(captions, total.count))
    if total.digest != _digest(done, total):
        raise DataError(
            f"{path} was made from other captions; choose a new file, or pass the same captions again"
        )


def _digest(captions: Sequence[str], total: ActivationStatistics) -> str:
    empty = ActivationStatistics.empty(total.model_id, total.sites, total.positions)
    nothing = [torch.zeros(1, site.width) for site in total.sites]
    for caption in captions:
        empty = empty.updated(nothing, [caption])
    return empty.digest


# The threshold.


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

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain data."""
        return asdict(self)


def calibrate(
    pipe: DiffusionPipeline,
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
        seeds = tuple(range(settings.seed, settings.seed + settings.samples))
        call = record(
            pipe,
            prompt,
            num_samples=settings.samples,
            seeds=seeds if settings.mode == "paper" else seeds[:1],
            num_steps=settings.num_steps,
            guidance=settings.guidance,
        )
        passes = Passes(call, (), settings, 0 if settings.mode == "paper" else 1)
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
