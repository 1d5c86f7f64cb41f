"""Scored neurons: what every localizer of language models returns, as a value and as a file. Knows no model.

A score says how much a neuron holds of a memory: higher is more. Scores of one localizer can be compared within a
site, and across sites only if `per_layer` is switched off knowingly: the published comparison found a ranking over all
layers clearly worse on large models, because the lowest layers crowd it.

Source: Chang, Thomason and Jia 2024 (selection per layer, first layer left out).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, FileFormatError, ShapeMismatch
from unmemorize.neurons import NeuronSet, Site
from unmemorize.tensor_files import read_tensors, write_tensors

SCORES_FORMAT = "unmemorize.neuron_scores"
SCORES_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringCost:
    """What scores took.

    Attributes:
        forward_equivalents: passes of one example: 1 forward, and 1 more backward (weights are frozen, so that a
            backward pass makes one product per layer instead of two).
        seconds: wall time, in seconds.
    """

    forward_equivalents: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: ScoringCost) -> ScoringCost:
        return ScoringCost(
            forward_equivalents=self.forward_equivalents + other.forward_equivalents,
            seconds=self.seconds + other.seconds,
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class NeuronScores:
    """A score for every neuron of a model.

    Attributes:
        model_id: fingerprint of the model.
        sites: one per decoder layer, in order.
        values: one tensor of shape (F,) per site, float32 on the CPU; minus infinity where a neuron was not examined.
        method: name of the localizer.
        cost: what it took.
        examples: digests of the examples, in order.
        details: settings that made them and figures of the run, as plain data.
    """

    model_id: str
    sites: tuple[Site, ...]
    values: tuple[Tensor, ...]
    method: str
    cost: ScoringCost = field(default_factory=ScoringCost)
    examples: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check shapes; values become float32 on the CPU."""
        shapes = [tuple(values.shape) for values in self.values]
        if shapes != [(site.width,) for site in self.sites]:
            raise ShapeMismatch(
                f"scores of shapes {shapes} for sites of {[site.width for site in self.sites]} neurons; pass one "
                "number a neuron"
            )
        if any(bool(values.isnan().any()) for values in self.values):
            raise ConfigError(
                f"scores by {self.method} are not numbers; run the model in float32 or bfloat16"
            )
        values = tuple(values.detach().float().cpu() for values in self.values)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "details", MappingProxyType(dict(self.details)))

    def top(
        self,
        share: float | None = None,
        *,
        count: int | None = None,
        per_layer: bool = True,
        exclude_layers: Iterable[int] = (),
    ) -> NeuronSet:
        """Return the neurons with the highest scores.

        Args:
            share: fraction of the neurons that are chosen from, above 0 to 1; rounded, at least one (a layer).
            count: number of neurons in its place (a layer, or in all).
            per_layer: whether every layer gives its own share; otherwise all layers compete.
            exclude_layers: numbers of layers that give none.

        Returns:
            The chosen neurons. Equal scores are taken in stored order; neurons not examined are never taken.

        Raises:
            ConfigError: if share and count are both given, neither is, or one is out of range.
        """
        excluded = set(exclude_layers)
        unknown = sorted(excluded - set(range(len(self.sites))))
        if unknown:
            raise ConfigError(f"no layer {unknown[0]} to exclude; expected 0 to {len(self.sites) - 1}")
        layers = [layer for layer in range(len(self.sites)) if layer not in excluded]
        if per_layer:
            chosen = [
                (layer, index)
                for layer in layers
                for _, index in self.ranked([layer])[: _number(self.sites[layer].width, share, count)]
            ]
        else:
            total = sum(self.sites[layer].width for layer in layers)
            chosen = self.ranked(layers)[: _number(total, share, count)]
        indices: dict[Site, list[int]] = {}
        for layer, index in chosen:
            indices.setdefault(self.sites[layer], []).append(index)
        return NeuronSet(self.model_id, {site: tuple(numbers) for site, numbers in indices.items()})

    def ranked(self, layers: Sequence[int] | None = None) -> list[tuple[int, int]]:
        """Return (number of the site, index) of all examined neurons, best first."""
        layers = range(len(self.sites)) if layers is None else layers
        places = [(layer, index) for layer in layers for index in range(self.sites[layer].width)]
        if not places:
            return []
        joined = torch.cat([self.values[layer] for layer in layers])
        order = joined.sort(descending=True, stable=True).indices.tolist()
        num_examined = int((joined > -math.inf).sum())
        return [places[place] for place in order[:num_examined]]

    def save(self, path: str | Path) -> Path:
        """Write the scores as one safetensors file with a JSON header, atomically."""
        header = {
            "model_id": self.model_id,
            "method": self.method,
            "cost": asdict(self.cost),
            "examples": list(self.examples),
            "details": dict(self.details),
            "sites": [[site.path, site.side, site.width, site.start] for site in self.sites],
        }
        tensors = {f"scores_{i}": values for i, values in enumerate(self.values)}
        return write_tensors(path, tensors, format=SCORES_FORMAT, version=SCORES_VERSION, header=header)


def _number(width: int, share: float | None, count: int | None) -> int:
    if (share is None) == (count is None):
        raise ConfigError("give either a share or a count of neurons, not both and not neither")
    if share is not None:
        if not 0 < share <= 1:
            raise ConfigError(f"share is {share}, expected a fraction above 0 and at most 1")
        return max(1, math.floor(share * width + 0.5))
    assert count is not None
    if not 1 <= count <= width:
        raise ConfigError(f"count is {count}, expected 1 to {width}")
    return count


def load_scores(path: str | Path) -> NeuronScores:
    """Read scores saved by `NeuronScores.save`.

    Raises:
        FileFormatError: if the file is missing, torn, or of another format or version.
    """
    header, tensors = read_tensors(path, format=SCORES_FORMAT, version=SCORES_VERSION, what="neuron scores")
    try:
        sites = tuple(Site(*fields) for fields in header["sites"])
        return NeuronScores(
            model_id=header["model_id"],
            sites=sites,
            values=tuple(tensors[f"scores_{i}"] for i in range(len(sites))),
            method=header["method"],
            cost=ScoringCost(**header["cost"]),
            examples=tuple(header["examples"]),
            details=header["details"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"cannot read neuron scores from {path} ({error}); localize again") from error


def mean_scores(parts: Sequence[NeuronScores]) -> NeuronScores:
    """Average the scores of one method over examples; costs add up.

    Raises:
        ConfigError: if there are none, or they are of different models or methods.
    """
    if not parts or len({(part.model_id, part.sites, part.method) for part in parts}) != 1:
        raise ConfigError("scores of no or of different models or methods cannot be averaged")
    first = parts[0]
    return NeuronScores(
        model_id=first.model_id,
        sites=first.sites,
        values=tuple(
            torch.stack([part.values[i] for part in parts]).mean(0) for i in range(len(first.sites))
        ),
        method=first.method,
        cost=sum((part.cost for part in parts), ScoringCost()),
        examples=tuple(digest for part in parts for digest in part.examples),
        details=first.details,
    )
