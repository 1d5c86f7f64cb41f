"""Verbs for text-to-image models: from options to the library. Heavy libraries are imported inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unmemorize.errors import ConfigError, DataError
from unmemorize.verbs.answers import Answer, check_answer, table_row

if TYPE_CHECKING:
    from unmemorize.corpus.prompts import Prompt
    from unmemorize.localize.passes import NemoSettings
    from unmemorize.localize.results import PromptResult
    from unmemorize.localize.scores import ActivationStatistics
    from unmemorize.models.denoising import Pipeline
    from unmemorize.neurons import Site
    from unmemorize.records import ProgressCallback

Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a pipeline is loaded: device ("auto": the first accelerator, else the CPU) and dtype of its weights."""

    device: str = "auto"
    precision: Precision | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NemoOptions:
    """Options of `localize` that only text-to-image models have; the verb says what they mean."""

    mode: Literal["fast", "compat", "paper"] = "fast"
    statistics: Path | None = None
    num_samples: int | None = None
    seed: int = 1
    threshold: float | None = None
    num_calibration: int = 50
    blocks: str | None = None
    column: str | None = None


def check(model: str, row: str | None) -> Answer:
    """Run the self-check of a pipeline."""
    from unmemorize.models.diffusion import DenoiserRow, fingerprint, load
    from unmemorize.models.diffusion import check as self_check

    chosen = table_row(row, DenoiserRow)
    pipe = load(model, row=chosen, run_check=False)
    return check_answer(self_check(pipe, chosen), fingerprint(pipe, chosen))


def opened(model: str | Path, loading: Loading) -> Pipeline:
    """Load a pipeline, check it, and move it to its device."""
    import torch

    from unmemorize.models.diffusion import load

    dtype = None if loading.precision is None else getattr(torch, loading.precision)
    pipe = load(model, dtype=dtype)
    device = loading.device
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = found.type if found is not None else "cpu"
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot use device {device!r}: {reason}; choose another --device") from error


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
    from unmemorize.localize.diffusion import localize_into
    from unmemorize.models.diffusion import find_sites

    prompts = read_prompts(examples, column=options.column)
    known = [] if ordinary is None else [p.text for p in read_prompts(ordinary, group="ordinary")]
    require_apart(prompts, known)
    targets = [prompt.text for prompt in prompts if prompt.group == "target"]
    if not targets:
        raise DataError(
            f"{examples} names no prompt of group target; give the prompts to look into that group"
        )
    pipe = opened(model, loading)
    blocks = options.blocks.split(",") if options.blocks else None
    sites = find_sites(pipe, blocks=blocks)
    statistics = _statistics(pipe, sites, known, options.statistics, out, progress)
    settings = _settings(pipe, known, options, out, progress)
    results = localize_into(out, pipe, targets, statistics, settings, progress=progress)
    _gate_others(pipe, [p for p in prompts if p.group != "target"], settings, out, progress)
    lines = [_line(result) for result in results]
    memorized = [result for result in results if result.is_memorized]
    threshold = settings.search.gate_threshold
    summary = f"{len(memorized)} of {len(results)} target prompts are memorized (threshold {threshold:.3f})"
    data = {
        "run": str(out),
        "num_targets": len(results),
        "num_memorized": len(memorized),
        "gate_threshold": threshold,
        "results": [result.to_json() for result in results],
        "neurons": str(out / "neurons.json"),
    }
    return Answer(data=data, lines=[*lines, summary, str(out / "neurons.json")])


def _line(result: PromptResult) -> str:
    found = f"{sum(map(len, result.refined))} neurons" if result.is_memorized else "not memorized"
    return f"{found}  (best pair {result.best_pair:.3f})  {result.prompt[:80]}"


def _statistics(
    pipe: Pipeline,
    sites: Sequence[Site],
    ordinary: Sequence[str],
    given: Path | None,
    out: Path,
    progress: ProgressCallback,
) -> ActivationStatistics:
    """Return activation statistics: those of a file, or of the ordinary prompts, kept in the run folder."""
    from unmemorize.localize.activations import collect_statistics
    from unmemorize.localize.scores import import_statistics, load_statistics

    if given is not None:
        return import_statistics(given, sites) if given.suffix == ".npz" else load_statistics(given)
    if len(ordinary) < 2:
        raise ConfigError(
            "localizing needs the activations of ordinary prompts; give --ordinary FILE (two prompts or more, better "
            "thousands) or --statistics FILE"
        )
    path = out / "statistics.safetensors"
    return collect_statistics(pipe, ordinary, sites, path=path, progress=progress)


def _settings(
    pipe: Pipeline, ordinary: Sequence[str], options: NemoOptions, out: Path, progress: ProgressCallback
) -> NemoSettings:
    """Return settings whose three thresholds are the given one, the calibrated one, or the published 0.428."""
    from unmemorize.localize.calibration import calibrate
    from unmemorize.localize.passes import NemoSettings

    settings = NemoSettings(mode=options.mode, num_samples=options.num_samples, seed=options.seed)
    threshold = options.threshold
    chosen = ordinary[: options.num_calibration]
    if threshold is None and len(chosen) >= 2:
        path = out / "calibration.json"
        calibration = calibrate(pipe, chosen, settings, path=path, progress=progress)
        threshold = calibration.threshold
    if threshold is None:
        return settings
    search = replace(
        settings.search,
        gate_threshold=threshold,
        selection_threshold=threshold,
        refinement_threshold=threshold,
    )
    return replace(settings, search=search)


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
