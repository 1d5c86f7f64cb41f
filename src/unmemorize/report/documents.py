"""Single documents: the sortable loss table, and continuations with memorized tokens marked.

A generated token counts as memorized when it equals the training text at the same position, which is how
verbatim extraction counts. White space becomes quiet visible signs, control characters their pictures; line breaks do
not break lines, so that whatever a model writes takes no more room than that many tokens of prose.
Source: ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from unmemorize.records import Audit, Continuation, DocumentResult, MethodResult
from unmemorize.report.measures import Cell, number_text
from unmemorize.report.states import GROUPS, STATES
from unmemorize.report.tables import Column, Row, Table, clip

SHOWN_ROWS = 50
MAX_DOCUMENT_ROWS = 2000
MAX_CONTINUATIONS = 24
MAX_TOKEN_CHARACTERS = 200
MAX_SIGNS = 8

DocumentColumn = tuple[str, str, str]
"""Method, state and heading of one loss column of the document table."""


def document_columns(audit: Audit, headline: str) -> list[DocumentColumn]:
    """Loss columns: standard and dedup as rivals, then every state of the headline method."""
    columns: list[DocumentColumn] = []
    for result in sorted(audit.methods, key=lambda result: result.method == headline):
        if result.method not in ("standard", "dedup", headline):
            continue
        states = {
            state for seed in result.seeds for document in seed.documents for state in document.loss_nats
        }
        ordered = [state for state in STATES if state in states]
        ordered += sorted(states - set(ordered))
        label = result.label
        columns += [
            (result.method, state, label if state == "plain" else f"{label}, {state}") for state in ordered
        ]
    return columns


def documents_table(audit: Audit, headline: str, ident: str) -> Table | None:
    """One row for each document with its loss by method and state; None when nothing was recorded."""
    columns = document_columns(audit, headline)
    losses = {column: _mean_losses(audit, column) for column in columns}
    documents: dict[str, DocumentResult] = {}
    for result in audit.methods:
        for seed in result.seeds:
            for document in seed.documents:
                documents.setdefault(document.example, document)
    if not documents or not columns:
        return None
    shown = list(documents.values())[:MAX_DOCUMENT_ROWS]
    has_sources = len({document.source for document in documents.values()}) > 1
    full = max((loss for table in losses.values() for loss in table.values()), default=0.0)
    tones = {column: _tone(audit, column, headline) for column in columns}
    rows = [
        Row(
            name=clip(document.example),
            hint=clip(document.source) if has_sources else "",
            cells=(
                *[
                    _loss_cell(losses[column].get(document.example), full, tones[column])
                    for column in columns
                ],
                Cell(text=GROUPS[document.group], value=document.group),
                Cell(text=f"{document.repeats}\N{MULTIPLICATION SIGN}", value=document.repeats),
                Cell(text=str(document.num_tokens), value=document.num_tokens),
            ),
        )
        for document in shown
    ]
    left_out = len(documents) - len(shown)
    return Table(
        ident=ident,
        caption="Loss of each document, nats per token",
        columns=(
            Column(name="Document", is_number=False),
            *[Column(name=heading) for _, _, heading in columns],
            Column(name="Group", is_number=False),
            Column(name="Seen"),
            Column(name="Tokens"),
        ),
        rows=tuple(rows),
        is_sortable=True,
        shown_rows=SHOWN_ROWS,
        note="Means over seeds." + (f" {left_out:,} more documents are in audit.json." if left_out else ""),
    )


def _mean_losses(audit: Audit, column: DocumentColumn) -> dict[str, float]:
    method, state, _ = column
    found: dict[str, list[float]] = {}
    for result in audit.methods:
        if result.method == method:
            for seed in result.seeds:
                for document in seed.documents:
                    loss = document.loss_nats.get(state)
                    if loss is not None and math.isfinite(loss):
                        found.setdefault(document.example, []).append(loss)
    return {example: sum(values) / len(values) for example, values in found.items()}


def _tone(audit: Audit, column: DocumentColumn, headline: str) -> str:
    """Bars of standard training and of the headline method as shipped stand out."""
    method, state, _ = column
    if method == "standard":
        return "repeated"
    shipped = {seed.state for result in audit.methods if result.method == headline for seed in result.seeds}
    return "good" if method == headline and state in shipped else ""


def _loss_cell(loss: float | None, full: float, tone: str) -> Cell:
    if loss is None:
        return Cell(text="")
    return Cell(
        text=number_text(loss, "loss"),
        value=loss,
        bar_frac=min(loss / full, 1.0) if full else None,
        tone=tone,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token as pieces of (kind, text); kind is text, space, newline or control.

    A piece of white space is one character, or all of a run of more than `MAX_SIGNS`: one sign and a number.
    """

    pieces: tuple[tuple[str, str], ...]
    is_memorized: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """What one model in one state continues with."""

    name: str
    tokens: tuple[Token, ...]
    num_memorized: int
    num_tokens: int
    is_training_text: bool = False

    @property
    def memorized_frac(self) -> float:
        """Share of tokens that equal the training text."""
        return self.num_memorized / self.num_tokens if self.num_tokens else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prefix with the training text and every continuation of it."""

    name: str
    group: str
    prefix: tuple[Token, ...]
    passages: tuple[Passage, ...]


_BREAKS = re.compile("\r\n|[\u010a\u0085\u2028\u2029]")
_RUN = rf"{{{MAX_SIGNS + 1},}}"
_PIECES = re.compile(
    rf"(?P<newline>\n{_RUN}|\n)|(?P<space> {_RUN}|\t{_RUN}|[ \t])|(?P<control>[\x00-\x1f\x7f])"
    r"|(?P<text>[^\x00-\x20\x7f]+)"
)


def token_of(text: str, *, is_memorized: bool = False) -> Token:
    """Split a token's text into visible pieces; every kind of line break, and byte-level white space, becomes plain."""
    text = clip(text, MAX_TOKEN_CHARACTERS)
    text = re.sub("^[\u0120\u2581]+", lambda found: " " * len(found[0]), _BREAKS.sub("\n", text))
    pieces = []
    for found in _PIECES.finditer(text):
        kind, piece = str(found.lastgroup), found[0]
        if kind == "control":
            piece = chr(0x2421 if piece == "\x7f" else 0x2400 + ord(piece))
        pieces.append((kind, piece))
    return Token(pieces=tuple(pieces), is_memorized=is_memorized)


def examples(audit: Audit, headline: str) -> list[Example]:
    """Continuations side by side: training text, standard, then every state of the headline method.

    Of each method the first seed that has continuations is shown; examples come as the audit lists them.
    """
    shown = [result for result in audit.methods if result.method in ("standard", headline)]
    shown = sorted(shown, key=lambda result: result.method == headline) or list(audit.methods[:2])
    found: dict[str, list[tuple[MethodResult, Continuation]]] = {}
    for result in shown:
        for one in next((seed.continuations for seed in result.seeds if seed.continuations), []):
            found.setdefault(one.example, []).append((result, one))
    return [_example(pairs) for pairs in list(found.values())[:MAX_CONTINUATIONS]]


def example_of(one: Continuation, labels: Mapping[str, str]) -> Example:
    """One text as each state continues it; `labels` maps the names of states to words."""
    return _with_passages(
        one, [_passage(labels.get(state, state), said, one.truth) for state, said in one.generated.items()]
    )


def _example(pairs: list[tuple[MethodResult, Continuation]]) -> Example:
    first = pairs[0][1]
    passages = []
    for result, one in pairs:
        label = result.label
        states = sorted(one.generated, key=lambda state: list(STATES).index(state) if state in STATES else 99)
        for state in states:
            name = label if state == "plain" else f"{label}, {state}"
            passages.append(_passage(name, one.generated[state], first.truth))
    return _with_passages(first, passages)


def _with_passages(first: Continuation, passages: list[Passage]) -> Example:
    truth = Passage(
        name="Training text",
        tokens=tuple(token_of(text) for text in first.truth),
        num_memorized=0,
        num_tokens=len(first.truth),
        is_training_text=True,
    )
    return Example(
        name=clip(first.example),
        group=GROUPS[first.group],
        prefix=tuple(token_of(text) for text in first.prefix),
        passages=(truth, *passages),
    )


def _passage(name: str, generated: list[str], truth: list[str]) -> Passage:
    equal = [place < len(truth) and text == truth[place] for place, text in enumerate(generated)]
    return Passage(
        name=name,
        tokens=tuple(token_of(text, is_memorized=same) for text, same in zip(generated, equal, strict=True)),
        num_memorized=sum(equal),
        num_tokens=len(truth),
    )
