"""What a report says in words and numbers about one audit of pictures: large figures, what was done, every section.

Words come from the audit where it has them; the sentences here only name sizes found in it. The result is the state
named by `settings["headline_state"]`, else "after", else the first that is neither a rival nor before, placebo or
twin. Large figures are by the audit's first measure. Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmemorize.records import PictureAudit, PictureState
from unmemorize.report import gallery as galleries
from unmemorize.report import picture_costs as costs
from unmemorize.report import picture_figures as figures
from unmemorize.report.measures import Cell, measure_cell, number_text
from unmemorize.report.neuron_map import neuron_plot, neuron_table
from unmemorize.report.page import Beside, Fact, Figure, Part, Plot, embedded, run_letter, settings_pairs
from unmemorize.report.score_plots import effect_plot, gate_plot
from unmemorize.report.state_panels import (
    BEFORE,
    Aspect,
    StatePanel,
    aspect_cell,
    aspect_measure,
    aspects_of,
    result_state,
    state_panels,
)
from unmemorize.report.states import GROUPS
from unmemorize.report.tables import Table, clip, flatten, settings_table, time_text
from unmemorize.report.words import PICTURE_WORDS

MAX_BESIDE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRun(Part):
    """One audit of pictures as the template sees it; what the audit lacks is None or empty."""

    gallery: galleries.Gallery | None
    panels: tuple[StatePanel, ...]
    copies: Table | None
    pictures_changed: Table | None
    quality: Table | None
    gate: Plot | None
    effect: Plot | None
    neurons: Plot | None
    neurons_table: Table | None
    cost: Table | None
    generation: Table | None
    prompts: Table | None

    @property
    def family(self) -> str:
        """Which template draws it."""
        return "pictures"


def run_of(
    audit: PictureAudit,
    config: Mapping[str, Any] | None,
    folder: Path,
    *,
    index: int,
    num_runs: int,
    budget_bytes: int,
) -> PictureRun:
    """Everything the template shows of one run.

    Args:
        audit: the audit.
        config: the run's `config.json`, or None.
        folder: the run folder, for its pictures.
        index: place of the run in the report, from 0.
        num_runs: number of runs in the report.
        budget_bytes: most bytes of pictures, as base64 text.
    """
    ident, result = f"r{index + 1}", result_state(audit)
    return PictureRun(
        ident=ident,
        letter=run_letter(index) if num_runs > 1 else "",
        title=audit.title,
        verdict=audit.verdict,
        figures=_figures(audit, result),
        fine=_fine(audit),
        done=_done(audit),
        facts=_facts(audit),
        words=(*PICTURE_WORDS, *((clip(name, 60), clip(text, 400)) for name, text in audit.measures.items())),
        gallery=galleries.gallery(
            audit, folder, notes=_notes(audit), result_state=result, budget_bytes=budget_bytes
        ),
        panels=state_panels(audit, f"{ident}-state"),
        copies=figures.copies_table(audit, result, f"{ident}-copies"),
        pictures_changed=figures.changes_table(audit, result, f"{ident}-changes"),
        quality=figures.quality_table(audit, result, f"{ident}-quality"),
        gate=gate_plot(audit, f"{ident}-gate"),
        effect=effect_plot(audit, f"{ident}-effect"),
        neurons=neuron_plot(audit, f"{ident}-map"),
        neurons_table=neuron_table(audit, f"{ident}-sites"),
        cost=costs.cost_table(audit, f"{ident}-localizing"),
        generation=costs.generation_table(audit, f"{ident}-making"),
        prompts=costs.prompts_table(audit, f"{ident}-prompts"),
        settings=settings_table(
            settings_pairs(audit.settings, [("config", config or {})]), f"{ident}-settings", "Settings"
        ),
        environment=settings_table(flatten(audit.environment), f"{ident}-versions", "Versions and machine"),
        limits=tuple(audit.limits),
        audit_json=embedded(audit),
    )


def _state(audit: PictureAudit, name: str) -> PictureState | None:
    return next((state for state in audit.states if state.state == name), None)


def _figures(audit: PictureAudit, result: str) -> tuple[Figure, ...]:
    """The large numbers: copies of targets, ordinary pictures kept, and neighbours where there are any."""
    order = ("target", "ordinary", "neighbour")
    aspects = sorted(
        (one for one in aspects_of(audit) if one.group in order), key=lambda one: order.index(one.group)
    )
    state = _state(audit, result) or (audit.states[0] if audit.states else None)
    found = [_figure(audit, state, aspect) for aspect in aspects] if state else []
    return tuple(figure for figure in found if figure is not None)


def _figure(audit: PictureAudit, state: PictureState, aspect: Aspect) -> Figure | None:
    cell = aspect_cell(audit, state, aspect)
    if cell is None:
        return None
    titles = {
        "target": ("of targets copied", "What should go: how often the training picture comes out."),
        "target by similarity": (
            "similarity to the training picture",
            "Targets' best seed; 1 is the picture itself.",
        ),
        "ordinary": (
            "ordinary pictures kept",
            "Similarity to the same seed's picture before; 1 is no change at all.",
        ),
        "neighbour": ("of neighbours copied", "Other memory, which should stay as it was."),
        "neighbour by similarity": ("neighbours' similarity", "Other memory, which should stay as it was."),
    }
    is_by_similarity = aspect.field == "copy_similarity"
    title, explanation = titles[f"{aspect.group} by similarity" if is_by_similarity else aspect.group]
    before = _state(audit, BEFORE)
    was = aspect_cell(audit, before, aspect) if before and before is not state else None
    others = [one for one in audit.states if one is not state]
    controls = sorted(others, key=lambda one: (one.is_rival, not one.state.startswith("placebo")))
    return Figure(
        cell=cell,
        name=aspect.title,
        title=title,
        explanation=explanation,
        before=was if was and not was.is_refused else None,
        beside=tuple(
            Beside(name=clip(one.label, 40), cell=beside)
            for one in controls[:MAX_BESIDE]
            if (beside := _beside_cell(audit, one, aspect)) is not None
        ),
    )


def _beside_cell(audit: PictureAudit, state: PictureState, aspect: Aspect) -> Cell | None:
    measure = aspect_measure(audit, state, aspect)
    tone = "validation" if aspect.field == "kept_similarity" else "repeated"
    return None if measure is None else measure_cell(measure, aspect.unit, full=1.0, tone=tone)


def _fine(audit: PictureAudit) -> str:
    name = next(iter(audit.measures), "")
    threshold = galleries.copy_threshold(audit)
    copies = f"; a copy has {threshold:.3g} or more" if threshold is not None else ""
    measured = f" Similarity is measured by {clip(name, 60)}{copies}." if name else ""
    return f"Brackets: 95% intervals over prompts.{measured}"


def _done(audit: PictureAudit) -> tuple[str, ...]:
    """What was done, in plain words, as far as the audit tells."""
    sizes: dict[str, tuple[int, int]] = {}
    for state in audit.states:
        for group in state.groups:
            sizes.setdefault(group.group, (group.num_prompts, group.pictures_per_prompt))
    sentences = []
    if sizes:
        parts = [f"{count:,} {GROUPS[name].lower()}" for name, (count, _) in sizes.items()]
        each = sorted({pictures for _, pictures in sizes.values()})
        span = str(each[0]) if len(each) == 1 else f"{each[0]} to {each[-1]}"
        sentences.append(
            f"Pictures were made for {_listed(parts)} prompts, {span} of each prompt, in every one of "
            f"{len(audit.states)} states."
        )
    memorized = sum(one.is_memorized for one in audit.localized)
    if audit.localized:
        seconds = sum(one.seconds for one in audit.localized)
        sentences.append(
            f"{memorized:,} of {len(audit.localized):,} prompts passed the gate; localizing the targets took "
            f"{sum(one.sample_forwards for one in audit.localized):,} sample-forwards"
            + (f" and {time_text(seconds)}." if seconds > 0 else ".")
        )
    return tuple(sentences)


def _facts(audit: PictureAudit) -> tuple[Fact, ...]:
    """What each state is, where the audit says it."""
    width = sum(site.width for site in audit.sites)
    facts = []
    for state in audit.states:
        texts = [clip(state.description, 300).rstrip(".")] if state.description else []
        if state.num_neurons:
            of = f" of {width:,}" if width else ""
            texts.append(f"{state.num_neurons:,}{of} neurons off")
        if texts:
            tag = "rival" if state.is_rival else ""
            facts.append(Fact(name=clip(state.label, 80), text="; ".join(texts), tag=tag))
    return tuple(facts)


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _notes(audit: PictureAudit) -> dict[str, str]:
    """For each localized prompt, what was found, in one line."""
    notes = {}
    for one in audit.localized:
        if not one.is_memorized:
            notes[one.prompt] = f"Did not pass the gate ({number_text(one.best_pair, 'score')})."
            continue
        scores = " \N{RIGHTWARDS ARROW} ".join(
            number_text(value, "score") for value in (one.best_pair, one.refined_score)
        )
        plural = "" if one.num_refined == 1 else "s"
        notes[one.prompt] = (
            f"{one.num_refined:,} neuron{plural} of {one.num_initial:,} candidates; score {scores}, "
            f"threshold {number_text(one.threshold, 'score')}."
        )
    return notes
