"""Rows of tokens for training: padded or packed, with an id, a position and a label for every token.

A packed row holds several documents. Positions restart at each, from which transformers builds block-diagonal causal
attention by itself, as long as no attention mask is given; so batches here never hold one. A document's first token
has no label, because no token of its own predicts it. Padding has id 0 (pool off), position 0 and no label.

Source: goldfish labels, Hans et al. 2024, arXiv 2406.10209, hash-table variant; the hash is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, DataError

IGNORED = -100

Pair = tuple[Sequence[int], int]


def pack(documents: Sequence[Pair], length_tokens: int) -> list[list[Pair]]:
    """Fill rows with whole documents, in order: the first open row that has room gets the next document.

    Args:
        documents: (token ids, sink id) pairs.
        length_tokens: tokens per row.

    Returns:
        Rows of documents. Of all open rows only the latest sixteen are tried, so that the order stays close to the
        given one.

    Raises:
        DataError: if a document is longer than a row.
    """
    rows: list[list[Pair]] = []
    room: list[int] = []
    for number, (tokens, identity) in enumerate(documents):
        if len(tokens) > length_tokens:
            raise DataError(
                f"document {number} has {len(tokens)} tokens, a row holds {length_tokens}; cut it or use longer rows"
            )
        first = max(0, len(rows) - 16)
        place = next((i for i in range(first, len(rows)) if room[i] >= len(tokens)), None)
        if place is None:
            rows.append([])
            room.append(length_tokens)
            place = len(rows) - 1
        rows[place].append((tokens, identity))
        room[place] -= len(tokens)
    return rows


def to_batch(rows: Sequence[Sequence[Pair]], length_tokens: int | None = None) -> dict[str, Tensor]:
    """Turn rows of documents into a batch.

    Args:
        rows: B rows of (token ids, sink id) documents.
        length_tokens: T; by default the longest row.

    Returns:
        input_ids, labels, position_ids and sink_ids, each of shape (B, T), int64.
    """
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
            span = slice(start, start + len(tokens))
            inputs[number, span] = labels[number, span] = torch.tensor(tokens, dtype=torch.int64)
            labels[number, start] = IGNORED
            positions[number, span] = torch.arange(len(tokens))
            owners[number, span] = identity
            start += len(tokens)
    return {"input_ids": inputs, "labels": labels, "position_ids": positions, "sink_ids": owners}


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkCollator:
    """Data collator for `transformers.Trainer` and plain loops: features with a sink id become a batch.

    Features are mappings with `input_ids` (token ids) and `sink_id` (an id, 0 for none). With `Trainer`, set
    `remove_unused_columns=False`, or it drops the ids.

    Attributes:
        length_tokens: T of every batch; by default the longest row.
        is_packed: whether several documents may share a row; else each has its own.
    """

    length_tokens: int | None = None
    is_packed: bool = False

    def __post_init__(self) -> None:
        if self.is_packed and self.length_tokens is None:
            raise ConfigError("packed rows need length_tokens")

    def __call__(self, features: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """Collate; see `to_batch` for what comes back."""
        documents: list[Pair] = []
        for feature in features:
            if "sink_id" not in feature:
                raise DataError(
                    f"a feature has no sink_id, only {sorted(feature)}; with Trainer set remove_unused_columns=False"
                )
            documents.append((feature["input_ids"], int(feature["sink_id"])))  # type: ignore[arg-type,call-overload]
        if self.is_packed and self.length_tokens is not None:
            return to_batch(pack(documents, self.length_tokens), self.length_tokens)
        return to_batch([[document] for document in documents], self.length_tokens)


def goldfish_labels(labels: Tensor, drop_every: int, *, context_tokens: int = 4) -> Tensor:
    """Drop about one label in `drop_every`, always the same ones after the same tokens.

    Whether a label is dropped depends on a hash of the `context_tokens` tokens before it, so every repetition of a
    passage hides the same tokens from the loss and the model never sees all of it.

    Args:
        labels: shape (B, T), int64, -100 where there is none.
        drop_every: k; at least 2.
        context_tokens: h; labels with fewer labels before them in their document are kept.

    Returns:
        Labels, shape (B, T), int64.

    Source: Hans et al. 2024, section 3.1. Stateless: no table and no random generator; ours hashes the tokens in
    order, the release multiplies them.
    """
    if drop_every < 2 or context_tokens < 1:
        raise ConfigError(
            f"goldfish drops 1 of {drop_every} after {context_tokens} tokens; expected 2 and 1 or more"
        )
    window = labels.unfold(1, context_tokens, 1)[:, :-1]
    state = torch.zeros(window.shape[:2], dtype=torch.int64, device=labels.device)
    for place in range(context_tokens):
        state = (state + window[..., place]) * -0x61C8864680B583EB
        state = state ^ ((state >> 29) & 0x7FFFFFFFF)
    is_known = (window != IGNORED).all(-1)
    is_dropped = torch.zeros_like(labels, dtype=torch.bool)
    is_dropped[:, context_tokens:] = is_known & ((state & (2**63 - 1)) % drop_every == 0)
    return labels.masked_fill(is_dropped, IGNORED)
