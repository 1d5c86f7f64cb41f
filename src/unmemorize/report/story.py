"""What a report says in words and numbers about one run: headline figures, what was done, every section.

Words come from the audit where it has them; the sentences here only name sizes found in its settings.
The headline method is the one named by `settings["headline_method"]`, else the first with sinks, else the
first that is neither standard training nor a cap on repeats. Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from unmemorize.records import Audit, MethodResult
from unmemorize.report import curves, frontier, points
from unmemorize.report.documents import Example, documents_table, examples
from unmemorize.report.methods import HEADLINES, headline_cell, methods_table, with_short_labels
from unmemorize.report.page import Change, Figure, Panel, Part, Plot, embedded, run_letter, settings_pairs
from unmemorize.report.states import extraction_table, states_table
from unmemorize.report.tables import Table, count_text, flatten, settings_table, time_text
from unmemorize.report.words import LANGUAGE_WORDS

EARLY_FRAC = 0.06  # the steep beginning of training may leave the panels at the top


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Part):
    """One run of language models as the template sees it."""

    frontier: Plot | None
    panels: tuple[Panel, ...]
    methods: Table
    states: Table | None
    extraction: Table | None
    extraction_others: Table | None
    documents: Table | None
    examples: tuple[Example, ...]


def headline_method(audit: Audit) -> MethodResult | None:
    """The method whose figures head the report; None for an audit without methods."""
    by_name = {result.method: result for result in audit.methods}
    named = audit.settings.get("headline_method")
    if isinstance(named, str) and named in by_name:
        return by_name[named]
    rivals = [result for result in audit.methods if points.repeats_of(result.method) is None]
    sinks = [result for result in rivals if result.method.partition(":")[0] == "sinks"]
    return next(iter(sinks or rivals or audit.methods), None)


def run_of(audit: Audit, config: Mapping[str, Any] | None, index: int, num_runs: int) -> Run:
    """Everything the template shows of one run.

    Args:
        audit: the audit.
        config: the run's `config.json`, or None.
        index: place of the run in the report, from 0.
        num_runs: number of runs in the report.
    """
    original, audit = audit, with_short_labels(audit)
    result = headline_method(audit)
    headline = result.method if result else ""
    ident = f"r{index + 1}"
    groups = ["target"] if _has_group(audit, "target") else ["neighbour", "heldout", "ordinary"]
    others = [name for name in ("neighbour", "heldout", "ordinary") if name not in groups]
    methods = methods_table(audit, headline, f"{ident}-methods", [one.label for one in original.methods])
    more = [*((one.label, one.settings) for one in audit.methods), ("config", config or {})]
    changes = _changes(audit, result)
    prefix = f"Standard training → {result.label}. " if result and changes else ""
    return Run(
        ident=ident,
        letter=run_letter(index) if num_runs > 1 else "",
        title=audit.title,
        verdict=audit.verdict,
        figures=_figures(audit, result),
        changes=changes,
        fine=prefix + methods.note,
        done=_done(audit),
        words=LANGUAGE_WORDS,
        frontier=frontier_plot([(index, audit)], f"{ident}-frontier"),
        panels=_panels(audit, headline, ident),
        methods=methods,
        states=states_table(audit, headline, f"{ident}-states"),
        extraction=extraction_table(
            audit, headline, f"{ident}-extraction", groups, "Verbatim extraction of target texts"
        ),
        extraction_others=extraction_table(
            audit, headline, f"{ident}-extraction-others", others, "Verbatim extraction of the other groups"
        )
        if others
        else None,
        documents=documents_table(audit, headline, f"{ident}-documents"),
        examples=tuple(examples(audit, headline)),
        settings=settings_table(settings_pairs(audit.settings, more), f"{ident}-settings", "Settings"),
        environment=settings_table(flatten(audit.environment), f"{ident}-versions", "Versions and machine"),
        limits=tuple(audit.limits),
        audit_json=embedded(original),
    )


def _has_group(audit: Audit, group: str) -> bool:
    return any(
        one.group == group
        for result in audit.methods
        for seed in result.seeds
        for state in seed.states
        for one in state.groups
    )


def _figures(audit: Audit, result: MethodResult | None) -> tuple[Figure, ...]:
    """The two large numbers; a model looked at alone has no rival to be measured against."""
    if result is None:
        return ()
    wanted: list[tuple[str, str, str]] = [
        (
            "gap_closed_frac",
            "of the memorization gap closed",
            "How much of the head start that standard training has on repeated text over new text is gone.",
        ),
        (
            "repetition_benefit_kept_frac",
            "of the benefit of repetition kept",
            "How much of what seeing text repeatedly teaches the model about new text is still there.",
        ),
    ]
    if audit.kind == "model":
        wanted = [
            (
                "extraction_rate_frac",
                "of target texts extracted",
                "Share of target texts that the model continues word for word.",
            ),
            (
                "repeated_loss_nats",
                "nats, loss on target texts",
                "The lower this is against the validation loss, the more is memorized.",
            ),
        ]
    return tuple(
        Figure(
            cell=headline_cell(result, field), name=HEADLINES[field][0], title=title, explanation=explanation
        )
        for field, title, explanation in wanted
    )


def _changes(audit: Audit, result: MethodResult | None) -> tuple[Change, ...]:
    standard = next((one for one in audit.methods if one.method == "standard"), None)
    if result is None or standard is None or standard is result:
        return ()
    wanted = (
        ("repeated_loss_nats", "Loss on repeated text"),
        ("validation_loss_nats", "Validation loss"),
        ("extraction_rate_frac", "Texts extracted word for word"),
    )
    changes = [
        Change(name=name, before=headline_cell(standard, field), after=headline_cell(result, field))
        for field, name in wanted
    ]
    return tuple(change for change in changes if not (change.before.is_refused or change.after.is_refused))


def _done(audit: Audit) -> tuple[str, ...]:
    """What was done, in plain words, as far as the settings tell."""
    seeds = [seed for result in audit.methods for seed in result.seeds]
    sizes = sorted({seed.num_parameters for seed in seeds if seed.num_parameters})
    model = f" of {count_text(sizes[-1])} parameters" if sizes else ""
    sentences = []
    if audit.kind == "training":
        names = [result.label for result in audit.methods]
        kept = sum(seed.train_s for seed in seeds)
        per_method = sorted({len(result.seeds) for result in audit.methods})
        count = (
            " to ".join(str(number) for number in dict.fromkeys((per_method[0], per_method[-1])))
            if names
            else "0"
        )
        sentences.append(_data_sentence(audit))
        sentences.append(
            f"{len(seeds)} model{'s' if len(seeds) != 1 else ''}{model} learned from it: "
            f"{len(names)} method{'s' if len(names) != 1 else ''} ({', '.join(names)}), "
            f"{count} seed{'s' if count != '1' else ''} each"
            + (f", {time_text(kept)} of training in all." if kept else ".")
        )
    elif seeds:
        names = [result.label for result in audit.methods]
        sentences.append(f"One look at {', '.join(names)}{', a model' + model if model else ''}.")
    sentences.append(
        "Every figure is for the state a model would be shipped in, unless a table names another."
    )
    return tuple(sentence for sentence in sentences if sentence)


def _data_sentence(audit: Audit) -> str:
    """Where the text came from and how often it was seen, as far as the settings tell."""
    names = ("num_repeated", "repeats", "num_once", "num_validation")
    repeated, repeats, once, validation = (_find(audit.settings, name) for name in names)
    parts = [
        f"{repeated:,} documents repeated {repeats:,} times" if repeated and repeats else "",
        f"{once:,} seen once" if once else "",
        f"{validation:,} held back for validation" if validation else "",
    ]
    corpus = _corpus_name(audit.settings.get("corpus"))
    return f"Text from {corpus}: {', '.join(filter(None, parts))}." if any(parts) else ""


def _corpus_name(corpus: object) -> str:
    """A file's name without its folders; the corpus may be a path or settings with a path."""
    path = corpus.get("path") if isinstance(corpus, Mapping) else corpus
    if path == "python-docs":
        return "Python's own documentation"
    return PurePath(path).name if isinstance(path, str) and path else "one corpus"


def _find(settings: Mapping[str, Any], name: str) -> int | None:
    """The first whole number of this name, at any depth."""
    for key, value in settings.items():
        if key == name and isinstance(value, int):
            return value
        if isinstance(value, Mapping) and (found := _find(value, name)) is not None:
            return found
    return None


def frontier_plot(audits: Sequence[tuple[int, Audit]], ident: str) -> Plot | None:
    """The frontier of one or several runs; None when fewer than two methods can be placed.

    Args:
        audits: place of each run in the report, from 0, and its audit; not empty.
        ident: beginning of the pictures' ids.
    """
    placed: list[points.Point] = []
    for run, (index, audit) in enumerate(audits):
        short = with_short_labels(audit)
        result = headline_method(short)
        placed += points.frontier_points(short, run, result.method if result else "", run_letter(index))
    if len(placed) < 2:
        return None
    description = "; ".join(point.words for point in placed)
    pictures = tuple(
        frontier.frontier(placed, layout, ident=f"{ident}-{place}", description=description)
        for place, layout in enumerate((frontier.WIDE, frontier.NARROW))
    )
    if len(audits) == 1:
        return Plot(pictures=pictures, note=_frontier_note(audits[0][1], headline_method(audits[0][1])))
    first = run_letter(audits[0][0])
    note = (
        f"Filled marks are run {first}, hollow marks the later runs; letters name the run. "
        f"The shaded area belongs to run {first}'s curve."
    )
    return Plot(pictures=pictures, note=note)


def _frontier_note(audit: Audit, result: MethodResult | None) -> str:
    """What the marks mean, as far as this audit has them."""
    counts = {len(one.seeds) for one in audit.methods}
    crosses = "over documents" if counts == {1} else "over seeds"
    notes = [f"Crosses are 95% intervals {crosses}."]
    if counts != {1}:
        notes = ["Large marks are means over seeds, small dots single seeds.", *notes]
    if any(points.repeats_of(one.method) is not None for one in audit.methods):
        notes.append(
            "On the curve: dedup sees a document once, 8\N{MULTIPLICATION SIGN} at most eight times, standard always."
        )
    if result is not None and headline_cell(result, "beyond_curve_nats").value is not None:
        notes.append(f"The dashed line is the distance of {result.label} from the curve.")
    return " ".join(notes)


def _panels(audit: Audit, headline: str, ident: str) -> tuple[Panel, ...]:
    drawn = [result for result in audit.methods if curves.curves_of(result).everything]
    everything = [point for result in drawn for point in curves.curves_of(result).everything]
    if not everything or len({step for step, _ in everything}) < 2:
        return ()
    steps = (0.0, max(step for step, _ in everything))
    late = [loss for step, loss in everything if step >= EARLY_FRAC * steps[1]]
    pad = 0.04 * (max(late) - min(late)) or 0.1
    losses = (max(0.0, min(late) - pad), max(late) + pad)
    return tuple(
        Panel(
            title=result.label,
            picture=curves.learning_panel(result, steps=steps, losses=losses, ident=f"{ident}-curve{place}"),
            is_headline=result.method == headline,
        )
        for place, result in enumerate(drawn)
    )
