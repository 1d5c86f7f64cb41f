"""What a verb gives back, and how words from the command line become values. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from unmemorize.errors import ConfigError
from unmemorize.files import parse_json

if TYPE_CHECKING:
    from unmemorize.records import Measure

T = TypeVar("T")

Precision = Literal["float32", "float16", "bfloat16"]
Positions = Literal["all", "start", "words", "end", "padding", "tail"]
TextEdit = Literal[
    "curvature", "svd", "subnet", "output-vectors", "gradient-ascent", "gradient-difference", "npo", "simnpo"
]
"""Edits of a language model's weights that take no neurons."""
UNLEARNING = ("gradient-ascent", "gradient-difference", "npo", "simnpo")
"""The edits that train, by a learning rate, until a budget is reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a verb did.

    Attributes:
        data: the same for programs; whatever `json` can store.
        lines: the same for a person; the last line is the one worth copying.
        exit_code: 0, or 1 if an audit missed its bar.
    """

    data: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    exit_code: int = 0


def integers(text: str | None) -> list[int] | None:
    """Read whole numbers separated by commas.

    Raises:
        ConfigError: if anything else stands there.
    """
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is not a list of whole numbers; write them with commas: 0,1,2") from None
    if not all(-(2**63) <= number < 2**63 for number in numbers):
        raise ConfigError(f"{text[:60]!r} holds a number of more than 64 bits; correct it")
    return numbers


def refuse_passed_over(verb: Callable[..., Answer], given: Mapping[str, object], reason: str) -> None:
    """Refuse options that would have no effect.

    Args:
        verb: the verb; its signature says what stands there by default.
        given: what the user said, by the verb's names of the options.
        reason: why they would have none.

    Raises:
        ConfigError: naming those that differ from their default.
    """
    options = signature(verb).parameters
    named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value != options[name].default]
    if named:
        raise ConfigError(f"{', '.join(named)}: {reason}; leave out")


def table_row(text: str | None, kind: type[T]) -> T | None:
    """Read a row of a site table from JSON.

    Raises:
        ConfigError: if it is not JSON, or its fields do not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    if text is None:
        return None
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"--row is not a table row at {place or 'its start'}: {first['msg']}") from error


def file_with_options(path: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """Read a JSON file of settings and lay the options that were given over it; dotted names go one level down.

    Raises:
        ConfigError: if the file is not a JSON object.
    """
    value: dict[str, Any] = {}
    if path is not None:
        try:
            value = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not a readable JSON file: {error}") from error
        if not isinstance(value, dict):
            raise ConfigError(f"{path} holds a {type(value).__name__}, expected an object with settings")
        # A run's own config.json may be given back as it is.
        value = value.get("settings", value)
    for name, choice in options.items():
        if choice is not None:
            *outer, last = name.split(".")
            place = value.setdefault(outer[0], {}) if outer else value
            place[last] = choice
    return value


def bar_line(what: str, upper_frac: float, bar_frac: float | None) -> tuple[list[str], int]:
    """Compare the upper end of a rate's interval with a bar; returns lines to show and the exit code."""
    if bar_frac is None:
        return [], 0
    is_missed = upper_frac > bar_frac
    line = f"{what} at most {upper_frac:.1%} (95 %), bar {bar_frac:.1%}: {'missed' if is_missed else 'met'}"
    return [line], int(is_missed)


def figure_text(measure: Measure | None, style: str = ".2f") -> str:
    """Word a figure with its 95 % interval, each number in a format such as ".0%"; or say why it is refused."""
    if measure is None or measure.value is None:
        return f"refused ({measure.refused if measure else 'nothing was measured'})"
    if measure.ci95 is None:
        return f"{measure.value:{style}}"
    low, high = measure.ci95
    return f"{measure.value:{style}} [{low:{style}}, {high:{style}}]"


def upper_end(measure: Any) -> float:
    """Return the upper end of a measure's interval; 1 if it was refused, since nothing is known then."""
    return 1.0 if measure is None or measure.ci95 is None else float(measure.ci95[1])


def check_answer(results: list[Any], name: str) -> Answer:
    """Show the results of a self-check."""
    checks = [{"name": r.name, "passed": r.passed, "detail": r.detail} for r in results]
    is_fine = all(r.passed for r in results)
    lines = [f"{'ok  ' if r.passed else 'FAIL'}  {r.name}: {r.detail}" for r in results]
    data = {"model": name, "passed": is_fine, "checks": checks}
    return Answer(data=data, lines=[*lines, name], exit_code=0 if is_fine else 1)
