"""Which neurons of a text-to-image model hold the pictures that prompts reproduce (NeMo), wired to a pipeline.

A prompt is memorized when the first predictions of different samples point to the same picture; neurons hold it when
closing them makes the prediction leave that picture. Three modes: "compat" gives what the released code gives, quirks
included; "paper" follows the paper's text where the code differs; "fast" (the default) asks the same question with the
same scores on fewer samples, and searches by bisection. docs/nemo.md lists the differences.

This file checks, repeats and resumes. What happens to one prompt is in `procedures.py`, the mathematics in `scores.py`,
`orders.py` and `search.py`; `passes.py` is the only place where passes are made and counted.

Source: Hintersdorf et al. 2024, Finding NeMo.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unmemorize.errors import DataError, NeuronSetMismatch, UnmemorizeWarning
from unmemorize.localize.neuron_statistics import NeuronStatistics
from unmemorize.localize.passes import NemoSettings
from unmemorize.localize.procedures import Member, fast, released, single
from unmemorize.localize.results import (
    PromptResult,
    add_line,
    describe,
    finish_folder,
    prompt_row,
    start_folder,
)
from unmemorize.models.denoising import Pipeline
from unmemorize.models.diffusion import DenoiserRow, Kind, find_sites, fingerprint, row_for
from unmemorize.models.prompts import cut_words, shortened
from unmemorize.neurons import same_model
from unmemorize.records import Progress, ProgressCallback


def localize(
    pipe: Pipeline,
    prompts: Sequence[str],
    statistics: NeuronStatistics,
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
    require_sites(pipe, statistics, row)
    return _localized(pipe, prompts, statistics, settings, row, progress)


def localize_into(
    folder: str | Path,
    pipe: Pipeline,
    prompts: Sequence[str],
    statistics: NeuronStatistics,
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
    done = start_folder(folder, header_of(statistics, settings, model_id))
    remaining = [prompt for prompt in dict.fromkeys(prompts) if prompt not in done]
    if remaining or not prompts:
        for result in localize(pipe, remaining, statistics, settings, row=row, progress=progress):
            add_line(folder, asdict(result))
            done[result.prompt] = result
    results = [done[prompt] for prompt in dict.fromkeys(prompts)]
    found = [result.neurons(model_id, statistics.sites) for result in results]
    finish_folder(folder, [prompt_row(result) for result in results], model_id, found)
    return results


def header_of(statistics: NeuronStatistics, settings: NemoSettings, model_id: str) -> dict[str, Any]:
    """Return what a run folder stores about its results, and what continuing there has to agree with."""
    return {
        "family": "diffusion",
        "model_id": model_id,
        "settings": asdict(settings),
        "statistics": {
            name: getattr(statistics, name) for name in ("model_id", "count", "positions", "digest")
        },
        "sites": [asdict(site) for site in statistics.sites],
    }


def _localized(
    pipe: Pipeline,
    prompts: Sequence[str],
    statistics: NeuronStatistics,
    settings: NemoSettings,
    row: DenoiserRow | None,
    progress: ProgressCallback | None,
) -> Iterator[PromptResult]:
    for number, prompt in enumerate(prompts, start=1):
        started = time.monotonic()
        warn_if_cut(pipe, prompt)
        member = Member.start(pipe, prompt, statistics, settings, row)
        result = single(member, fast([member])) if settings.mode == "fast" else released(member)
        result.cost.seconds = time.monotonic() - started
        yield result
        if progress is not None:
            progress(Progress("localize", number, len(prompts), "prompts", describe(result)))


def warn_if_cut(pipe: Pipeline, prompt: str) -> None:
    """Warn where a prompt is longer than the text encoders read, and name the words that no encoder sees."""
    if cut := cut_words(pipe, prompt):
        warnings.warn(
            f"prompt {shortened(prompt)!r} is longer than the text encoder reads; these words take no part: {cut!r}",
            UnmemorizeWarning,
            stacklevel=2,
        )


def require_sites(pipe: Pipeline, statistics: NeuronStatistics, row: DenoiserRow | None) -> None:
    """Raise `NeuronSetMismatch` unless statistics were made on this model and name sites that it has."""
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
