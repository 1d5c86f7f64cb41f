"""The audit of a training run: every model in every state, then all of them compared.

Models without a pool are measured as they are. Models with a pool are measured in the states off (as they would be
shipped), own, foreign (the placebo of own) and all. Then a few sources are deleted while the others keep their sinks
(state exclude), beside the deletion of as many ids that nobody has (placebo): there the deleted documents are the
targets and the other repeated ones their neighbours.

What was measured of a model is kept beside it, so that an interrupted audit continues; `audit.json` is made from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from unmemorize.audit.comparison import RunResult, compare
from unmemorize.audit.examples import (
    AuditSettings,
    Example,
    StateMeasurement,
    continuations,
    document_results,
    group_result,
)
from unmemorize.audit.language import audit_state, document_losses, extract
from unmemorize.errors import RunFolderError
from unmemorize.files import read_json_lines, write_atomic
from unmemorize.isolate.engine import environment
from unmemorize.isolate.language import sink_state
from unmemorize.isolate.loop import read_training
from unmemorize.isolate.methods import Method, parse_method
from unmemorize.isolate.plan import SinkPlan, load_plan
from unmemorize.isolate.run_folder import model_folder
from unmemorize.isolate.runs import read_run
from unmemorize.isolate.settings import TrainSettings
from unmemorize.isolate.states import State
from unmemorize.models.language import load
from unmemorize.records import Audit, CurvePoint, Progress, ProgressCallback, StateName, StateResult
from unmemorize.tokenizer import encode_documents, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATES: dict[State, str] = {
    "off": "the pool is closed: the model as it would be shipped",
    "own": "every document opens its own sinks",
    "foreign": "every document opens another repeated document's sinks: the placebo of own",
    "all": "every sink is on, at its expected value in training",
}
DELETED_SHARE = 8  # one in so many repeated documents is deleted in the state exclude


@dataclass(frozen=True, slots=True)
class _Run:
    """A run folder, opened: settings, tokenizer, and the examples as tokens."""

    path: Path
    settings: TrainSettings
    tokenizer: PreTrainedTokenizerBase
    examples: tuple[Example, ...]


def audit_training(
    run: str | Path,
    *,
    settings: AuditSettings | None = None,
    progress: ProgressCallback | None = None,
) -> Audit:
    """Measure and compare all models of a run folder, and write `audit.json`.

    Args:
        run: a folder written by `train`.
        settings: what to measure; extraction lengths that exceed the run's documents are left out.
        progress: called after every batch.

    Raises:
        FileFormatError: if a file of the run is missing or damaged.
        RunFolderError: if a model has not finished training, or the folder cannot be written.
    """
    opened = _open(Path(run))
    wanted = settings or AuditSettings()
    longest = opened.settings.model.length_tokens
    wanted = replace(wanted, lengths=tuple(pair for pair in wanted.lengths if sum(pair) <= longest))
    methods = [parse_method(name, opened.settings.method) for name in opened.settings.methods]
    models = [(method, seed) for method in methods for seed in opened.settings.seeds]
    results: list[RunResult] = []
    for number, (method, seed) in enumerate(models):
        if progress is not None:
            progress(Progress("audit", number, len(models), "models", f"{method.name}, seed {seed}"))
        results.append(_measured(opened, method, seed, wanted))
    audit = compare(
        results,
        title=f"Training comparison on {Path(opened.settings.corpus.path).name}",
        settings=opened.settings.to_json(),
        environment=environment(),
        headline=next((m.name for m in methods if m.kind == "sinks"), None),
        seed=wanted.seed,
        num_resamples=wanted.num_resamples,
    )
    audit.save(opened.path / "audit.json")
    if progress is not None:
        progress(Progress("audit", len(models), len(models), "models", "compared"))
    return audit


def _open(path: Path) -> _Run:
    settings = read_run(path).settings
    tokenizer = load_tokenizer(path / "tokenizer")
    rows = read_json_lines(path / "examples.jsonl")
    if any("text" not in row for row in rows):
        raise RunFolderError(f"{path / 'examples.jsonl'} holds no texts; train with keep_text to audit")
    tokens = encode_documents(tokenizer, [row["text"] for row in rows], settings.model.length_tokens)
    examples = tuple(
        Example(
            name=row["name"],
            group=row["group"],
            tokens=encoded,
            source=row["source"],
            repeats=row["repeats"],
            id=row["id"],
        )
        for row, encoded in zip(rows, tokens, strict=True)
    )
    return _Run(path, settings, tokenizer, examples)


def _measured(run: _Run, method: Method, seed: int, settings: AuditSettings) -> RunResult:
    """Read what was measured of a model, or measure it."""
    folder = model_folder(run.path, method.name, seed)
    if not (folder / "training.json").is_file():
        raise RunFolderError(
            f"{folder} holds no finished model; run the same train command again to finish it"
        )
    words = json.dumps([asdict(settings), [e.name for e in run.examples]])
    kept = folder / f"measured-{hashlib.sha256(words.encode()).hexdigest()[:8]}.json"
    adapter = TypeAdapter(RunResult)
    if kept.is_file():
        try:
            return adapter.validate_json(kept.read_bytes())
        except ValidationError:
            kept.unlink()
    result = _measure(run, folder, method, seed, settings)
    write_atomic(kept, adapter.dump_json(result))
    return result


def _measure(run: _Run, folder: Path, method: Method, seed: int, settings: AuditSettings) -> RunResult:
    model = load(folder, run_check=False)
    if not method.has_pool:
        states = {"plain": audit_state(model, run.examples, "plain", settings)}
        extra: list[StateResult] = []
    else:
        plan = load_plan(folder / "sinks.json")
        owners = [replace(e, sink_id=e.id if e.repeats > 1 else 0) for e in run.examples]
        states = _pool_states(model, plan, method, owners, settings)
        extra = _deletions(model, plan, owners, settings) if method.kind == "sinks" else []
    curve = [CurvePoint.model_validate(row) for row in _curve(folder / "metrics.jsonl")]
    trained = read_training(folder)
    return RunResult(
        method=method.name,
        label=_label(method),
        seed=seed,
        state="off" if method.has_pool else "plain",
        states=[measured.result for measured in states.values()] + extra,
        documents=document_results(run.examples, states),
        settings=asdict(method.settings) if method.has_pool else {},
        continuations=continuations(run.examples, states, decoder(run.tokenizer)),
        curve=curve,
        num_parameters=trained.num_parameters,
        train_s=trained.train_s,
        tokens_per_s=trained.tokens_per_s,
    )


def _pool_states(
    model: PreTrainedModel,
    plan: SinkPlan,
    method: Method,
    examples: Sequence[Example],
    settings: AuditSettings,
) -> dict[str, StateMeasurement]:
    """Measure the states of a model with a pool; a pool that all repeated documents share has no owners."""
    measured: dict[str, StateMeasurement] = {}
    candidates = torch.tensor([e.sink_id for e in examples if e.sink_id], dtype=torch.int64)
    for state, description in STATES.items():
        if method.kind == "gradient-masking" and state in ("own", "foreign"):
            continue
        with sink_state(model, plan, state, candidates=candidates if state == "foreign" else None):
            measured[state] = audit_state(model, examples, state, settings, description=description)
    return measured


def _deletions(
    model: PreTrainedModel, plan: SinkPlan, examples: Sequence[Example], settings: AuditSettings
) -> list[StateResult]:
    """Delete some sources while the others keep their sinks, and as many ids that nobody has."""
    repeated = [e for e in examples if e.group == "target"]
    deleted = torch.tensor([e.id for e in repeated[: max(1, len(repeated) // DELETED_SHARE)]])
    nobody = plan.foreign_ids(deleted) if plan.scheme != "disjoint" else None
    results: list[StateResult] = []
    sequences, owners = [e.tokens for e in repeated], [e.sink_id for e in repeated]
    is_target = np.arange(len(repeated)) < len(deleted)
    closings: list[tuple[StateName, torch.Tensor | None, str]] = [
        (
            "exclude",
            deleted,
            f"{len(deleted)} of {len(repeated)} repeated documents deleted, the others keep their sinks",
        ),
        ("placebo", nobody, f"sinks of {len(deleted)} ids that nobody has deleted instead"),
    ]
    for state, closed, description in closings:
        if closed is None:
            continue
        with sink_state(model, plan, "own", exclude=closed.tolist()):
            losses = document_losses(model, sequences, sink_ids=owners, batch_size=settings.batch_size)
            tests = [
                extract(model, sequences, *pair, sink_ids=owners, batch_size=settings.batch_size)
                for pair in settings.lengths
            ]
        groups = [
            group_result("target", is_target, losses, tests, settings),
            group_result("neighbour", ~is_target, losses, tests, settings),
        ]
        results.append(StateResult(state=state, description=description, groups=groups))
    return results


def _label(method: Method) -> str:
    if method.kind != "sinks":
        return method.name
    sinks = method.settings.sinks
    pool = f"{sinks.grown} grown" if sinks.grown else f"{1 - sinks.share_frac:.0%} carved"
    size = f"{sinks.sinks_per_id} each" if sinks.sinks_per_id else f"{sinks.active_frac:.0%} each"
    cap = method.settings.shared_cap
    capped = "" if cap is None else f", shared neurons learn from {cap} sighting{'s' if cap != 1 else ''}"
    return f"sinks ({pool}, {size}, for {method.settings.sinks_for}{capped})"


def _curve(path: Path) -> list[dict[str, Any]]:
    """Pick the logged points that were evaluated."""
    names = CurvePoint.model_fields
    rows = read_json_lines(path)
    return [
        {k: v for k, v in row.items() if k in names}
        for row in rows
        if row.get("validation_loss_nats") is not None
    ]


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """Return the text of a token as the tokenizer shows it."""
    return lambda token: str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
