"""What every table of the report is made of, and how settings, counts and times are worded.

All tables are the same value, so one template macro draws, sorts, filters and exports them. Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unmemorize.report.measures import Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column: its heading, an optional second line, and whether it holds numbers."""

    name: str
    hint: str = ""
    is_number: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: a heading with an optional quiet second line, then one cell for each further column."""

    name: str
    hint: str = ""
    cells: tuple[Cell, ...]
    is_strong: bool = False
    starts_block: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with its caption; `spans` is an upper row of headings over several columns each."""

    ident: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    spans: tuple[tuple[str, int], ...] = ()
    is_sortable: bool = False
    shown_rows: int = 0
    note: str = ""


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and worded values, in the order given."""
    pairs: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            pairs += flatten(item, f"{name}.")
        elif item not in (None, "", []):
            pairs.append((name, _plain(item)))
    return pairs


def _plain(item: Any) -> str:
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int):
        return f"{item:,}" if abs(item) >= 10_000 else str(item)
    if isinstance(item, float):
        return f"{item:g}"
    return ", ".join(_plain(part) for part in item) if isinstance(item, list) else str(item)


def count_text(count: float) -> str:
    """Word a large count: 1.9 M, 640 k, 950."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}\N{NO-BREAK SPACE}{letter}"
    return f"{count:.3g}"


def time_text(seconds: float) -> str:
    """Word a duration: 45 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f}\N{NO-BREAK SPACE}s"
    if seconds < 5400:
        return f"{seconds / 60:.0f}\N{NO-BREAK SPACE}min"
    return f"{seconds / 3600:.1f}\N{NO-BREAK SPACE}h"


def settings_table(pairs: Sequence[tuple[str, str]], ident: str, caption: str) -> Table:
    """Names and values."""
    return Table(
        ident=ident,
        caption=caption,
        columns=(Column(name="Name", is_number=False), Column(name="Value", is_number=False)),
        rows=tuple(Row(name=name, cells=(Cell(text=value, value=value),)) for name, value in pairs),
    )


def clip(text: str, limit: int = 160) -> str:
    """The beginning of a long text."""
    return text if len(text) <= limit else text[:limit] + "\N{HORIZONTAL ELLIPSIS}"
