"""Sites, neurons, and sets of neurons: the waist of the library. Torch-free.

A *site* is a slice of one side of one linear layer: the input side of an MLP's last projection (hidden
neurons) or the output side of a value projection. A *neuron* is one index at a site. Every way of finding
memory ends in a `NeuronSet`, and everything after it (audit, removal, export, report) sees only that.

A neuron set is a value: immutable, with set algebra, tied to one model by its fingerprint, saved as JSON.
This file knows no model; what a fingerprint is made of is decided in `models/`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import index as as_index
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from unmemorize.errors import ConfigError, FileFormatError, NeuronSetMismatch
from unmemorize.files import read_json, write_json

NEURONS_FORMAT = "unmemorize.neurons"
NEURONS_VERSION = 1

Side = Literal["in", "out"]


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A slice of one side of one linear layer.

    Attributes:
        path: dotted path of the linear layer inside the model.
        side: "in" (its input channels) or "out" (its output channels).
        width: number of neurons, at least 1.
        start: first channel of the slice, when the side is shared with other channels.
    """

    path: str
    side: Side
    width: int
    start: int = 0

    def __post_init__(self) -> None:
        if not self.path or self.side not in ("in", "out") or self.width < 1 or self.start < 0:
            raise ConfigError(
                f"not a site: {self.path!r} {self.side!r} width {self.width} start {self.start}; "
                "expected a path, side in or out, width >= 1, start >= 0"
            )


@dataclass(frozen=True, slots=True)
class NeuronSet:
    """Neurons by site, tied to one model.

    Attributes:
        model_id: fingerprint of the model; one that ends in "-*" stands for any weights of that architecture.
        indices: site -> sorted, distinct indices in [0, width). Sites without neurons are dropped.
    """

    model_id: str
    indices: Mapping[Site, tuple[int, ...]]

    def __post_init__(self) -> None:
        tidy: dict[Site, tuple[int, ...]] = {}
        for site in sorted(self.indices):
            chosen = tuple(sorted({as_index(number) for number in self.indices[site]}))
            if chosen and not (0 <= chosen[0] and chosen[-1] < site.width):
                raise ConfigError(
                    f"neuron index out of range at {site.path}: got {chosen[0]}..{chosen[-1]}, "
                    f"expected 0..{site.width - 1}"
                )
            if chosen:
                tidy[site] = chosen
        object.__setattr__(self, "indices", MappingProxyType(tidy))

    def __reduce__(self) -> tuple[Any, ...]:
        return NeuronSet, (self.model_id, dict(self.indices))

    def __hash__(self) -> int:
        return hash((self.model_id, tuple(self.indices.items())))

    def __len__(self) -> int:
        return sum(len(chosen) for chosen in self.indices.values())

    def __iter__(self) -> Iterator[tuple[Site, int]]:
        return ((site, index) for site, chosen in self.indices.items() for index in chosen)

    def __contains__(self, neuron: tuple[Site, int]) -> bool:
        site, index = neuron
        return index in self.indices.get(site, ())

    def __or__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, set.union)

    def __and__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, set.intersection)

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, set.difference)

    def __le__(self, other: NeuronSet) -> bool:
        return len(self - other) == 0

    def _combine(self, other: NeuronSet, operation: Any) -> NeuronSet:
        if not same_model(self.model_id, other.model_id):
            raise NeuronSetMismatch(
                f"neuron sets of different models: {self.model_id} and {other.model_id}; "
                "combine sets of one model only"
            )
        sites = set(self.indices) | set(other.indices)
        indices = {
            site: tuple(operation(set(self.indices.get(site, ())), set(other.indices.get(site, ()))))
            for site in sites
        }
        narrower = other.model_id if self.model_id.endswith("-*") else self.model_id
        return NeuronSet(narrower, indices)

    def placebo(self, *, seed: int, outside: NeuronSet | None = None) -> NeuronSet:
        """Draw a random set of the same size at each site, the control that stands beside every result.

        Args:
            seed: seed of the draw.
            outside: neurons that must not be drawn; by default this set itself.

        Returns:
            As many neurons per site as here.

        Raises:
            ConfigError: if a site has too few other neurons to draw from.
        """
        generator = random.Random(seed)
        avoid = self if outside is None else outside
        drawn: dict[Site, tuple[int, ...]] = {}
        for site, chosen in self.indices.items():
            free = sorted(set(range(site.width)) - set(avoid.indices.get(site, ())))
            if len(free) < len(chosen):
                raise ConfigError(
                    f"no placebo of {len(chosen)} neurons at {site.path}: only {len(free)} others; "
                    "choose a smaller set"
                )
            drawn[site] = tuple(generator.sample(free, len(chosen)))
        return NeuronSet(self.model_id, drawn)

    def save(self, path: str | Path) -> Path:
        """Write the set as JSON (format `unmemorize.neurons`), atomically."""
        sites = [
            {"path": s.path, "side": s.side, "width": s.width, "start": s.start, "indices": list(chosen)}
            for s, chosen in self.indices.items()
        ]
        value = {"format": NEURONS_FORMAT, "format_version": NEURONS_VERSION, "model_id": self.model_id}
        return write_json(path, {**value, "sites": sites})


class _SiteRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    path: str
    side: Side
    width: int
    start: int
    indices: list[int]


class NeuronFile(BaseModel):
    """The schema of a neuron file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["unmemorize.neurons"]
    format_version: Literal[1]
    model_id: str
    sites: list[_SiteRecord]


def load_neurons(path: str | Path) -> NeuronSet:
    """Read a neuron set saved by `NeuronSet.save`.

    Raises:
        FileFormatError: if the file is missing, torn, of another version, or holds impossible indices.
    """
    value = read_json(path, format=NEURONS_FORMAT, version=NEURONS_VERSION)
    try:
        record = NeuronFile.model_validate(value)
        indices = {Site(s.path, s.side, s.width, s.start): tuple(s.indices) for s in record.sites}
        return NeuronSet(record.model_id, indices)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FileFormatError(f"{path} does not fit the neuron format at {place}: {first['msg']}") from error
    except ConfigError as error:
        raise FileFormatError(f"{path} holds impossible neurons: {error}") from error


def same_model(first: str, second: str) -> bool:
    """Tell whether two model ids name one model; a trailing "-*" matches any weights of the architecture."""
    if first == second:
        return True
    pairs = ((first, second), (second, first))
    return any(general.endswith("-*") and other.startswith(general[:-1]) for general, other in pairs)


def union(sets: Iterable[NeuronSet]) -> NeuronSet:
    """Unite several neuron sets of one model; at least one is needed."""
    iterator = iter(sets)
    try:
        total = next(iterator)
    except StopIteration:
        raise ConfigError("union of no neuron sets; pass at least one") from None
    for part in iterator:
        total = total | part
    return total
