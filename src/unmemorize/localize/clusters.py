"""One set of neurons for prompts that reproduce the same picture, found once and tested on every member.

Prompts of one training picture share the neurons that hold it. Searching prompt by prompt finds each member's smallest
set, which need not hold for the next paraphrase; here the memory counts as broken only when it is broken in every kept
sample of every member that passed the gate:

    score of a cluster = max over members, max over kept samples

How prompts are grouped is `grouping.py`; the search is `fast` in `procedures.py`.

Source: clusters as the unit of localization follow NeMo-C (Di et al. 2025), which unites the members' sets; searching
for one set together is ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from unmemorize.errors import ConfigError, DataError, FileFormatError
from unmemorize.files import read_json, read_json_lines
from unmemorize.localize.diffusion import header_of, require_sites, warn_if_cut
from unmemorize.localize.neuron_statistics import NeuronStatistics
from unmemorize.localize.passes import NemoSettings
from unmemorize.localize.procedures import FastOutcome, Member, fast, found_fields
from unmemorize.localize.results import (
    LOCALIZATION_FORMAT,
    LOCALIZATION_VERSION,
    Cost,
    PromptResult,
    add_line,
    finish_folder,
    outcome_of,
    result_from_json,
    start_lines,
    table_fields,
)
from unmemorize.localize.search import Entries
from unmemorize.models.denoising import Pipeline
from unmemorize.models.diffusion import DenoiserRow, fingerprint
from unmemorize.models.prompts import shortened
from unmemorize.neurons import NeuronSet, Site
from unmemorize.records import Progress, ProgressCallback


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterResult:
    """What was found for one cluster of prompts.

    Attributes:
        members: the prompts.
        best_pairs: largest similarity between two samples, per member, unitless.
        kept: samples that passed the gate, per member; a member without any takes no part.
        initial: entries that broke the memory first, by site.
        initial_score: largest score with them off over the samples searched on, unitless.
        refined: the cluster's neurons, by site.
        refined_score: largest score with them off, over members and their kept samples, unitless.
        refined_scores: largest score per member, unitless; 0 for a member that takes no part.
        threshold: the threshold that was used, unitless.
        is_replaced: whether no candidate set reached the threshold, so that the score reached took its place.
        cost: what all members took together.
    """

    members: tuple[str, ...]
    best_pairs: tuple[float, ...]
    kept: tuple[tuple[int, ...], ...]
    initial: Entries = ()
    initial_score: float = 0.0
    refined: Entries = ()
    refined_score: float = 0.0
    refined_scores: tuple[float, ...] = ()
    threshold: float = 0.0
    is_replaced: bool = False
    cost: Cost = field(default_factory=Cost)

    @property
    def is_memorized(self) -> bool:
        """Whether any member passed the gate."""
        return any(self.kept)

    def neurons(self, model_id: str, sites: Sequence[Site]) -> NeuronSet:
        """Return the cluster's neurons as a set."""
        return NeuronSet(model_id, dict(zip(sites, self.refined, strict=True)) if self.refined else {})


def describe_cluster(result: ClusterResult) -> str:
    """Say in one line what was found for a cluster, how far the search got, and what it cost."""
    others = f" and {len(result.members) - 1} more like it" if len(result.members) > 1 else ""
    start = f"{shortened(result.members[0])!r}{others}: "
    spent = f"{result.cost.sample_forwards} sample-forwards, {result.cost.seconds:.1f} s"
    if not result.is_memorized:
        return f"{start}not memorized (best pair {max(result.best_pairs):.3f}); {spent}"
    num_memorized, num_samples = sum(1 for kept in result.kept if kept), sum(map(len, result.kept))
    return f"{start}{outcome_of(result, f'{num_samples} kept samples of {num_memorized} memorized prompts')}; {spent}"


def localize_clusters(
    pipe: Pipeline,
    groups: Sequence[Sequence[str]],
    statistics: NeuronStatistics,
    settings: NemoSettings | None = None,
    *,
    row: DenoiserRow | None = None,
    progress: ProgressCallback | None = None,
) -> Iterator[ClusterResult]:
    """Look for one set of neurons per cluster of prompts, one result after the other.

    Args:
        pipe: the pipeline; it is not changed.
        groups: prompts of each cluster, for example from `clusters`.
        statistics: activations of ordinary prompts, at the sites to search.
        settings: fast mode (the default); its samples are taken per member.
        row: site table row, for a denoiser that the table does not know.
        progress: called after each cluster.

    Raises:
        DataError: if there are no clusters, or one is empty or holds an empty prompt.
        ConfigError: if the mode is not fast.
        NeuronSetMismatch: if the statistics belong to another model or other sites.
    """
    settings = settings or NemoSettings()
    if not groups or not all(group and all(prompt.strip() for prompt in group) for group in groups):
        raise DataError(
            "the list of clusters is empty, or one holds no prompt or an empty one; pass prompts with words"
        )
    if settings.mode != "fast":
        raise ConfigError(
            f"clusters are searched in mode fast, not {settings.mode}; localize them one by one"
        )
    require_sites(pipe, statistics, row)
    return _localized(pipe, groups, statistics, settings, row, progress)


def localize_clusters_into(
    folder: str | Path,
    pipe: Pipeline,
    groups: Sequence[Sequence[str]],
    statistics: NeuronStatistics,
    settings: NemoSettings | None = None,
    *,
    row: DenoiserRow | None = None,
    progress: ProgressCallback | None = None,
) -> list[ClusterResult]:
    """Do what `localize_clusters` does, keep every result in a run folder, and continue there if interrupted.

    Raises:
        RunFolderError: if the folder holds a run with other settings, clusters, model or statistics.
        DataError: if there are no clusters, or one is empty or holds an empty prompt.
        ConfigError: if the mode is not fast.
        NeuronSetMismatch: if the statistics belong to another model or other sites.
    """
    settings = settings or NemoSettings()
    tidy = [tuple(dict.fromkeys(group)) for group in groups]
    localize_clusters(pipe, tidy, statistics, settings, row=row)  # refuses bad input before a file is made
    model_id = fingerprint(pipe, row)
    header = {**header_of(statistics, settings, model_id), "clusters": [list(group) for group in tidy]}
    done = {result.members: result for result in map(_from_json, start_lines(folder, header))}
    remaining = [group for group in tidy if group not in done]
    if remaining:
        for result in localize_clusters(pipe, remaining, statistics, settings, row=row, progress=progress):
            add_line(folder, asdict(result))
            done[result.members] = result
    results = [done[group] for group in tidy]
    rows = [
        {
            "members": " | ".join(result.members),
            "is_memorized": result.is_memorized,
            "best_pair": f"{max(result.best_pairs):.6f}",
            **table_fields(result),
        }
        for result in results
    ]
    finish_folder(folder, rows, model_id, [result.neurons(model_id, statistics.sites) for result in results])
    return results


def _localized(
    pipe: Pipeline,
    groups: Sequence[Sequence[str]],
    statistics: NeuronStatistics,
    settings: NemoSettings,
    row: DenoiserRow | None,
    progress: ProgressCallback | None,
) -> Iterator[ClusterResult]:
    for number, group in enumerate(groups, start=1):
        started = time.monotonic()
        prompts = list(dict.fromkeys(group))
        for prompt in prompts:
            warn_if_cut(pipe, prompt)
        members = [Member.start(pipe, prompt, statistics, settings, row) for prompt in prompts]
        result = _result(members, fast(members))
        result.cost.seconds = time.monotonic() - started
        yield result
        if progress is not None:
            progress(Progress("localize", number, len(groups), "clusters", describe_cluster(result)))


def _result(members: Sequence[Member], outcome: FastOutcome) -> ClusterResult:
    total = Cost()
    for member in members:
        cost = member.passes.cost
        cost.sample_forwards, cost.denoiser_calls = cost.sample_forwards_run, cost.denoiser_calls_run
        for part in fields(Cost):
            setattr(total, part.name, getattr(total, part.name) + getattr(cost, part.name))
    return ClusterResult(
        members=tuple(member.prompt for member in members),
        best_pairs=tuple(float(look.best.max()) for look in outcome.looks),
        kept=tuple(tuple(sorted(look.kept)) for look in outcome.looks),
        refined_scores=tuple(max(scores, default=0.0) for scores in outcome.scores),
        cost=total,
        **found_fields(outcome.found, len(members[0].statistics.sites)),
    )


def _from_json(value: dict[str, Any]) -> ClusterResult:
    def tuples(part: Any) -> Any:
        return tuple(tuples(item) for item in part) if isinstance(part, list) else part

    try:
        parts = {name: tuples(item) for name, item in value.items()}
        return ClusterResult(**{**parts, "cost": Cost(**value["cost"])})
    except (KeyError, TypeError) as error:
        raise FileFormatError(
            f"a line of localization.jsonl does not fit ({error}); start a new folder"
        ) from error


@dataclass(frozen=True, slots=True)
class StoredResults:
    """What a run folder holds: the sites that were searched, the gate's threshold, and one result a prompt."""

    sites: tuple[Site, ...]
    gate_threshold: float
    results: tuple[PromptResult, ...]


def read_results(folder: str | Path) -> StoredResults:
    """Read what localization left in a run folder; a cluster's set is every member's, its cost the first member's.

    Raises:
        FileFormatError: if a file is missing, damaged, or does not fit.
    """
    path = Path(folder) / "localization.json"
    header = read_json(path, format=LOCALIZATION_FORMAT, version=LOCALIZATION_VERSION)
    lines = read_json_lines(Path(folder) / "localization.jsonl")
    try:
        sites = tuple(Site(**site) for site in header["sites"])
        threshold = float(header["settings"]["search"]["gate_threshold"])
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"{path} lacks {error}; localize into a new folder") from error
    if "clusters" not in header:
        return StoredResults(sites, threshold, tuple(map(result_from_json, lines)))
    found = [_from_json(value) for value in lines]
    return StoredResults(sites, threshold, tuple(one for result in found for one in _by_member(result)))


def _by_member(result: ClusterResult) -> Iterator[PromptResult]:
    for number, prompt in enumerate(result.members):
        is_memorized = bool(result.kept[number])
        shared = ("initial", "initial_score", "refined", "threshold", "is_replaced")
        yield PromptResult(
            prompt=prompt,
            is_memorized=is_memorized,
            best_pair=result.best_pairs[number],
            kept=result.kept[number],
            cost=result.cost if number == 0 else Cost(),
            refined_score=result.refined_scores[number] if is_memorized else 0.0,
            **({name: getattr(result, name) for name in shared} if is_memorized else {}),
        )
