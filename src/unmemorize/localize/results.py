"""What localization found for each example and what it cost, as a value and as files. Knows no model.

A run folder gets `localization.json` (settings and what they refer to), `localization.jsonl` (one example a line,
appended as they are found, so that an interrupted run continues), `localization.csv` and `neurons.json`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unmemorize.errors import FileFormatError, RunFolderError
from unmemorize.files import append_json_line, read_json, read_json_lines, write_atomic, write_json
from unmemorize.localize.search import Entries, Trial
from unmemorize.models.prompts import shortened
from unmemorize.neurons import NeuronSet, Site, union

LOCALIZATION_FORMAT = "unmemorize.localization"
LOCALIZATION_VERSION = 1


@dataclass(slots=True)
class Cost:
    """What was spent on a prompt.

    Attributes:
        sample_forwards: denoiser passes times samples that the method asks for (twice that with guidance).
        denoiser_calls: passes that it asks for, each of any number of samples.
        sample_forwards_run: those that were computed and not looked up.
        denoiser_calls_run: the same for passes.
        sample_backwards: backward passes times samples; each is also counted as two sample-forwards above.
        seconds: wall time, in seconds.
    """

    sample_forwards: int = 0
    denoiser_calls: int = 0
    sample_forwards_run: int = 0
    denoiser_calls_run: int = 0
    sample_backwards: int = 0
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

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data; an infinite theta becomes null."""
        value: dict[str, Any] = _finite(asdict(self))
        return value


def describe(result: PromptResult) -> str:
    """Say in one line what was found for a prompt, how far the search got, and what it cost."""
    start = f"{shortened(result.prompt)!r}: "
    spent = f"{result.cost.sample_forwards} sample-forwards, {result.cost.seconds:.1f} s"
    if not result.is_memorized:
        return f"{start}not memorized: no two samples are alike enough (best pair {result.best_pair:.3f}); {spent}"
    return f"{start}{outcome_of(result, f'{len(result.kept)} kept samples')}; {spent}"


def outcome_of(result: Any, where: str) -> str:
    """Say how many neurons a prompt or cluster has and whether they break its memory."""
    count = sum(map(len, result.refined))
    num_sites = sum(1 for chosen in result.refined if chosen)
    found = f"{_plural(count, 'neuron')} at {_plural(num_sites, 'site')}"
    if not count:
        return f"memorized, but there were no candidates (score {result.refined_score:.3f})"
    if result.is_replaced:
        return (
            "memory not broken: no candidate set brings the score below the threshold; all of them bring it to "
            f"{result.threshold:.3f}, {found} to {result.refined_score:.3f} in all {where}"
        )
    breaks = f"{found} {'breaks' if count == 1 else 'break'} the memory in all {where}"
    return f"{breaks} (score {result.refined_score:.3f}, threshold {result.threshold:.3f})"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def result_from_json(value: dict[str, Any]) -> PromptResult:
    """Read a result back.

    Raises:
        FileFormatError: if a field is missing or of another kind.
    """

    def tuples(part: Any) -> Any:
        return tuple(tuples(item) for item in part) if isinstance(part, list) else part

    def trial(part: dict[str, Any]) -> Trial:
        fields = {name: tuples(item) for name, item in part.items()}
        fields["label"] = tuple(math.inf if item is None else item for item in fields["label"])
        return Trial(**fields)

    try:
        fields = {name: tuples(item) for name, item in value.items()}
        for name in ("selection", "layer_trials", "neuron_trials"):
            fields[name] = tuple(trial(part) for part in value[name])
        return PromptResult(**{**fields, "cost": Cost(**value["cost"])})
    except (KeyError, TypeError) as error:
        raise FileFormatError(
            f"a line of localization.jsonl does not fit ({error}); start a new folder"
        ) from error


def start_folder(folder: str | Path, header: dict[str, Any]) -> dict[str, PromptResult]:
    """Begin or continue a run folder; returns the results it already holds, by prompt.

    Raises:
        RunFolderError: if the folder holds a run with other settings.
        FileFormatError: if a file of it is damaged.
    """
    return {result.prompt: result for result in map(result_from_json, start_lines(folder, header))}


def start_lines(folder: str | Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """Begin or continue a run folder; returns the lines of results it already holds.

    Raises:
        RunFolderError: if the folder holds a run with other settings.
        FileFormatError: if a file of it is damaged.
    """
    folder = Path(folder)
    header = {"format": LOCALIZATION_FORMAT, "format_version": LOCALIZATION_VERSION, **_finite(header)}
    settings, lines = folder / "localization.json", folder / "localization.jsonl"
    if not settings.exists():
        write_json(settings, header)
        return []
    stored = read_json(settings, format=LOCALIZATION_FORMAT, version=LOCALIZATION_VERSION)
    if stored != header:
        changed = [name for name in {**stored, **header} if stored.get(name) != header.get(name)]
        raise RunFolderError(f"{folder} holds another run ({', '.join(changed)} differ); choose a new folder")
    if not lines.exists():
        return []
    complete = read_json_lines(lines)
    write_atomic(lines, "")  # a torn last line goes; what is complete is written again
    for value in complete:
        append_json_line(lines, value)
    return complete


def add_line(folder: str | Path, value: dict[str, Any]) -> None:
    """Append one result as plain data."""
    append_json_line(Path(folder) / "localization.jsonl", _finite(value))


def finish_folder(
    folder: str | Path, rows: Sequence[dict[str, Any]], model_id: str, found: Sequence[NeuronSet]
) -> None:
    """Write `localization.csv` (the rows) and `neurons.json` (the union of what was found)."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    columns = list(rows[0]) if rows else []
    writer.writerow(columns)
    writer.writerows([row[name] for name in columns] for row in rows)
    write_atomic(Path(folder) / "localization.csv", table.getvalue())
    union([NeuronSet(model_id, {}), *found]).save(Path(folder) / "neurons.json")


def prompt_row(result: PromptResult) -> dict[str, Any]:
    """Return a prompt's row of `localization.csv`."""
    return {
        "prompt": result.prompt,
        "is_memorized": result.is_memorized,
        "best_pair": f"{result.best_pair:.6f}",
        **table_fields(result),
    }


def table_fields(result: Any) -> dict[str, Any]:
    """Return the columns that prompts and clusters share."""
    chosen = [f"{layer}:{index}" for layer, indices in enumerate(result.refined) for index in indices]
    scores = ("initial_score", "refined_score", "threshold")
    return {
        **{name: f"{getattr(result, name):.6f}" for name in scores},
        "is_replaced": result.is_replaced,
        "num_initial": sum(map(len, result.initial)),
        "num_refined": len(chosen),
        "refined": " ".join(chosen),
        "sample_forwards": result.cost.sample_forwards,
        "seconds": f"{result.cost.seconds:.3f}",
    }
