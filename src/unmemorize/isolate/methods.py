"""The training methods that a comparison sets side by side, and how each differs from plain training.

    standard           every document as often as the mixture repeats it
    dedup              every document once
    cap:R              every document at most R times: the honest rival of a sink method
    goldfish           labels dropped by a hash of the tokens before them
    sinks              each document's own sinks are open while it trains; the pool is dropped afterwards; with
                       shared_cap=R only its first R sightings teach the shared neurons, the rest its sinks alone
    gradient-masking   the pool learns from repeated documents only, all else from the other documents only;
                       the whole pool is on in training, and dropped afterwards

A method string may change settings for itself: `sinks:share_frac=0.5,sinks_per_id=64`, `goldfish:goldfish_k=3`.
Everything that tells methods apart is decided here: schedule, ids, labels, gradients. The loop only asks.

Source: sinks, arXiv 2507.09937; goldfish, arXiv 2406.10209; gradient-masking after Cloud et al. 2024 as the MemSinks
authors use it as a baseline (arXiv 2507.09937, section 4): sequences instead of tokens, parameters instead of
activations; shared_cap is ours.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError
from unmemorize.files import parse_json
from unmemorize.isolate.optimizer import pool_slices
from unmemorize.isolate.packing import IGNORED, Row, goldfish_labels
from unmemorize.isolate.plan import SinkPlan, SinkSettings

LARGEST_FACTOR = 1e6
"""Most that a learning rate, a weight decay or their multiple for sinks may be; float32 has no room for their product
with numbers much larger."""

Kind = Literal["standard", "dedup", "cap", "goldfish", "sinks", "gradient-masking"]
Half = Literal["all", "repeated", "others", "late", "early"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSettings:
    """What the compared methods do; a method string may change single settings (see `parse_method`)."""

    sinks: SinkSettings = field(
        default_factory=lambda: SinkSettings(share_frac=1.0, grown=2048, active_frac=None, sinks_per_id=64)
    )
    """Layout of the pool, for sinks and gradient-masking; by default a pool grows and all other neurons are shared."""
    sinks_for: Literal["all", "repeated"] = "repeated"
    """Which documents open sinks: all (the paper's way), or those that occur more than once; others train without."""
    sink_learning_rate_scale: float = 1.0
    """Learning rate of sinks, as a multiple of the shared neurons'."""
    shared_cap: int | None = None
    """Sightings of an id, its first, from which shared neurons learn; later ones teach its sinks alone. For method
    sinks; ids as sinks_for gives them. None is no cap."""
    compute: Literal["masked", "gathered"] = "gathered"
    """How layers with sinks are computed; the same numbers up to rounding."""
    goldfish_k: int = 4
    """Goldfish drops one label in so many; 4 is the paper's (arXiv 2406.10209)."""

    def __post_init__(self) -> None:
        if self.sinks_for not in ("all", "repeated"):
            raise ConfigError(f"sinks_for is {self.sinks_for!r}, expected all or repeated")
        if not 0 < self.sink_learning_rate_scale <= LARGEST_FACTOR:
            raise ConfigError(
                f"sink_learning_rate_scale is {self.sink_learning_rate_scale}, expected above 0, at most "
                f"{LARGEST_FACTOR:g}"
            )
        if self.shared_cap is not None and (self.shared_cap < 0 or self.shared_cap % 1):
            raise ConfigError(
                f"shared_cap is {self.shared_cap}, expected a whole number of sightings, 0 or more"
            )
        if self.compute not in ("masked", "gathered"):
            raise ConfigError(f"compute is {self.compute!r}, expected masked or gathered")
        if self.goldfish_k < 2:
            raise ConfigError(f"goldfish_k is {self.goldfish_k}, expected 2 or more")
        if self.compute == "gathered" and self.sinks.scheme == "published":
            raise ConfigError("the published scheme cannot be gathered; use compute masked or scheme keyed")


@dataclass(frozen=True, slots=True)
class Method:
    """One method with the settings it trains under.

    Attributes:
        name: the string it was parsed from; what reports and audits call it.
        kind: which method.
        settings: the comparison's settings with the method's own changes.
        cap: most sightings of a document (1 for dedup); None for as many as the mixture has.
    """

    name: str
    kind: Kind
    settings: MethodSettings
    cap: int | None = None

    @property
    def folder(self) -> str:
        """The name as a part of a path: `cap:8` is `cap-8`."""
        return re.sub(r"[^A-Za-z0-9_.]+", "-", self.name)

    @property
    def has_pool(self) -> bool:
        """Whether its models have sinks, and are shipped without them."""
        return self.kind in ("sinks", "gradient-masking")

    def halves(self, *, has_late: bool = False) -> tuple[Half, ...]:
        """Return the parts of a batch that need a backward pass of their own.

        Args:
            has_late: whether anything is to be learned from documents that `late` names.
        """
        if has_late:
            return ("late", "early")
        return ("repeated", "others") if self.kind == "gradient-masking" else ("all",)

    def late(self, rows: Sequence[Row], numbers: Sequence[Sequence[int]] | None = None) -> list[list[bool]]:
        """Tell which documents teach sinks alone: sightings of an id beyond the shared cap, in the order of rows.

        Args:
            rows: all rows of a training, documents as (token ids, sink id).
            numbers: which document each one is a piece of, in the layout of rows, as made by `pack_numbered`: its
                pieces are one sighting, at the place of the first. By default nothing is a piece of another.
        """
        cap = self.settings.shared_cap
        if self.kind != "sinks" or cap is None:
            return [[False] * len(row) for row in rows]
        if numbers is None:
            count = itertools.count()
            numbers = [[next(count) for _ in row] for row in rows]
        seen, sighting, late = Counter[int](), dict[int, int](), []
        for row, row_numbers in zip(rows, numbers, strict=True):
            for (_, identity), number in zip(row, row_numbers, strict=True):
                if number not in sighting:
                    seen[identity] += 1
                    sighting[number] = seen[identity]
            late.append(
                [
                    identity > 0 and sighting[number] > cap
                    for (_, identity), number in zip(row, row_numbers, strict=True)
                ]
            )
        return late

    def sink_id(self, document_id: int, repeated: Container[int]) -> int:
        """Return the id that a document's tokens carry: its own, or 0 where it opens no sinks."""
        is_for_all = self.kind == "sinks" and self.settings.sinks_for == "all"
        return document_id if is_for_all or (self.has_pool and document_id in repeated) else 0

    def labels(self, labels: Tensor, sink_ids: Tensor, half: Half, is_late: Tensor | None = None) -> Tensor:
        """Return the labels to learn from.

        Args:
            labels: shape (B, T), int64, -100 where nothing is predicted.
            sink_ids: shape (B, T), int64, as made by `sink_id`.
            half: part of the batch; repeated documents are the ones with an id.
            is_late: shape (B, T), bool, as `late` says of the token's document; needed for the halves late and early.
        """
        if half in ("late", "early"):
            assert is_late is not None
            return labels.masked_fill(is_late != (half == "late"), IGNORED)
        if half != "all":
            return labels.masked_fill((sink_ids > 0) != (half == "repeated"), IGNORED)
        if self.kind == "goldfish":
            return goldfish_labels(labels, self.settings.goldfish_k)
        return labels


def parse_method(text: str, settings: MethodSettings | None = None) -> Method:
    """Read a method string.

    Args:
        text: `KIND`, `cap:R`, or `KIND:NAME=VALUE,...` with names of `MethodSettings` or `SinkSettings`.
        settings: what the method's own changes are applied to.

    Raises:
        ConfigError: if the method or a setting is unknown, or a value out of range.
    """
    settings = settings or MethodSettings()
    kind, _, rest = text.partition(":")
    if kind not in get_args(Kind) or (kind != "cap" and text.endswith(":")):
        known = ", ".join("cap:R" if name == "cap" else name for name in get_args(Kind))
        raise ConfigError(f"unknown method {text!r}; expected one of {known}")
    if kind == "cap":
        if not re.fullmatch(r"[1-9][0-9]*", rest):
            raise ConfigError(f"method {text!r} needs a number of sightings, 1 or more, such as cap:8")
        return Method(text, "cap", settings, int(rest))
    changed = _changed(settings, rest, text)
    return Method(text, kind, changed, 1 if kind == "dedup" else None)  # type: ignore[arg-type]


def _changed(settings: MethodSettings, rest: str, text: str) -> MethodSettings:
    outer = {item.name for item in fields(MethodSettings)} - {"sinks"}
    inner = {item.name for item in fields(SinkSettings)}
    changes: dict[str, object] = {}
    sink_changes: dict[str, object] = {}
    for part in filter(None, re.split(r",(?![^\[]*\])", rest)):
        name, equals, value = part.partition("=")
        if not equals or name not in outer | inner:
            raise ConfigError(
                f"method {text!r} has {part!r}, expected NAME=VALUE with a name of {sorted(outer | inner)}"
            )
        (changes if name in outer else sink_changes)[name] = _value(value)
    if "sinks_per_id" in sink_changes:
        sink_changes.setdefault("active_frac", None)
    elif "active_frac" in sink_changes:
        sink_changes["sinks_per_id"] = None
    try:
        sinks = replace(settings.sinks, **sink_changes)  # type: ignore[arg-type]
        return replace(settings, sinks=sinks, **changes)  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(f"method {text!r} has a value of the wrong type: {error}") from error


def _value(text: str) -> object:
    """Read a number, true, false, null or [1,2] as such, and anything else as a string."""
    try:
        value = parse_json(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


class RoutedGradients:
    """Puts the gradients of two backward passes together: pool from the first, everything else from the second.

    With `put_pool(adds=True)` the pool gets both: the first pass teaches it alone, the second one teaches everything.

    Args:
        model: the model, unwrapped.
        plan: tells the pool: rows of the first projections with their biases, columns of the last.
    """

    def __init__(self, model: nn.Module, plan: SinkPlan) -> None:
        self._model = model
        self._parts = pool_slices(model, plan)
        self._kept: list[Tensor | None] = []
        self._reached: list[nn.Parameter] = []

    def keep_pool(self) -> None:
        """Set the pool's gradients aside and clear all; call after the pass over repeated, or late, documents."""
        self._reached = [p for p in self._model.parameters() if p.grad is not None]
        self._kept = [
            None if p.grad is None else p.grad.narrow(axis, s.start, s.stop - s.start).clone()
            for p, axis, s in self._parts
        ]
        self._model.zero_grad(set_to_none=True)

    def put_pool(self, *, adds: bool = False) -> None:
        """Replace the pool's gradients by those set aside, or add these; call after the pass over the others.

        Where these are added, weights that the first pass alone has reached get zeros: the optimizer's moments go on.
        """
        for parameter in self._reached if adds else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for (parameter, axis, s), kept in zip(self._parts, self._kept, strict=True):
            if parameter.grad is None and kept is None:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            pool = parameter.grad.narrow(axis, s.start, s.stop - s.start)
            if kept is not None and adds:
                pool.add_(kept)
            elif not adds:
                pool.copy_(torch.zeros_like(pool) if kept is None else kept)
        self._kept = []
