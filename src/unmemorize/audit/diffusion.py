"""The audit of a text-to-image model: what its prompts reproduce, state by state.

The caller says which prompts (`PromptCase`), which states (`Way`) and which measures; every state gets the same
prompts and seeds. Pictures stay in the run folder, the figures go to `audit.json`, and running it again makes only
what is missing. Which state deserves which name is the caller's knowledge: a placebo is called "placebo" (or
"placebo-2"), a model that never saw the targets "twin"; the verdict looks for these names.

What this file does not do: switch neurons off, fold weights, or find neurons.

Letters: N prompts, S seeds, D features. Source: Hintersdorf et al. 2024, section 4 (figures); protocol ours.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmemorize.audit.copy_threshold import CopyThreshold, choose_threshold
from unmemorize.audit.examples import GROUPS
from unmemorize.audit.picture_figures import Resampling, per_prompt, similarity_figures
from unmemorize.audit.picture_measuring import (
    Instruments,
    PictureMeasuring,
    StateNumbers,
)
from unmemorize.audit.picture_quality import PictureQuality, require_unseen
from unmemorize.audit.picture_verdict import PLACEBO, picture_verdict
from unmemorize.audit.pictures import Picture, PromptCase, check_cases, read_picture, write_picture
from unmemorize.audit.prompt_alignment import ClipAlignment
from unmemorize.audit.similarity import SimilarityMeasure, structure
from unmemorize.audit.statistics import Floats
from unmemorize.audit.ways import BEFORE, TRAINING, PictureAuditSettings, Way, check_ways
from unmemorize.errors import ConfigError
from unmemorize.records import (
    Group,
    LocalizedPrompt,
    Measure,
    PictureAudit,
    PictureGroup,
    PicturePrompt,
    PictureState,
    ProgressCallback,
    SiteNeurons,
)

_TIGHT = 0.95  # a computed copy threshold above this misses copies that are not near perfect


def audit_pictures(
    cases: Sequence[PromptCase],
    ways: Sequence[Way],
    settings: PictureAuditSettings | None,
    out_folder: str | Path,
    *,
    measures: Sequence[SimilarityMeasure] = (),
    alignment: ClipAlignment | None = None,
    quality: PictureQuality | None = None,
    localized: Sequence[LocalizedPrompt] = (),
    sites: Sequence[SiteNeurons] = (),
    gate_threshold: float | None = None,
    title: str = "Audit of a text-to-image model",
    headline: str | None = None,
    environment: Mapping[str, str] | None = None,
    limits: Sequence[str] = (),
    progress: ProgressCallback | None = None,
) -> PictureAudit:
    """Make the pictures of every state, measure them, and write `audit.json`.

    Args:
        cases: the prompts, with their training pictures where they are known.
        ways: the states; the first one is "before".
        settings: seeds, steps, guidance, thresholds; None for `PictureAuditSettings()`.
        out_folder: the run folder; pictures that it holds are kept if they were made with the same settings.
        measures: similarity measures, the most trusted one first; by default `structure`.
        alignment: CLIP model for the similarity of prompt and picture.
        quality: features and reference pictures for FID and KID; none of a training picture, but for ordinary prompts.
        localized: what localization found for each prompt, for reports.
        sites: the neurons that are switched off, for reports.
        gate_threshold: similarity from which localization calls a prompt memorized, for reports.
        title: what reports call the audit.
        headline: state that the verdict is about; by default the first one after "before" that is no rival.
        environment: versions and machine; by default those of this process.
        limits: what the reader should know; limits that follow from the run are added.
        progress: called after every batch.

    Returns:
        The audit, as stored.

    Raises:
        DataError: if prompts contradict each other, a picture cannot be read, or a reference picture is a training
            picture.
        ConfigError: if states or settings contradict each other, or memory runs out for a single picture.
        RunFolderError: if the folder holds pictures made with other settings.
    """
    settings, out_folder = settings or PictureAuditSettings(), Path(out_folder)
    tools = Instruments(measures=tuple(measures) or (structure(),), alignment=alignment, quality=quality)
    check_cases(cases)
    check_ways(ways)
    _check_names(tools, settings, ways, headline)
    pictures = [[read_picture(picture) for picture in case.pictures] for case in cases]
    if quality is not None:
        require_unseen(quality, cases, pictures)
    references = {m.name: [m.embed(own) for own in pictures] for m in tools.measures}
    measuring = PictureMeasuring(cases, settings, out_folder, tools, references, progress)
    numbers = {way.state: measuring.measure(way) for way in ways}
    shown = _store_training(pictures, out_folder)  # after the folder is known to hold this run
    thresholds = {
        m.name: choose_threshold(
            m,
            cases,
            settings,
            references[m.name],
            numbers[BEFORE].similarities[m.name],
            measuring.before[m.name],
        )
        for m in tools.measures
    }
    states = [_state(way, cases, settings, tools, thresholds, numbers) for way in ways]
    audit = PictureAudit(
        title=title,
        verdict=picture_verdict(states, headline=headline),
        settings=_stored(settings, thresholds, headline),
        environment=dict(_environment() if environment is None else environment),
        measures=tools.descriptions(),
        copy_thresholds={name: one.value for name, one in thresholds.items() if one.value is not None},
        states=states,
        prompts=_prompts(cases, shown, numbers, tools.measures[0].name),
        localized=list(localized),
        gate_threshold=gate_threshold,
        sites=list(sites),
        limits=[*limits, *_own_limits(ways, settings, numbers, thresholds)],
    )
    audit.save(out_folder / "audit.json")
    return audit


def _check_names(
    tools: Instruments, settings: PictureAuditSettings, ways: Sequence[Way], headline: str | None
) -> None:
    names = [measure.name for measure in tools.measures]
    if len(set(names)) < len(names):
        raise ConfigError(f"measures are {names}; name each of them once")
    unknown = sorted(set(settings.copy_thresholds) - set(names))
    if unknown:
        raise ConfigError(
            f"copy_thresholds names {unknown[0]!r}, which is not measured; measures are {names}"
        )
    results = [way.state for way in ways[1:]]
    if headline is not None and headline not in results:
        raise ConfigError(f"headline is {headline!r}; expected one of {results}")


def _store_training(pictures: Sequence[Sequence[Picture]], out_folder: Path) -> list[str]:
    """Write every training picture into the run folder; returns the path of each prompt's first one, "" if none."""
    shown = []
    for number, own in enumerate(pictures):
        paths = [f"pictures/{TRAINING}/{number:04d}-{place}.png" for place in range(len(own))]
        for path, picture in zip(paths, own, strict=True):
            write_picture(out_folder / path, picture)
        shown.append(paths[0] if paths else "")
    return shown


def _state(
    way: Way,
    cases: Sequence[PromptCase],
    settings: PictureAuditSettings,
    tools: Instruments,
    thresholds: Mapping[str, CopyThreshold],
    numbers: Mapping[str, StateNumbers],
) -> PictureState:
    """Make the record of one state."""
    present = [group for group in GROUPS if any(case.group == group for case in cases)]
    groups = [_group(group, way, cases, settings, tools, thresholds, numbers) for group in present]
    return PictureState(
        state=way.state,
        label=way.label,
        description=way.description,
        is_rival=way.is_rival,
        num_neurons=way.num_neurons,
        seconds=numbers[way.state].made.seconds,
        groups=groups,
    )


def _group(
    group: Group,
    way: Way,
    cases: Sequence[PromptCase],
    settings: PictureAuditSettings,
    tools: Instruments,
    thresholds: Mapping[str, CopyThreshold],
    numbers: Mapping[str, StateNumbers],
) -> PictureGroup:
    """Make the record of one group of prompts in one state."""
    resampling = Resampling(seed=settings.seed, num_resamples=settings.num_resamples)
    is_member = np.array([case.group == group for case in cases])
    own, before = numbers[way.state], None if way.state == BEFORE else numbers[BEFORE]
    rival = way.placebo or next((name for name in numbers if name.startswith(PLACEBO)), None)
    placebo = None if rival is None or way.state.startswith(PLACEBO) else numbers[rival]
    similarities = []
    for name in (measure.name for measure in tools.measures):
        similarities.append(
            similarity_figures(
                name,
                own.similarities[name],
                is_member,
                thresholds[name].value,
                before=None if before is None else before.similarities[name],
                placebo=None if placebo is None else placebo.similarities[name],
                resampling=resampling,
            )
        )
    alignment, alignment_change = _mean_and_change(
        own.alignment_N, None if before is None else before.alignment_N, is_member, resampling
    )
    loss, loss_change = _mean_and_change(
        own.loss_N, None if before is None else before.loss_N, is_member, resampling
    )
    has_distances = own.distances is not None and tools.quality is not None and tools.quality.group == group
    fid, kid = own.distances if has_distances and own.distances is not None else (None, None)
    return PictureGroup(
        group=group,
        num_prompts=int(is_member.sum()),
        pictures_per_prompt=len(settings.seeds),
        similarities=similarities,
        alignment=alignment,
        alignment_change=alignment_change,
        denoising_loss=loss,
        denoising_loss_change=loss_change,
        fid=fid,
        kid=kid,
    )


def _mean_and_change(
    now_N: Floats | None, before_N: Floats | None, is_member: NDArray[np.bool_], resampling: Resampling
) -> tuple[Measure | None, Measure | None]:
    """Give the mean of one number a prompt over a group and its paired change from before; None if not measured."""
    if now_N is None or not np.isfinite(now_N[is_member]).all():
        return None, None
    mean = resampling.mean(now_N[is_member])
    if before_N is None or not np.isfinite(before_N[is_member]).all():
        return mean, None
    return mean, resampling.difference(now_N[is_member], before_N[is_member])


def _prompts(
    cases: Sequence[PromptCase], shown: Sequence[str], numbers: Mapping[str, StateNumbers], first: str
) -> list[PicturePrompt]:
    compared = {state: measured.similarities[first] for state, measured in numbers.items()}
    return [
        PicturePrompt(
            prompt=case.prompt,
            group=case.group,
            name=case.name,
            picture=shown[number],
            made={state: list(measured.made.paths[number]) for state, measured in numbers.items()},
            copy_similarity=per_prompt(compared, number),
        )
        for number, case in enumerate(cases)
    ]


def _stored(
    settings: PictureAuditSettings, thresholds: Mapping[str, CopyThreshold], headline: str | None
) -> dict[str, Any]:
    """Lay out the settings as JSON, with the rule behind each copy threshold."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return {
        **plain,
        "copy_threshold_rules": {name: chosen.rule for name, chosen in thresholds.items()},
        **({} if headline is None else {"headline_state": headline}),
        "copy_rate": "a prompt is copied if its best seed reaches the copy threshold",
    }


def _own_limits(
    ways: Sequence[Way],
    settings: PictureAuditSettings,
    numbers: Mapping[str, StateNumbers],
    thresholds: Mapping[str, CopyThreshold],
) -> list[str]:
    """State the limits that follow from how the run went."""
    limits = [
        f"A prompt is called copied if the best of its {len(settings.seeds)} seeds is; with more seeds more would be. "
        "None copied means that these seeds did not, not that nothing is left: other prompts may bring it back."
    ]
    for name, chosen in thresholds.items():
        if chosen.value is None:
            limits.append(
                f"There is no copy threshold of {name}, hence no copy rate: {chosen.rule}. Give one (copy_thresholds, "
                "--copy-threshold)."
            )
        elif chosen.value > _TIGHT and chosen.is_computed:
            limits.append(
                f"The copy threshold of {name} is {chosen.value:.3f} ({chosen.rule}): copies that are not near perfect "
                "are missed; set copy_thresholds, or give prompts with nearly equal pictures one prompt."
            )
    for way in ways:
        smallest = numbers[way.state].made.smallest_batch
        if smallest < settings.batch_size:
            limits.append(
                f"In state {way.label!r} memory ran out at {settings.batch_size} pictures per call; "
                f"{smallest} were made at a time."
            )
        if getattr(way.pipe, "safety_checker", None) is not None:
            limits.append(
                f"In state {way.label!r} the pipeline's safety checker was off while pictures were made."
            )
    return limits


def _environment() -> dict[str, str]:
    """Name versions and machine of this process."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("unmemorize", "torch", "diffusers", "transformers", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
