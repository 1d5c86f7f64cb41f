"""What is ordinary for a neuron: mean and spread of a quantity over many examples, streamed, resumed, saved and merged.

Statistics are accumulated in float64 by Chan's update, batch by batch; examples are never held together. A file of them
names model, sites, quantity and, by a digest, the examples, so that it is continued with the same ones only. What a
quantity is, and how it is measured, is the caller's.

Source: Chan, Golub and LeVeque 1979; the released statistics of Hintersdorf et al. 2024 can be read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, DataError, FileFormatError, NeuronSetMismatch, ShapeMismatch
from unmemorize.neurons import Site
from unmemorize.records import Progress, ProgressCallback
from unmemorize.tensor_files import read_tensors, write_tensors

Quantity = Literal["activation", "derivative"]
Example = TypeVar("Example")

STATISTICS_FORMAT = "unmemorize.activations"
STATISTICS_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronStatistics:
    """Mean and spread of a quantity of neurons over ordinary examples.

    Attributes:
        model_id: model they were computed on; "" where that is not known (imported files).
        sites: the sites, in the order of the search.
        count: number of examples.
        means: one tensor of shape (F,) per site, float64, in units of the quantity.
        squares: sums of squared deviations from the mean, same shapes.
        positions: which token positions were averaged.
        quantity: "activation": an example's mean absolute activation, in units of the activation; "derivative": the
            derivative of a text's loss by the neuron's gate, in nats a token.
        digest: digest of the examples in order, "" where they are not known.
    """

    model_id: str
    sites: tuple[Site, ...]
    count: int
    means: tuple[Tensor, ...]
    squares: tuple[Tensor, ...]
    positions: str = "all"
    quantity: Quantity = "activation"
    digest: str = ""

    @classmethod
    def empty(
        cls,
        model_id: str,
        sites: Sequence[Site],
        positions: str = "all",
        quantity: Quantity = "activation",
    ) -> NeuronStatistics:
        """Return statistics of no examples."""
        zeros = tuple(torch.zeros(site.width, dtype=torch.float64) for site in sites)
        return cls(
            model_id=model_id,
            sites=tuple(sites),
            count=0,
            means=zeros,
            squares=zeros,
            positions=positions,
            quantity=quantity,
        )

    @property
    def stds(self) -> tuple[Tensor, ...]:
        """Standard deviations (divisor count - 1), shape (F,) per site, float32."""
        return tuple((s / max(self.count - 1, 1)).sqrt().float() for s in self.squares)

    @property
    def mean_squares(self) -> tuple[Tensor, ...]:
        """Means of the squared quantity, shape (F,) per site, float32."""
        return tuple(
            (square / max(self.count, 1) + mean.square()).float()
            for mean, square in zip(self.means, self.squares, strict=True)
        )

    def updated(self, values: Sequence[Tensor], examples: Sequence[str]) -> NeuronStatistics:
        """Add examples: one tensor of shape (N, F) per site, and the N texts they belong to."""
        batch = [a.detach().double().cpu() for a in values]
        digest = chained_digest(self.digest, examples)
        added = replace(
            self,
            count=len(examples),
            means=tuple(a.mean(0) for a in batch),
            squares=tuple(((a - a.mean(0)) ** 2).sum(0) for a in batch),
        )
        return replace(self.merged(added), digest=digest)

    def merged(self, other: NeuronStatistics) -> NeuronStatistics:
        """Unite two shards (Chan's update); digests of shards are combined in order.

        Raises:
            ConfigError: if they are of different models, sites, positions or quantities.
        """
        if _what(self) != _what(other):
            raise ConfigError(
                "statistics of different models, sites, positions or quantities cannot be merged"
            )
        total = max(self.count + other.count, 1)
        share = other.count / total
        means = tuple(a + (b - a) * share for a, b in zip(self.means, other.means, strict=True))
        squares = tuple(
            p + q + (b - a) ** 2 * (self.count * share)
            for p, q, a, b in zip(self.squares, other.squares, self.means, other.means, strict=True)
        )
        digest = hashlib.sha256(f"{self.digest}\0{other.digest}".encode()).hexdigest()[:16]
        return replace(self, count=self.count + other.count, means=means, squares=squares, digest=digest)

    def save(self, path: str | Path) -> Path:
        """Write the statistics as one safetensors file, atomically."""
        tensors = {f"mean_{i}": mean for i, mean in enumerate(self.means)}
        tensors |= {f"squares_{i}": square for i, square in enumerate(self.squares)}
        header = {
            "model_id": self.model_id,
            "count": self.count,
            "positions": self.positions,
            "quantity": self.quantity,
            "digest": self.digest,
            "sites": [[s.path, s.side, s.width, s.start] for s in self.sites],
        }
        return write_tensors(
            path, tensors, format=STATISTICS_FORMAT, version=STATISTICS_VERSION, header=header
        )


def chained_digest(digest: str, examples: Iterable[str]) -> str:
    """Continue a digest with more examples, so that a stream can be recognized without being held."""
    for text in examples:
        digest = hashlib.sha256(f"{digest}\0{text}".encode()).hexdigest()[:16]
    return digest


def load_statistics(path: str | Path) -> NeuronStatistics:
    """Read statistics saved by `NeuronStatistics.save`.

    Raises:
        FileFormatError: if the file is missing, torn, or of another format or version.
    """
    header, tensors = read_tensors(
        path, format=STATISTICS_FORMAT, version=STATISTICS_VERSION, what="neuron statistics"
    )
    try:
        sites = tuple(Site(*fields) for fields in header["sites"])
        return NeuronStatistics(
            model_id=header["model_id"],
            sites=sites,
            count=header["count"],
            means=tuple(tensors[f"mean_{i}"] for i in range(len(sites))),
            squares=tuple(tensors[f"squares_{i}"] for i in range(len(sites))),
            positions=header["positions"],
            quantity=header.get("quantity", "activation"),
            digest=header["digest"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"cannot read neuron statistics from {path} ({error}); collect them again"
        ) from error


def _what(statistics: NeuronStatistics) -> tuple[object, ...]:
    return statistics.model_id, statistics.sites, statistics.positions, statistics.quantity


def streamed(
    empty: NeuronStatistics,
    examples: Iterable[Example],
    measure: Callable[[Sequence[Example]], Sequence[Tensor]],
    *,
    name: Callable[[Example], str],
    unit: str,
    batch_size: int,
    path: str | Path | None,
    progress: ProgressCallback | None,
) -> NeuronStatistics:
    """Accumulate statistics over examples batch by batch, and continue those of a file.

    Args:
        empty: statistics of no examples: model, sites, positions and quantity that are wanted.
        examples: read once, never held together.
        measure: (examples of a batch) -> their quantity, shape (N, F) per site.
        name: what an example is recognized by.
        unit: what examples are called, in messages.
        batch_size: examples per call of `measure`.
        path: file that is written after every batch and continued from if it exists.
        progress: called after each batch.

    Raises:
        DataError: if there are fewer than two examples, or the file was made from others.
        NeuronSetMismatch: if the file was made for another model or quantity.
    """
    total, remaining = empty, iter(examples)
    if path is not None and Path(path).exists():
        total = load_statistics(path)
        if _what(total) != _what(empty):
            theirs, ours = (
                f"{one.quantity} of {one.model_id} at positions {one.positions}" for one in (total, empty)
            )
            raise NeuronSetMismatch(f"{path} was made for {theirs}, expected {ours}; choose a new file")
        if total.digest != chained_digest("", map(name, islice(remaining, total.count))):
            raise DataError(
                f"{path} was made from other {unit}; choose a new file, or pass the same {unit} again"
            )
    while batch := list(islice(remaining, batch_size)):
        total = total.updated(measure(batch), [name(example) for example in batch])
        if path is not None:
            total.save(path)
        if progress is not None:
            progress(Progress("statistics", total.count, 0, unit))
    if total.count < 2:
        raise DataError(
            f"{total.count} {unit} give no standard deviation; pass at least two, better thousands"
        )
    return total


def import_statistics(path: str | Path, sites: Sequence[Site], *, count: int = 50_000) -> NeuronStatistics:
    """Read means and standard deviations from a NumPy archive with `mean_0`, `std_0`, … in the order of the sites.

    Args:
        path: the archive.
        sites: the sites they belong to.
        count: number of examples they were computed on (50,000 captions for the released SD 1.4 file).

    Raises:
        FileFormatError: if the archive cannot be read or lacks an array.
        ShapeMismatch: if the widths are those of another model.
    """
    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as archive:
            stored = {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (OSError, ValueError) as error:
        raise FileFormatError(f"cannot read activation statistics {path} ({error})") from error
    names = [f"{kind}_{i}" for kind in ("mean", "std") for i in range(len(sites))]
    missing = [name for name in names if name not in stored]
    if missing or len(stored) != len(names):
        raise ShapeMismatch(
            f"{path} holds {len(stored) // 2} sites, the model has {len(sites)}; pass the statistics of this model"
        )
    for i, site in enumerate(sites):
        if stored[f"mean_{i}"].shape != (site.width,):
            raise ShapeMismatch(
                f"{path} has {tuple(stored[f'mean_{i}'].shape)} neurons at {site.path}, expected ({site.width},); "
                "pass the statistics of this model"
            )
    means = tuple(stored[f"mean_{i}"].double() for i in range(len(sites)))
    squares = tuple(stored[f"std_{i}"].double() ** 2 * (count - 1) for i in range(len(sites)))
    return NeuronStatistics(model_id="", sites=tuple(sites), count=count, means=means, squares=squares)
