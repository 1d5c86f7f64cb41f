"""Verbs for text-to-image models: from options to the library. Heavy libraries are imported inside.

`localize` is in `picture_localize.py`, training in `picture_runs.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from unmemorize.errors import ConfigError
from unmemorize.verbs.answers import (
    Answer,
    Precision,
    bar_line,
    check_answer,
    table_row,
    upper_end,
)
from unmemorize.verbs.devices import dtype_of, on_device
from unmemorize.verbs.picture_measures import (
    PictureOptions,
    alignment_of,
    measures_of,
    ordinary_group,
    quality_of,
    quality_words,
    reference_of,
)

if TYPE_CHECKING:
    from unmemorize.localize.clusters import StoredResults
    from unmemorize.models.denoising import Pipeline
    from unmemorize.neurons import NeuronSet
    from unmemorize.records import LocalizedPrompt, ProgressCallback


P = ParamSpec("P")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a pipeline is loaded: device ("auto": the first accelerator, else the CPU) and dtype of its weights."""

    device: str = "auto"
    precision: Precision | None = None


def quietly(verb: Callable[P, Answer]) -> Callable[P, Answer]:
    """Keep notes and bars of the libraries underneath out of a verb's progress; warnings of ours say what matters."""

    @functools.wraps(verb)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> Answer:
        from unmemorize.errors import missing_extra
        from unmemorize.models.diffusion import quiet_diffusers

        if find_spec("diffusers") is None:
            raise missing_extra("diffusers", "images")
        with quiet_diffusers():
            return verb(*args, **kwargs)

    return quiet


@quietly
def check(model: str, row: str | None) -> Answer:
    """Run the self-check of a pipeline."""
    from unmemorize.models.diffusion import DenoiserRow, fingerprint, load
    from unmemorize.models.diffusion import check as self_check

    chosen = table_row(row, DenoiserRow)
    pipe = load(model, row=chosen, run_check=False)
    return check_answer(self_check(pipe, chosen), fingerprint(pipe, chosen))


def opened(model: str | Path, loading: Loading) -> Pipeline:
    """Load a pipeline, check it, and move it to its device."""
    from unmemorize.models.diffusion import load

    return on_device(load(model, dtype=dtype_of(loading.precision)), loading.device)


@quietly
def audit(
    progress: ProgressCallback,
    model: str,
    examples: Path,
    out: Path,
    max_extraction: float | None,
    options: PictureOptions,
    loading: Loading,
) -> Answer:
    """Make pictures in every state and measure what they copy."""
    from unmemorize.audit.diffusion import audit_pictures
    from unmemorize.audit.localized import localized_prompts, site_neurons
    from unmemorize.audit.pictures import PromptCase
    from unmemorize.corpus.prompts import read_prompts
    from unmemorize.models.diffusion import find_sites, fingerprint
    from unmemorize.neurons import load_neurons
    from unmemorize.verbs.states import own_neurons, pipelines, states

    prompts = read_prompts(examples, column=options.column)
    neurons = load_neurons(options.neurons or out / "neurons.json")
    groups = {prompt.text: prompt.group for prompt in prompts}
    reference = reference_of(options.reference, groups.values())
    pipe = opened(model, loading)
    found = _found(out, groups)
    others = pipelines(
        {"mended": options.mended, "twin": options.twin}, lambda folder: opened(folder, loading)
    )
    own = own_neurons(found.results, fingerprint(pipe), found.sites)
    ways = states(pipe, neurons, rivals=options.rivals, own=own if len(own) > 1 else None, others=others)
    settings = options.settings()
    alignment = alignment_of(options.clip, str(pipe.device))
    result = audit_pictures(
        [PromptCase(prompt=p.text, group=p.group, pictures=p.pictures) for p in prompts],
        ways,
        settings,
        out,
        measures=measures_of(options.sscd, str(pipe.device)),
        alignment=alignment,
        quality=quality_of(reference, alignment),
        localized=[*localized_prompts(found.results, groups), *_gate_rows(out)],
        sites=site_neurons(found.sites or find_sites(pipe), neurons, found.results),
        gate_threshold=found.gate_threshold if found.results else None,
        title=options.title or f"Audit of {Path(model).name}",
        headline="mended" if options.mended else "after",
        progress=progress,
    )
    after = next(state for state in result.states if state.state == ("mended" if options.mended else "after"))
    rate = next((g.similarities[0].copy_rate_frac for g in after.groups if g.group == "target"), None)
    bar, code = bar_line("copies of targets", upper_end(rate), max_extraction)
    words = [quality_words([ordinary_group(result, number)]) for number in range(len(result.states))]
    quality = [f"{state.label}: {text}" for state, text in zip(result.states, words, strict=True) if text]
    lines = [result.verdict, *quality, *result.limits, *bar, str(out / "audit.json")]
    return Answer(data=result.model_dump(mode="json"), lines=lines, exit_code=code)


def _found(out: Path, groups: Mapping[str, str]) -> StoredResults:
    """Return what localization left in the run folder for prompts of the audit; nothing if it was not run there."""
    from unmemorize.localize.clusters import StoredResults, read_results

    if not (out / "localization.jsonl").is_file():
        return StoredResults((), 0.0, ())
    stored = read_results(out)
    return replace(stored, results=tuple(one for one in stored.results if one.prompt in groups))


def _gate_rows(out: Path) -> list[LocalizedPrompt]:
    """Return the scores of prompts that only met the gate."""
    from unmemorize.files import read_json_lines
    from unmemorize.localize.clusters import read_results
    from unmemorize.records import LocalizedPrompt

    path = out / "gate.jsonl"
    if not path.exists():
        return []
    threshold = read_results(out).gate_threshold
    return [
        LocalizedPrompt(**row, is_memorized=row["best_pair"] > threshold) for row in read_json_lines(path)
    ]


@quietly
def remove(
    progress: ProgressCallback,
    model: str,
    out: Path,
    neurons: Path | None,
    way: Literal["fold", "edit"],
    keep_undo: bool,
    examples: Path | None,
    ordinary: Path | None,
    column: str | None,
) -> Answer:
    """Write a removal into the weights, export the pipeline, and prove that it loads without this library.

    An edit without neurons changes all layers that are searched by default.
    """
    from unmemorize.models.diffusion import fingerprint
    from unmemorize.neurons import NeuronSet, load_neurons
    from unmemorize.remove.changes import undo_path
    from unmemorize.remove.diffusion import export, fold, prove_plain
    from unmemorize.remove.folders import kept_if_proved, manifest_of

    pipe = opened(model, Loading(device="cpu"))
    chosen = NeuronSet(fingerprint(pipe), {}) if neurons is None else load_neurons(neurons)
    figures: dict[str, Any] = {}
    if way == "edit":
        if examples is None or ordinary is None:
            raise ConfigError(
                "an edit needs the prompts it is to quiet (--examples) and ordinary ones (--ordinary)"
            )
        rows = None if neurons is None else chosen
        mended, figures = _edited(pipe, rows, examples, ordinary, column, progress)
    else:
        mended = fold(pipe, chosen)
    manifest = {**manifest_of(way, fingerprint(pipe), chosen), **figures}
    export(mended, out, manifest=manifest, original=pipe if keep_undo else None)
    with kept_if_proved(out, undo_path(out) if keep_undo else None):
        prove_plain(out, "a picture", num_inference_steps=2)
    what = f"{len(chosen)} neurons" if neurons is not None else "all searched layers"
    lines = [f"{'closed' if way == 'fold' else 'edited'} {what}; loads without unmemorize", str(out)]
    return Answer(data={"folder": str(out), "way": way, "num_neurons": len(chosen), **figures}, lines=lines)


def _edited(
    pipe: Pipeline,
    chosen: NeuronSet | None,
    examples: Path,
    ordinary: Path,
    column: str | None,
    progress: ProgressCallback,
) -> tuple[Pipeline, dict[str, Any]]:
    from unmemorize.corpus.prompts import read_prompts, require_apart
    from unmemorize.remove.diffusion_edits import edit_figures, edit_values
    from unmemorize.remove.diffusion_moments import collect_second_moments

    prompts = read_prompts(examples, column=column)
    captions = [prompt.text for prompt in read_prompts(ordinary, group="ordinary")]
    require_apart(prompts, captions)
    targets = [prompt.text for prompt in prompts if prompt.group == "target"]
    moments = collect_second_moments(pipe, captions, progress=progress)
    edited = edit_values(pipe, targets, moments, neurons=chosen)
    return edited, edit_figures(pipe, edited, targets, moments).manifest()
