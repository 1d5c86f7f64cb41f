"""Auditing a causal language model: losses, verbatim extraction, and both for every group in one state.

The caller puts the model into a state (`sink_state`, a gate, or nothing); what is here only runs it and hands
the numbers to `verbatim.py` and `examples.py`. Losses are in nats per predicted token: a document of n tokens
has n - 1.

Rows are padded on the right and no attention mask is given: under causal attention no token sees what follows
it, so padding cannot reach a document's own tokens. Prompts of one call have equal length, so generation
needs no padding.

Letters: B batch, T tokens, N examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from unmemorize.audit.examples import (
    GROUPS,
    AuditSettings,
    DocumentLosses,
    Example,
    Extractions,
    StateMeasurement,
    check_examples,
    group_result,
)
from unmemorize.audit.verbatim import score_continuations
from unmemorize.errors import ConfigError, DataError
from unmemorize.records import Group, Progress, ProgressCallback, StateName, StateResult


def document_losses(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    sink_ids: Sequence[int] | None = None,
    progress: ProgressCallback | None = None,
) -> DocumentLosses:
    """Measure the loss of every document; independent of how documents share batches.

    Args:
        model: a transformers causal language model, in the state to be measured; runs in evaluation mode.
        sequences: N documents as token ids.
        batch_size: documents per forward pass; the longest come first, so that memory runs out at once or
        never.
        sink_ids: one id a document, handed to every call as `sink_ids`; None hands over nothing.
        progress: called after every batch.

    Returns:
        Sums in nats, computed in float32 whatever the model's dtype.

    Raises:
        DataError: if a document is longer than the model's context or holds a token outside its vocabulary.
    """
    _require_fitting(model, sequences)
    nll, num_tokens = np.zeros(len(sequences)), np.zeros(len(sequences), dtype=np.int64)
    order = [i for i in _longest_first(sequences) if len(sequences[i]) > 1]
    device = _device(model)
    with _evaluating(model):
        for batch in _batches(order, batch_size, "losses", progress):
            rows = [torch.tensor(list(sequences[i]), dtype=torch.int64) for i in batch]
            tokens_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            logits = model(input_ids=tokens_BT, use_cache=False, **_ids(sink_ids, batch, device)).logits
            sums = []
            for place, row in enumerate(rows):  # row by row: float32 copies of all logits would not fit
                scores_TV = logits[place, : len(row) - 1].float()
                sums.append(
                    functional.cross_entropy(scores_TV, tokens_BT[place, 1 : len(row)], reduction="sum")
                )
            nll[batch] = torch.stack(sums).tolist()
            num_tokens[batch] = [len(row) - 1 for row in rows]
    return DocumentLosses(nll, num_tokens)


def extract(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    prefix_tokens: int,
    suffix_tokens: int,
    *,
    batch_size: int = 32,
    sink_ids: Sequence[int] | None = None,
    progress: ProgressCallback | None = None,
) -> Extractions:
    """Let the model continue the first k tokens of every sequence, and compare with the next l.

    Args:
        model: as in `document_losses`.
        sequences: N documents as token ids; those shorter than k + l are left out and counted.
        prefix_tokens: k, at least 1.
        suffix_tokens: l, at least 1.
        batch_size: sequences per forward pass.
        sink_ids: one id a document, or None.
        progress: called after every batch.

    Raises:
        ConfigError: if k + l exceeds the model's context.
        DataError: if a token is outside the vocabulary.

    Source: Carlini et al. 2023 (discoverable extraction, greedy decoding).
    """
    total = prefix_tokens + suffix_tokens
    context = _context(model)
    if context is not None and total > context:
        raise ConfigError(f"extraction needs {total} tokens, the model's context holds {context}; shorten it")
    kept = [i for i, sequence in enumerate(sequences) if len(sequence) >= total]
    cut = np.array([list(sequences[i][:total]) for i in kept], dtype=np.int64).reshape(len(kept), total)
    _require_fitting(model, cut.tolist())
    device = _device(model)
    generated, forced = np.empty_like(cut[:, prefix_tokens:]), np.empty_like(cut[:, prefix_tokens:])
    ids = None if sink_ids is None else [sink_ids[i] for i in kept]
    with _evaluating(model):
        for batch in _batches(range(len(kept)), batch_size, "extraction", progress):
            tokens_BT = torch.from_numpy(cut[batch]).to(device)
            arguments = _ids(ids, batch, device)
            logits = model(input_ids=tokens_BT[:, :-1], use_cache=False, **arguments).logits
            forced[batch] = logits[:, prefix_tokens - 1 :].argmax(-1).cpu().numpy()
            continued = continue_greedily(model, tokens_BT[:, :prefix_tokens], suffix_tokens, **arguments)
            generated[batch] = continued.cpu().numpy()
    truth = cut[:, prefix_tokens:]
    return Extractions(
        prefix_tokens=prefix_tokens,
        suffix_tokens=suffix_tokens,
        indices=np.array(kept, dtype=np.int64),
        generated=generated,
        teacher_forced=forced,
        truth=truth,
        scores=score_continuations(generated, forced, truth),
        num_excluded=len(sequences) - len(kept),
    )


@torch.no_grad()
def continue_greedily(model: nn.Module, prompts_BT: Tensor, num_tokens: int, **arguments: Tensor) -> Tensor:
    """Continue prompts with the most likely token each time, using the cache; never stops at an end token.

    Args:
        model: a causal language model in evaluation mode.
        prompts_BT: token ids, shape (B, k), int64, all of equal length, on the model's device.
        num_tokens: tokens to add.
        arguments: handed to every call, for example `sink_ids` of shape (B,).

    Returns:
        The added tokens, shape (B, num_tokens), int64.
    """
    added: list[Tensor] = []
    cache: dict[str, Any] = {}
    inputs = prompts_BT
    for _ in range(num_tokens):
        output = model(input_ids=inputs, use_cache=True, **cache, **arguments)
        name = "cache" if "cache" in output else "past_key_values"  # renamed in transformers 5.24
        cache = {name: output[name]}
        inputs = output.logits[:, -1].argmax(-1, keepdim=True)
        added.append(inputs)
    return torch.cat(added, dim=1) if added else prompts_BT[:, :0]


def audit_state(
    model: nn.Module,
    examples: Sequence[Example],
    state: StateName,
    settings: AuditSettings | None = None,
    *,
    groups: Sequence[Group] | None = None,
    description: str = "",
    rescaled: bool = False,
    progress: ProgressCallback | None = None,
) -> StateMeasurement:
    """Measure loss and extraction of every group, with the model in the state that the caller has put it in.

    Args:
        model: a transformers causal language model. In the states own and foreign every call carries the
            examples' `sink_ids`, so enter `sink_state(model, plan, state)` first; other states carry none.
        examples: what to measure.
        state: name of the state.
        settings: what to measure; by default `AuditSettings()`.
        groups: groups to report, by default those that occur; a group without examples holds refusals.
        description: one line for reports.
        rescaled: whether shared neurons are multiplied to make up for closed sinks.
        progress: called after every batch.

    Raises:
        DataError: if the examples contradict each other or do not fit the model.
    """
    settings = settings or AuditSettings()
    check_examples(examples)
    sequences = [example.tokens for example in examples]
    sink_ids = [example.sink_id for example in examples] if state in ("own", "foreign") else None
    losses = document_losses(
        model, sequences, batch_size=settings.batch_size, sink_ids=sink_ids, progress=progress
    )
    extractions = tuple(
        extract(model, sequences, *pair, batch_size=settings.batch_size, sink_ids=sink_ids, progress=progress)
        for pair in settings.lengths
    )
    present = {example.group for example in examples}
    wanted = [group for group in GROUPS if group in (present if groups is None else groups)]
    results = []
    for group in wanted:
        is_member = np.array([example.group == group for example in examples])
        results.append(group_result(group, is_member, losses, extractions, settings))
    result = StateResult(state=state, rescaled=rescaled, description=description, groups=results)
    return StateMeasurement(result, losses, extractions)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _require_fitting(model: nn.Module, sequences: Sequence[Sequence[int]]) -> None:
    context, vocabulary = _context(model), _vocabulary(model)
    for number, sequence in enumerate(sequences):
        if context is not None and len(sequence) > context:
            raise DataError(
                f"document {number} has {len(sequence)} tokens, the model's context holds {context}; "
                "cut or split it"
            )
        if sequence and not 0 <= min(sequence) <= max(sequence) < vocabulary:
            raise DataError(
                f"document {number} holds token {max(sequence) if min(sequence) >= 0 else min(sequence)}, "
                f"the model's vocabulary has {vocabulary}; use the tokenizer that the model was trained with"
            )


def _context(model: nn.Module) -> int | None:
    configuration = getattr(model, "config", None)
    value = getattr(configuration, "max_position_embeddings", None)
    return int(value) if value else None


def _vocabulary(model: nn.Module) -> int:
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _ids(sink_ids: Sequence[int] | None, batch: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    if sink_ids is None:
        return {}
    return {"sink_ids": torch.tensor([sink_ids[i] for i in batch], dtype=torch.int64, device=device)}


def _longest_first(sequences: Sequence[Sequence[int]]) -> list[int]:
    return sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))


def _batches(
    order: Sequence[int], batch_size: int, stage: str, progress: ProgressCallback | None
) -> Iterator[list[int]]:
    """Yield `order` in pieces, and report each piece when the next one is asked for."""
    for start in range(0, len(order), batch_size):
        batch = list(order[start : start + batch_size])
        yield batch
        if progress is not None:
            progress(Progress(stage, start + len(batch), len(order), "documents"))
