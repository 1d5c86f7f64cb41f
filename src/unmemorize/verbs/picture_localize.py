"""`localize` for text-to-image models: which prompts are memorized, and which neurons hold them.

The run folder gets `statistics.safetensors` and `calibration.json` unless they are given, the results of the search
(`localize.results`), and `gate.jsonl` for prompts that only meet the gate. What is there already is not computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from unmemorize.errors import ConfigError, DataError
from unmemorize.verbs.answers import Answer, Positions
from unmemorize.verbs.diffusion import Loading, opened, quietly

if TYPE_CHECKING:
    from unmemorize.corpus.prompts import Prompt
    from unmemorize.localize.neuron_statistics import NeuronStatistics
    from unmemorize.localize.passes import NemoSettings
    from unmemorize.models.denoising import Pipeline
    from unmemorize.neurons import Site
    from unmemorize.records import ProgressCallback

Mode = Literal["fast", "compat", "paper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NemoOptions:
    """Options of `localize` that only text-to-image models have; the verb says what they mean."""

    mode: Mode = "fast"
    ranking: Literal["unusual", "gradient"] = "unusual"
    is_clustered: bool = False
    statistics: Path | None = None
    num_samples: int | None = None
    seed: int = 1
    threshold: float | None = None
    num_calibration: int = 50
    blocks: str | None = None
    positions: Positions = "all"
    column: str | None = None


def mode_of(method: str | None) -> Mode:
    """Return the NeMo mode that a method names; fast if none does.

    Raises:
        ConfigError: if it names something else.
    """
    name = method or "fast"
    if name not in get_args(Mode):
        raise ConfigError(f"unknown method {name!r} for a pipeline; expected {', '.join(get_args(Mode))}")
    return cast("Mode", name)


@quietly
def localize(
    progress: ProgressCallback,
    model: str,
    examples: Path,
    out: Path,
    ordinary: Path | None,
    options: NemoOptions,
    loading: Loading,
) -> Answer:
    """Find the neurons of each target prompt; prompts of other groups only meet the gate."""
    from unmemorize.corpus.prompts import read_prompts, require_apart
    from unmemorize.localize.clusters import describe_cluster, localize_clusters_into, read_results
    from unmemorize.localize.diffusion import localize_into
    from unmemorize.localize.grouping import clusters
    from unmemorize.localize.results import describe
    from unmemorize.models.diffusion import find_sites

    prompts = read_prompts(examples, column=options.column)
    known = [] if ordinary is None else [p.text for p in read_prompts(ordinary, group="ordinary")]
    require_apart(prompts, known)
    targets = [prompt.text for prompt in prompts if prompt.group == "target"]
    if not targets:
        raise DataError(
            f"{examples} names no prompt of group target; give the prompts to look into that group"
        )
    asked = _asked(options)
    pipe = opened(model, loading)
    blocks = options.blocks.split(",") if options.blocks else None
    sites = find_sites(pipe, blocks=blocks)
    statistics = _statistics(pipe, sites, known, options, out, progress)
    settings = _settings(pipe, known, options, asked, out, progress)
    if options.is_clustered:
        groups = clusters(targets)
        found = localize_clusters_into(out, pipe, groups, statistics, settings, progress=progress)
        lines, num_memorized = (
            [describe_cluster(one) for one in found],
            sum(one.is_memorized for one in found),
        )
    else:
        results = localize_into(out, pipe, targets, statistics, settings, progress=progress)
        lines, num_memorized = [describe(one) for one in results], sum(one.is_memorized for one in results)
    _gate_others(pipe, [p for p in prompts if p.group != "target"], settings, out, progress)
    threshold = settings.search.gate_threshold
    what = "clusters of target prompts" if options.is_clustered else "target prompts"
    summary = f"{num_memorized} of {len(lines)} {what} are memorized (threshold {threshold:.3f})"
    data = {
        "run": str(out),
        "num_targets": len(targets),
        "num_memorized": num_memorized,
        "gate_threshold": threshold,
        "results": [asdict(result) for result in read_results(out).results],
        "neurons": str(out / "neurons.json"),
    }
    return Answer(data=data, lines=[*lines, summary, str(out / "neurons.json")])


def _statistics(
    pipe: Pipeline,
    sites: Sequence[Site],
    ordinary: Sequence[str],
    options: NemoOptions,
    out: Path,
    progress: ProgressCallback,
) -> NeuronStatistics:
    """Return activation statistics: those of a file, or of the ordinary prompts, kept in the run folder."""
    from unmemorize.localize.activations import collect_statistics
    from unmemorize.localize.neuron_statistics import import_statistics, load_statistics

    given = options.statistics
    if given is not None:
        return import_statistics(given, sites) if given.suffix == ".npz" else load_statistics(given)
    if len(ordinary) < 2:
        raise ConfigError(
            "localizing needs the activations of ordinary prompts; give --ordinary FILE (two prompts or more, better "
            "thousands) or --statistics FILE"
        )
    path = out / "statistics.safetensors"
    return collect_statistics(
        pipe, ordinary, sites, positions=options.positions, path=path, progress=progress
    )


def _asked(options: NemoOptions) -> NemoSettings:
    """Return settings with the published thresholds; refuse what is out of range before anything is loaded."""
    from unmemorize.localize.passes import NemoSettings

    if options.num_calibration < 0:
        raise ConfigError(f"--calibrate is {options.num_calibration}, expected 0 prompts or more")
    return NemoSettings(
        mode=options.mode, ranking=options.ranking, num_samples=options.num_samples, seed=options.seed
    )


def _settings(
    pipe: Pipeline,
    ordinary: Sequence[str],
    options: NemoOptions,
    asked: NemoSettings,
    out: Path,
    progress: ProgressCallback,
) -> NemoSettings:
    """Return settings whose three thresholds are the given one, the calibrated one, or the published 0.428."""
    from unmemorize.localize.calibration import calibrate

    threshold = options.threshold
    chosen = ordinary[: options.num_calibration]
    if threshold is None and len(chosen) >= 2:
        path = out / "calibration.json"
        calibration = calibrate(pipe, chosen, asked, path=path, progress=progress)
        threshold = calibration.threshold
    if threshold is None:
        return asked
    return replace(asked, search=asked.search.at(threshold))


def _gate_others(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    settings: NemoSettings,
    out: Path,
    progress: ProgressCallback,
) -> list[dict[str, Any]]:
    """Score prompts that are not looked into, for comparison; kept in `gate.jsonl`, continued if interrupted."""
    from unmemorize.files import append_json_line, read_json_lines
    from unmemorize.localize.calibration import best_pair
    from unmemorize.records import Progress

    path = out / "gate.jsonl"
    done = {row["prompt"]: row for row in read_json_lines(path)} if path.exists() else {}
    for number, prompt in enumerate(prompts, start=1):
        if prompt.text not in done:
            score = best_pair(pipe, prompt.text, settings)
            done[prompt.text] = {"prompt": prompt.text, "group": prompt.group, "best_pair": score}
            append_json_line(path, done[prompt.text])
        progress(Progress("gate", number, len(prompts), "prompts"))
    return [done[prompt.text] for prompt in prompts]
