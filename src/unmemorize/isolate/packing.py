"""Rows of tokens for training: padded or packed, with an id, a position and a label for every token.

A packed row holds several documents whose positions restart. From restarting positions transformers makes
block-diagonal causal attention by itself, but only if a forward has neither an attention mask nor a cache, and the
cache is on by default; OPT does not look at positions at all. `attention_arguments` gives what a model needs.

A document's first token has no label, because no token of its own predicts it. Padding has token 0, id 0 (pool off),
position 0 and no label.

Source: goldfish labels, Hans et al. 2024, arXiv 2406.10209; the hash is ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError, DataError, IdError, ModelNotSupported
from unmemorize.ids import ID_MAX

IGNORED = -100

Pair = tuple[Sequence[int], int]
Row = Sequence[Pair]
Long = Literal["cut", "split", "error"]

_OPEN_ROWS = 16
_BLIND_TO_POSITIONS = frozenset({"opt"})
"""Model types that take positions, but make no attention mask from them (transformers 5.0 to 5.23)."""


def pack(documents: Sequence[Pair], length_tokens: int, *, long: Long = "cut") -> list[list[Pair]]:
    """Fill rows with whole documents, in order: the first open row that has room gets the next document.

    Args:
        documents: (token ids, sink id) pairs.
        length_tokens: tokens per row.
        long: what happens to a document longer than a row: its end is cut off; it is split into pieces that keep
            the id and see nothing of each other; or an error.

    Returns:
        Rows of documents. Of all open rows only the latest sixteen are tried, so that the order stays close to the
        given one.

    Raises:
        DataError: if a document has no tokens, or is longer than a row and `long` is "error".
    """
    return pack_numbered(documents, length_tokens, long=long)[0]


def pack_numbered(
    documents: Sequence[Pair], length_tokens: int, *, long: Long = "cut"
) -> tuple[list[list[Pair]], list[list[int]]]:
    """Do what `pack` does, and also say which document each one in a row is, or is a piece of.

    Returns:
        Rows as from `pack`, and in the same layout the places of the documents in the argument, from 0.
    """
    rows: list[list[Pair]] = []
    numbers: list[list[int]] = []
    room: list[int] = []
    for number, (tokens, identity) in _fitted(documents, length_tokens, long):
        first = max(0, len(rows) - _OPEN_ROWS)
        place = next((i for i in range(first, len(rows)) if room[i] >= len(tokens)), None)
        if place is None:
            rows.append([])
            numbers.append([])
            room.append(length_tokens)
            place = len(rows) - 1
        rows[place].append((tokens, identity))
        numbers[place].append(number)
        room[place] -= len(tokens)
    return rows, numbers


def _fitted(documents: Sequence[Pair], length_tokens: int, long: Long) -> list[tuple[int, Pair]]:
    """Make every document fit into a row; every piece comes with the number of its document."""
    if length_tokens < 2:
        raise ConfigError(f"length_tokens is {length_tokens}, expected 2 or more")
    if long not in get_args(Long):
        raise ConfigError(f"long is {long!r}, expected one of {', '.join(get_args(Long))}")
    fitted: list[tuple[int, Pair]] = []
    for number, (tokens, identity) in enumerate(documents):
        if len(tokens) == 0:
            raise DataError(f"document {number} has no tokens; drop it")
        if len(tokens) > length_tokens and long == "error":
            raise DataError(
                f"document {number} has {len(tokens)} tokens, a row holds {length_tokens}; cut or split it, or use "
                "longer rows"
            )
        stop = length_tokens if long == "cut" else len(tokens)
        starts = range(0, min(stop, len(tokens)), length_tokens)
        fitted += [(number, (tokens[start : start + length_tokens], identity)) for start in starts]
    return fitted


def to_batch(rows: Sequence[Sequence[Pair]], length_tokens: int | None = None) -> dict[str, Tensor]:
    """Turn rows of documents into a batch.

    Args:
        rows: B rows of (token ids, sink id) documents.
        length_tokens: T; by default the longest row.

    Returns:
        input_ids, labels, position_ids and sink_ids, each of shape (B, T), int64.

    Raises:
        DataError: if there are no rows, or one is longer than `length_tokens`.
        IdError: if an id is not in 0 .. 2**63 - 1.
    """
    if not rows:
        raise DataError("a batch needs at least one row; got none")
    longest = max(sum(len(tokens) for tokens, _ in row) for row in rows)
    length = longest if length_tokens is None else length_tokens
    if longest > length:
        raise DataError(f"a row has {longest} tokens, the batch holds {length}; use longer rows")
    shape = (len(rows), length)
    inputs, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    owners, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for number, row in enumerate(rows):
        start = 0
        for tokens, identity in row:
            if not 0 <= identity <= ID_MAX:
                raise IdError(
                    f"sink id {identity} is not in 0 .. 2**63 - 1; make ids with content_id or source_id"
                )
            span = slice(start, start + len(tokens))
            inputs[number, span] = labels[number, span] = torch.as_tensor(tokens, dtype=torch.int64)
            labels[number, start] = IGNORED
            positions[number, span] = torch.arange(len(tokens))
            owners[number, span] = identity
            start += len(tokens)
    return {"input_ids": inputs, "labels": labels, "position_ids": positions, "sink_ids": owners}


def spread(rows: Sequence[Row], flags: Sequence[Sequence[bool]]) -> Tensor:
    """Give every token of a batch the flag of its document.

    Args:
        rows: B rows of documents, as `to_batch` takes them.
        flags: one for each document, in the same layout.

    Returns:
        Shape (B, T), bool, T as `to_batch` makes it by default; False at padding.
    """
    lines = [
        torch.tensor(line, dtype=torch.bool).repeat_interleave(
            torch.tensor([len(tokens) for tokens, _ in row], dtype=torch.int64)
        )
        for row, line in zip(rows, flags, strict=True)
    ]
    return nn.utils.rnn.pad_sequence(lines, batch_first=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkCollator:
    """Data collator for `transformers.Trainer` and plain loops: features with a sink id become a batch.

    Features are mappings with `input_ids` (token ids) and `sink_id` (an id, 0 for none). With `Trainer`, set
    `remove_unused_columns=False`, or it drops the ids. The batch is that of `to_batch`; packed ones also hold
    `use_cache=False`, without which documents would see each other, and the mask if asked for.

    Attributes:
        length_tokens: T of every batch; by default the longest row.
        is_packed: whether several documents may share a row; else each has its own.
        has_mask: whether packed batches hold an explicit mask, for models that `attention_arguments` gives one (OPT).
        long: what happens to documents longer than `length_tokens`; see `pack`.
    """

    length_tokens: int | None = None
    is_packed: bool = False
    has_mask: bool = False
    long: Long = "cut"

    def __post_init__(self) -> None:
        if self.is_packed and self.length_tokens is None:
            raise ConfigError("packed rows need length_tokens")
        if self.has_mask and not self.is_packed:
            raise ConfigError("has_mask is for packed rows; documents in rows of their own need no mask")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate; raises DataError if a feature has no sink id."""
        documents: list[Pair] = []
        for feature in features:
            if "sink_id" not in feature:
                raise DataError(
                    f"a feature has no sink_id, only {sorted(feature)}; with Trainer set remove_unused_columns=False"
                )
            documents.append((feature["input_ids"], int(feature["sink_id"])))
        if self.length_tokens is None:
            return dict(to_batch([[document] for document in documents]))
        if not self.is_packed:
            fitted = _fitted(documents, self.length_tokens, self.long)
            return dict(to_batch([[document] for _, document in fitted], self.length_tokens))
        batch: dict[str, Any] = dict(
            to_batch(pack(documents, self.length_tokens, long=self.long), self.length_tokens)
        )
        mask = {"attention_mask": block_diagonal_mask(batch["position_ids"])} if self.has_mask else {}
        return batch | mask | {"use_cache": False}


def block_diagonal_mask(position_ids: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make an additive causal mask in which no document sees another.

    Documents begin where positions are 0. The mask replaces the model's own, so that sliding windows end: use it only
    where documents are shorter than the window, or the model has none. Not for flash attention.

    Args:
        position_ids: shape (B, T), int64, as made by `to_batch`.
        dtype: that of the model's attention.

    Returns:
        Shape (B, 1, T, T), 0 where a token (third axis) may see another (fourth), else the dtype's lowest number.
    """
    document_BT = (position_ids == 0).cumsum(1)
    is_same = document_BT[:, :, None] == document_BT[:, None, :]
    is_hidden = (~is_same.tril())[:, None]
    mask = torch.zeros(is_hidden.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill_(is_hidden, torch.finfo(dtype).min)


def attention_arguments(model: nn.Module | Callable[..., Any], position_ids: Tensor) -> dict[str, Any]:
    """Return what a forward on packed rows needs beside tokens and positions, so that no document sees another.

    Args:
        model: a causal language model of transformers, wrapped or not.
        position_ids: shape (B, T), int64, as made by `to_batch`.

    Returns:
        `use_cache=False`, and an `attention_mask` for models that do not look at positions.

    Raises:
        ModelNotSupported: if the model takes no positions.
    """
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise ModelNotSupported(
            f"{type(inner).__name__} takes no position_ids, so documents in one row would see each other; train with "
            "one document a row"
        )
    if getattr(getattr(inner, "config", None), "model_type", "") not in _BLIND_TO_POSITIONS:
        return {"use_cache": False}
    return {"use_cache": False, "attention_mask": block_diagonal_mask(position_ids, dtype=inner.dtype)}


def goldfish_labels(labels: Tensor, drop_every: int, *, context_tokens: int = 4) -> Tensor:
    """Drop about one label in `drop_every`, always the same ones after the same tokens.

    Whether a label is dropped depends on a hash of the `context_tokens` labels before it, so every repetition of a
    passage hides the same tokens from the loss and the model never sees all of it.

    Args:
        labels: shape (B, T), int64, -100 where there is none.
        drop_every: k; at least 2.
        context_tokens: h; labels with fewer labels before them in their document are kept.

    Returns:
        Labels, shape (B, T), int64; the argument is left as it was.

    Source: Hans et al. 2024, section 3.1. Stateless: no table and no random generator, the same on every device; ours
    hashes the tokens before the label in order, the release multiplies those up to and including it.
    """
    if drop_every < 2 or context_tokens < 1:
        raise ConfigError(
            f"goldfish drops 1 of {drop_every} after {context_tokens} tokens; expected 2 and 1 or more"
        )
    if labels.shape[1] <= context_tokens:
        return labels.clone()
    window = labels.unfold(1, context_tokens, 1)[:, :-1]
    state = torch.zeros(window.shape[:2], dtype=torch.int64, device=labels.device)
    for place in range(context_tokens):
        state = (state + window[..., place]) * -0x61C8864680B583EB
        state = state ^ ((state >> 29) & 0x7FFFFFFFF)
    is_known = (window != IGNORED).all(-1)
    is_dropped = torch.zeros_like(labels, dtype=torch.bool)
    is_dropped[:, context_tokens:] = is_known & ((state & ID_MAX) % drop_every == 0)
    return labels.masked_fill(is_dropped, IGNORED)
