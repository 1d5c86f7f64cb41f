"""Verbs for runs that train text-to-image models: train, measure every method in every state, take the pool out.

An audit of a run is one audit of pictures for each seed, in `audits/seed<k>`: the first method stands for "before", the
others and the states of their sinks stand beside it (`picture_states.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import ConfigError
from unmemorize.verbs.answers import Answer, bar_line, figure_text, file_with_options, upper_end
from unmemorize.verbs.diffusion import Loading, quietly
from unmemorize.verbs.kept_sinks import kept_ids
from unmemorize.verbs.picture_measures import (
    PictureOptions,
    alignment_of,
    measures_of,
    ordinary_group,
    quality_measures,
    quality_of,
    quality_words,
    reference_of,
)

if TYPE_CHECKING:
    from unmemorize.records import Measure, PictureAudit, ProgressCallback


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSource:
    """Where captioned pictures come from; see `corpus.pictures.read_pictures`."""

    path: str = ""
    size_px: int | None = None
    caption_column: str = "caption"
    limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Options of `train` that only text-to-image models have."""

    pipeline: str | None = None
    pictures: str | None = None
    size_px: int | None = None
    ids: str | None = None
    methods: list[str] | None = field(default=None)
    seeds: list[int] | None = field(default=None)


@quietly
def train(progress: ProgressCallback, out: Path, settings: Path | None, options: TrainOptions) -> Answer:
    """Train a pipeline with several methods and seeds on captioned pictures."""
    from unmemorize.corpus.pictures import read_pictures
    from unmemorize.isolate.picture_settings import PictureTrainSettings
    from unmemorize.isolate.settings import settings_of
    from unmemorize.isolate.train_diffusion import train as run_training

    named = {
        "pipeline": options.pipeline,
        "ids": options.ids,
        "methods": options.methods,
        "seeds": options.seeds,
        "pictures.path": options.pictures,
        "pictures.size_px": options.size_px,
    }
    value = file_with_options(settings, named)
    source = settings_of(PictureSource, value.pop("pictures", {}))
    if not value.get("pipeline") or not source.path:
        missing = "--pipeline FOLDER" if not value.get("pipeline") else "--pictures FOLDER"
        raise ConfigError(f"training on pictures needs a pipeline and captioned pictures; give {missing}")
    chosen = settings_of(PictureTrainSettings, value)
    size_px = source.size_px or _own_size(chosen.pipeline)
    pictures = read_pictures(
        source.path, size_px=size_px, caption_column=source.caption_column, limit=source.limit
    )
    trained = run_training(chosen, pictures, out, progress)
    models = [str(one.folder) for one in trained]
    return Answer(data={"run": str(out), "models": models}, lines=[*models, f"next: unmemorize audit {out}"])


def _own_size(pipeline: str) -> int:
    """Return the side of a pipeline's own pictures, in pixels."""
    from unmemorize.models.denoising import denoiser_of
    from unmemorize.models.diffusion import load

    pipe: Any = load(pipeline, run_check=False)
    denoiser: Any = denoiser_of(pipe)
    return int(denoiser.config.sample_size) * int(getattr(pipe, "vae_scale_factor", 1))


def names_pipeline(settings: Path | None) -> bool:
    """Tell whether a settings file is one for training on pictures: it names the pipeline to start from."""
    return settings is not None and "pipeline" in file_with_options(settings, {})


def is_picture_run(folder: Path) -> bool:
    """Tell whether a folder is a run that trained text-to-image models."""
    from unmemorize.files import parse_json

    try:
        value = parse_json((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and (value.get("kind"), value.get("family")) == ("training", "diffusion")


def audited(run: Path) -> list[Path]:
    """Return the folders of a run that hold an audit: its own, or one a seed for a training on pictures."""
    by_seed = sorted(path.parent for path in (run / "audits").glob("seed*/audit.json"))
    return [run] if (run / "audit.json").is_file() or not by_seed else by_seed


@quietly
def audit(
    progress: ProgressCallback,
    run: Path,
    max_extraction: float | None,
    options: PictureOptions,
    loading: Loading,
) -> Answer:
    """Make pictures with every model of a run in every state and measure what they copy, seed by seed."""
    from unmemorize.audit.diffusion import audit_pictures
    from unmemorize.files import read_json
    from unmemorize.verbs.picture_states import measured, ways_of

    _refuse_for_pipelines(options)
    config = read_json(run / "config.json", format="unmemorize.run", version=1)["settings"]
    if max_extraction is not None and not any(name.startswith("sinks") for name in config["methods"]):
        raise ConfigError(f"--max-extraction is about closed sinks, and {run} trained none; leave it out")
    pictures = measured(run)
    settings = options.settings()
    reference = reference_of(options.reference, [case.group for case in pictures.cases])
    audits: list[PictureAudit] = []
    for seed in config["seeds"]:
        ways = list(ways_of(run, config["methods"], seed, pictures, loading))
        device = str(ways[0].pipe.device)
        alignment = alignment_of(options.clip, device)
        audits.append(
            audit_pictures(
                pictures.cases,
                ways,
                settings,
                run / "audits" / f"seed{seed}",
                measures=measures_of(options.sscd, device),
                alignment=alignment,
                quality=quality_of(reference, alignment),
                title=f"Audit of {run.name}, seed {seed}",
                headline=next((way.state for way in ways[1:] if not way.is_rival), None),
                limits=pictures.limits,
                progress=progress,
            )
        )
    figures, lines = _over_seeds(audits)
    bar, code = bar_line("copies of targets with sinks closed", _worst_closed(audits), max_extraction)
    folders = [str(run / "audits" / f"seed{seed}") for seed in config["seeds"]]
    verdicts = [audit.verdict for audit in audits]
    return Answer(
        data={"audits": folders, **figures},
        lines=[*verdicts, *lines, *bar, f"next: unmemorize report {run}"],
        exit_code=code,
    )


def _over_seeds(audits: Sequence[PictureAudit]) -> tuple[dict[str, Any], list[str]]:
    """Return what was measured by figure, state and seed, with reasons where there is none, and a line for each state.

    Figures: copies, validation_loss, and where they were measured alignment, kid and fid of ordinary prompts.
    """
    figures: dict[str, dict[str, list[float]]] = {}
    reasons: dict[str, dict[str, str]] = {}
    lines = []
    for number, state in enumerate(audits[0].states):
        rates = [_copies(audit, number) for audit in audits]
        ordinary = [ordinary_group(audit, number) for audit in audits]
        losses = [None if group is None else group.denoising_loss for group in ordinary]
        found = {"copies": rates, "validation_loss": losses, **quality_measures(ordinary)}
        for name, measures in found.items():
            figures.setdefault(name, {})[state.state] = _values(measures)
            for measure in measures:
                if measure is not None and measure.refused:
                    reasons.setdefault(name, {})[state.state] = measure.refused
        words = [f"copies {_mean(rates, '.2f')}", f"validation loss {_mean(losses, '.4f')}"]
        words += [text for text in (quality_words(ordinary, _mean), state.description) if text]
        lines.append(f"{state.label}: {'; '.join(words)}")
    return {**figures, "refused": reasons}, lines


def _values(measures: Sequence[Measure | None]) -> list[float]:
    return [measure.value for measure in measures if measure is not None and measure.value is not None]


def _mean(measures: Sequence[Measure | None], style: str) -> str:
    """Word a mean over seeds, with an interval from three seeds on; why there is none, where there is none."""
    from unmemorize.audit.statistics import mean_over_seeds

    values = _values(measures)
    if not values:
        return figure_text(measures[0])
    if len(values) < 3:
        return f"{sum(values) / len(values):{style}}"
    return figure_text(mean_over_seeds(values), style)


def _worst_closed(audits: Sequence[PictureAudit]) -> float:
    """Return the highest upper end of the copy rate with sinks closed, 0..1; 1 where nothing was measured."""
    closed = [n for n, state in enumerate(audits[0].states) if state.num_neurons and not state.is_rival]
    return max((upper_end(_copies(audit, n)) for audit in audits for n in closed), default=1.0)


def _refuse_for_pipelines(options: PictureOptions) -> None:
    """Refuse options that mean something for a pipeline and would be passed over for a run."""
    given = [
        f"--{name}" for name in ("neurons", "mended", "twin", "column") if getattr(options, name) is not None
    ]
    given += ["--rivals"] if options.rivals != PictureOptions().rivals else []
    if given:
        raise ConfigError(
            f"{', '.join(given)}: for a pipeline; a run is audited with its own methods and states"
        )


def _copies(audit: PictureAudit, number: int) -> Measure | None:
    groups = audit.states[number].groups
    return next((g.similarities[0].copy_rate_frac for g in groups if g.group == "target"), None)


@quietly
def remove_sinks(model: Path, out: Path, keep: str | None, way: str) -> Answer:
    """Take the pool out of a pipeline that was trained with sinks, and prove that the folder is a plain one.

    No config describes a part of a grown pool: sinks that stay are kept beside the plain folder, the others as zeros.
    """
    from unmemorize.isolate.sink_files import load_with_sinks
    from unmemorize.models.denoiser_layers import has_plain_widths
    from unmemorize.models.diffusion import fingerprint
    from unmemorize.remove.diffusion import excise, export, export_with_sinks, keep_sinks, prove_plain
    from unmemorize.remove.folders import kept_if_proved, manifest_of

    if way != "excise":
        raise ConfigError("the pool of a pipeline is cut out, not folded; use --way excise, or leave it out")
    kept = kept_ids(keep, model)
    pipe, plan = load_with_sinks(model)
    chosen = plan.pool() - plan.neurons_for(kept) if kept else plan.pool()
    is_beside = bool(kept) and not has_plain_widths(pipe)
    if kept and is_beside:
        manifest = {**manifest_of("fold", fingerprint(pipe), chosen), "kept_ids": kept}
        export_with_sinks(keep_sinks(pipe, plan, kept), plan, out, manifest=manifest)
    else:
        export(excise(pipe, chosen), out, manifest=manifest_of(way, fingerprint(pipe), chosen))
    with kept_if_proved(out):
        prove_plain(out, "a picture", num_inference_steps=1)
    num_kept = len(plan.pool()) - len(chosen)
    lines = [
        f"removed {len(chosen)} neurons" + (f", kept {num_kept} of {len(kept)} ids" if kept else ""),
        "loads without unmemorize"
        + (", grown sinks closed; load_with_sinks opens them" if is_beside else ""),
        str(out),
    ]
    data = {"folder": str(out), "num_neurons": len(chosen), "num_kept": num_kept}
    return Answer(data=data, lines=lines)
