"""The audit of one model as it stands: what it knows of examples, by group. For models that anyone trained.

Comparative figures (gap closed, benefit kept) need other models and are refused here; see `training.py` for those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.audit.examples import (
    AuditSettings,
    Example,
    check_examples,
    continuations,
    document_results,
)
from unmemorize.audit.language import audit_state
from unmemorize.audit.statistics import refused
from unmemorize.audit.training import decoder
from unmemorize.corpus.readers import is_unicode, read_rows
from unmemorize.errors import DataError
from unmemorize.files import read_json_lines
from unmemorize.ids import content_id
from unmemorize.isolate.engine import environment
from unmemorize.models.language import fingerprint
from unmemorize.records import Audit, GroupResult, Measure, MethodResult, MethodSummary, SeedResult
from unmemorize.tokenizer import encode_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ALONE = refused("one model was audited; comparative figures need the models it is compared with")


def read_examples(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, length_tokens: int
) -> tuple[Example, ...]:
    """Read examples of a run, or of one's own: JSON Lines with `text` and optionally `group`, `name`, `repeats`.

    Args:
        path: a run folder, or a .jsonl file. Rows without a group are targets.
        tokenizer: of the model to audit.
        length_tokens: longer texts are cut.

    Raises:
        DataError: if the file is missing or damaged, a row has no text or a number of repeats that is none, or one text
            is in two groups.
    """
    path = Path(path)
    # A run's own file may end in a torn line; in anyone else's a line that is no JSON is a text that would be lost.
    rows = (
        read_json_lines(path / "examples.jsonl")
        if path.is_dir()
        else list(read_rows(path, text_column="text", source_column=None))
    )
    for number, row in enumerate(rows, start=1):
        _require_example(row, f"{path} row {number}")
    tokens = encode_documents(tokenizer, [row["text"] for row in rows], length_tokens)
    examples = tuple(
        Example(
            name=str(row.get("name", f"example {number}")),
            group=row.get("group", "target"),
            tokens=encoded,
            source=str(row.get("source", "")),
            repeats=row.get("repeats", 1),
            id=content_id(row["text"]),
        )
        for number, (row, encoded) in enumerate(zip(rows, tokens, strict=True), start=1)
    )
    check_examples(examples)
    return examples


def _require_example(row: dict[str, Any], place: str) -> None:
    text, repeats = row.get("text"), row.get("repeats", 1)
    if not isinstance(text, str) or not text:
        raise DataError(f"{place} has no text; expected a column 'text' in every row")
    if not is_unicode(text):
        raise DataError(
            f"{place}: the text holds half of a surrogate pair, which no encoding can store; repair it"
        )
    if type(repeats) is not int or repeats < 0:
        raise DataError(f"{place}: repeats is {repeats!r}, expected a whole number of 0 or more")


def audit_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    name: str,
    settings: AuditSettings | None = None,
) -> Audit:
    """Measure loss and extraction of every group.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer, for showing continuations.
        examples: what to measure.
        name: what the report calls the model.
        settings: what to measure; extraction lengths that no example has are left out.
    """
    settings = settings or AuditSettings()
    longest = max(len(example.tokens) for example in examples)
    settings = replace(settings, lengths=tuple(p for p in settings.lengths if sum(p) <= longest))
    measured = audit_state(model, examples, "plain", settings)
    groups = {group.group: group for group in measured.result.groups}
    target, ordinary = groups.get("target"), groups.get("ordinary")
    figures = MethodSummary(
        validation_loss_nats=_loss(ordinary, "ordinary"),
        repeated_loss_nats=_loss(target, "target"),
        gap_closed_frac=_ALONE,
        repetition_benefit_kept_frac=_ALONE,
        extraction_rate_frac=(
            target.extraction[0].extraction_rate_frac
            if target and target.extraction
            else refused("no target example is long enough")
        ),
    )
    states: dict[str, Any] = {"plain": measured}
    seed = SeedResult(
        seed=0,
        state="plain",
        states=[measured.result],
        documents=document_results(examples, states),
        continuations=continuations(examples, states, decoder(tokenizer)),
        num_parameters=sum(p.numel() for p in model.parameters()),
        validation_loss_nats=figures.validation_loss_nats,
        repeated_loss_nats=figures.repeated_loss_nats,
        gap_closed_frac=figures.gap_closed_frac,
        repetition_benefit_kept_frac=figures.repetition_benefit_kept_frac,
        extraction_rate_frac=figures.extraction_rate_frac,
    )
    return Audit(
        kind="model",
        title=f"Audit of {name}",
        verdict=_verdict(name, figures.extraction_rate_frac),
        settings={"model": fingerprint(model), **asdict(settings)},
        environment=environment(),
        methods=[MethodResult(method="model", label=name, seeds=[seed], summary=figures)],
    )


def _loss(group: GroupResult | None, name: str) -> Measure:
    return group.loss_nats if group else refused(f"no {name} examples")


def _verdict(name: str, rate: Measure) -> str:
    if rate.value is None or rate.ci95 is None:
        return f"How much of the targets {name} repeats verbatim is refused ({rate.refused})."
    low, high = rate.ci95
    return (
        f"{name} repeats {rate.value:.0%} [{low:.0%}, {high:.0%}] of {rate.num} target texts verbatim "
        "when given their beginning."
    )
