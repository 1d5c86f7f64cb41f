"""Second moments of what the text contributes, over ordinary captions: which directions an edit must leave alone.

    C = mean over ordinary tokens of x x^T,        m_t = mean over captions of the state at position t

x is the text state that a value projection reads. A change of the weights by D changes ordinary values by D x, on
average by tr(D C D^T): the moments are all that has to be known about a corpus. They are sums, so that captions can be
streamed, a file can be continued, and shards can be added. float64 throughout.

This file knows no model. Source: the preserved second moment is that of closed-form model editing (ROME, MEMIT,
unified concept editing); position means are ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, FileFormatError, ShapeMismatch
from unmemorize.localize.neuron_statistics import chained_digest
from unmemorize.tensor_files import read_tensors, write_tensors

MOMENTS_FORMAT = "unmemorize.moments"
MOMENTS_VERSION = 1

_TENSORS = ("products", "sums", "counts")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondMoments:
    """Sums over the text states of ordinary captions.

    Attributes:
        text_id: fingerprint of everything between a prompt and the value projections.
        num_captions: number of captions.
        products: sum over attended tokens of x x^T, shape (D, D), float64, in squared units of the state.
        sums: sum over captions of the state at each position, shape (T, D), float64.
        counts: captions that attend to each position, shape (T,), float64.
        digest: digest of the captions in order.
    """

    text_id: str
    num_captions: int
    products: Tensor
    sums: Tensor
    counts: Tensor
    digest: str = ""

    @classmethod
    def empty(cls, text_id: str) -> SecondMoments:
        """Return moments of no captions."""
        none = torch.zeros((0, 0), dtype=torch.float64)
        return cls(text_id=text_id, num_captions=0, products=none, sums=none, counts=none.sum(1))

    @property
    def num_tokens(self) -> int:
        """Number of attended tokens."""
        return int(self.counts.sum())

    @property
    def mean_product(self) -> Tensor:
        """C, shape (D, D), float64: mean over tokens of x x^T."""
        return self.products / max(self.num_tokens, 1)

    @property
    def position_means(self) -> Tensor:
        """Mean state at each position, shape (T, D), float64; that of all tokens where a position was never used."""
        everywhere = self.sums.sum(0) / max(self.num_tokens, 1)
        means = self.sums / self.counts.clamp(min=1)[:, None]
        return torch.where(self.counts[:, None] > 0, means, everywhere)

    def updated(self, states: Tensor, attended: Tensor, captions: Sequence[str]) -> SecondMoments:
        """Add captions.

        Args:
            states: text states, shape (N, T, D).
            attended: positions that the denoiser attends to, shape (N, T), bool.
            captions: the N texts.

        Raises:
            ShapeMismatch: if T or D differ from those of earlier captions.
        """
        states = states.detach().double().cpu() * attended.cpu().unsqueeze(-1)
        flat = states.flatten(0, 1)
        added = replace(
            self,
            num_captions=len(captions),
            products=flat.T @ flat,
            sums=states.sum(0),
            counts=attended.cpu().double().sum(0),
        )
        return replace(self.merged(added), digest=chained_digest(self.digest, captions))

    def merged(self, other: SecondMoments) -> SecondMoments:
        """Add two shards; their digests are combined in order.

        Raises:
            ConfigError: if they are of different text encoders.
            ShapeMismatch: if lengths or widths differ.
        """
        if self.text_id != other.text_id:
            raise ConfigError(
                "second moments of different text encoders cannot be merged; collect them on one model"
            )
        digest = hashlib.sha256(f"{self.digest}\0{other.digest}".encode()).hexdigest()[:16]
        if self.num_captions == 0:
            return replace(other, digest=digest)
        if self.sums.shape != other.sums.shape:
            raise ShapeMismatch(
                f"text states of shapes {tuple(self.sums.shape)} and {tuple(other.sums.shape)} cannot be added; "
                "encode all captions to one length"
            )
        return replace(
            self,
            num_captions=self.num_captions + other.num_captions,
            products=self.products + other.products,
            sums=self.sums + other.sums,
            counts=self.counts + other.counts,
            digest=digest,
        )

    def save(self, path: str | Path) -> Path:
        """Write the moments as one safetensors file (format `unmemorize.moments`), atomically."""
        return write_tensors(
            path,
            {name: getattr(self, name) for name in _TENSORS},
            format=MOMENTS_FORMAT,
            version=MOMENTS_VERSION,
            header={"text_id": self.text_id, "num_captions": self.num_captions, "digest": self.digest},
        )


def load_second_moments(path: str | Path) -> SecondMoments:
    """Read moments saved by `SecondMoments.save`.

    Raises:
        FileFormatError: if the file is missing, torn, or of another format or version.
    """
    header, tensors = read_tensors(
        path, format=MOMENTS_FORMAT, version=MOMENTS_VERSION, what="second moments"
    )
    try:
        return SecondMoments(
            text_id=header["text_id"],
            num_captions=header["num_captions"],
            digest=header["digest"],
            **{name: tensors[name] for name in _TENSORS},
        )
    except KeyError as error:
        raise FileFormatError(f"{path} lacks {error}; make it again") from error
