"""What every run's part of the page has, whichever family was audited: figures, words, settings, data.

The families' stories (story, picture_story) fill these values; one set of template macros draws them.
Source: ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from unmemorize.records import Audit, NeuronAudit, PictureAudit
from unmemorize.report.measures import Cell
from unmemorize.report.tables import Table, flatten

MAX_EMBEDDED_BYTES = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What stands below a large figure to be compared with it, such as its placebo."""

    name: str
    cell: Cell
    is_result: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One large number with the sentence that explains it; `before` is what it was, `beside` what to compare."""

    cell: Cell
    name: str
    title: str
    explanation: str
    before: Cell | None = None
    beside: tuple[Beside, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure of standard training and of the headline method."""

    name: str
    before: Cell
    after: Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One named thing that was done, with a short tag such as "rival"."""

    name: str
    text: str
    tag: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A small picture among others, with its heading."""

    title: str
    picture: Markup
    is_headline: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A picture for wide and one for narrow screens, with what its marks mean."""

    pictures: tuple[Markup, ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What the template needs of any run; `words` explains terms, `data` is the audit as JSON or empty."""

    ident: str
    letter: str
    title: str
    verdict: str
    figures: tuple[Figure, ...]
    changes: tuple[Change, ...] = ()
    fine: str
    done: tuple[str, ...]
    facts: tuple[Fact, ...] = ()
    words: tuple[tuple[str, str], ...]
    settings: Table
    environment: Table
    limits: tuple[str, ...]
    audit_json: str

    @property
    def family(self) -> str:
        """Which template draws it: language or pictures."""
        return "language"


def run_letter(run: int) -> str:
    """Short name of a run in a report of several: A, B, ..."""
    return chr(ord("A") + run) if run < 26 else str(run + 1)


def settings_pairs(
    settings: Mapping[str, Any], more: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[tuple[str, str]]:
    """The audit's settings as names and values, then what only the others say, under their owner's name."""
    pairs = flatten(settings)
    known = {(name.rpartition(".")[2], value) for name, value in pairs}
    for owner, found in more:
        pairs += [
            (f"{owner}.{name}", value)
            for name, value in flatten(found)
            if (name.rpartition(".")[2], value) not in known
        ]
    return pairs


def embedded(audit: Audit | PictureAudit | NeuronAudit) -> str:
    """The whole audit for the download button, or nothing when it would bloat the page."""
    text = json.dumps(audit.model_dump(mode="json"), ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c") if len(text) <= MAX_EMBEDDED_BYTES else ""
