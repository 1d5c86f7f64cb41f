"""Text states of text-to-image models, and their second moments over ordinary captions.

All cross-attention layers read the same text states, so one set of second moments serves every layer, and no denoiser
pass is made: a corpus of captions costs the text encoder and one matrix product. Where a denoiser attends to some
positions only (PixArt), the others do not count.

Models with joint attention are refused: their text states depend on latent and timestep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from unmemorize.errors import DataError, ModelNotSupported, NeuronSetMismatch
from unmemorize.gates import module_at
from unmemorize.localize.activations import token_positions
from unmemorize.localize.neuron_statistics import chained_digest
from unmemorize.models.base import fingerprint_of
from unmemorize.models.denoising import Pipeline, conditions, denoiser_of
from unmemorize.models.diffusion import DenoiserRow, row_for
from unmemorize.records import Progress, ProgressCallback
from unmemorize.remove.moments import SecondMoments, load_second_moments


def text_fingerprint(pipe: Pipeline, row: DenoiserRow | None = None) -> str:
    """Name everything between a prompt and the value projections: text encoders, and the row's text projection."""
    row = row or row_for(pipe)
    parts = [(name, part) for name, part in pipe.components.items() if name.startswith("text_encoder")]
    if row.text_projection:
        parts.append((row.text_projection, module_at(denoiser_of(pipe), row.text_projection)))
    names = [fingerprint_of(f"{name}-*", part) for name, part in parts if isinstance(part, nn.Module)]
    return f"text/{hashlib.sha256(';'.join(names).encode()).hexdigest()[:16]}"


@torch.no_grad()
def text_states(
    pipe: Pipeline, prompts: Sequence[str], row: DenoiserRow | None = None
) -> tuple[Tensor, Tensor]:
    """Return what the value projections read for N prompts, and which positions the denoiser attends to.

    Returns:
        States of shape (N, T, D) in the model's dtype, and attended positions of shape (N, T), bool.

    Raises:
        ModelNotSupported: if the denoiser has joint attention.
    """
    row = row or row_for(pipe)
    if row.has_joint_values:
        raise ModelNotSupported(
            f"text states of {type(denoiser_of(pipe)).__name__} depend on the picture too, so that a closed-form edit "
            "has no fixed inputs; use fold"
        )
    arguments = conditions(pipe, prompts)
    states: Tensor = arguments["encoder_hidden_states"]
    mask = arguments.get("encoder_attention_mask")
    attended = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
    if row.text_projection:
        states = module_at(denoiser_of(pipe), row.text_projection)(states)
    return states, attended


def collect_second_moments(
    pipe: Pipeline,
    captions: Iterable[str],
    *,
    batch_size: int = 64,
    path: str | Path | None = None,
    row: DenoiserRow | None = None,
    progress: ProgressCallback | None = None,
) -> SecondMoments:
    """Compute second moments of ordinary captions, streamed. Leave the memorized prompts out of the captions.

    Args:
        pipe: the pipeline; it encodes (and cuts off) the captions itself.
        captions: captions; read once, never held together.
        batch_size: captions per batch.
        path: file that is written after every batch and continued from if it exists.
        row: site table row, for a denoiser that the table does not know.
        progress: called after each batch.

    Raises:
        DataError: if there are no captions, or the file was made from others.
        ModelNotSupported: if the denoiser has joint attention.
        NeuronSetMismatch: if the file was made for another text encoder.
    """
    text_id = text_fingerprint(pipe, row)
    total = SecondMoments.empty(text_id)
    remaining = iter(captions)
    if path is not None and Path(path).exists():
        total = load_second_moments(path)
        require_text(total, text_id)
        if total.digest != chained_digest("", islice(remaining, total.num_captions)):
            raise DataError(
                f"{path} was made from other captions; choose a new file, or pass the same captions again"
            )
    while batch := list(islice(remaining, batch_size)):
        states, attended = text_states(pipe, batch, row)
        total = total.updated(states, attended, batch)
        if path is not None:
            total.save(path)
        if progress is not None:
            progress(Progress("moments", total.num_captions, 0, "captions"))
    if total.num_captions == 0:
        raise DataError(
            "no captions, so nothing would be preserved; pass ordinary captions, better thousands"
        )
    return total


def marked_positions(pipe: Pipeline, prompts: Sequence[str], positions: Sequence[str], length: int) -> Tensor:
    """Mark positions of several kinds, shape (N, length); states beyond the tokenizer's length count as padding."""
    marks = []
    for kind in positions:
        found = token_positions(pipe, prompts, kind)[:, :length]
        beyond = torch.full((len(prompts), length - found.shape[1]), kind == "padding")
        marks.append(torch.cat([found, beyond], dim=1))
    return torch.stack(marks).any(0)


def require_text(ordinary: SecondMoments, text_id: str) -> None:
    """Raise `NeuronSetMismatch` unless second moments were collected on a text side."""
    if ordinary.text_id != text_id:
        raise NeuronSetMismatch(
            f"the second moments were collected on {ordinary.text_id}, this model's text side is {text_id}; "
            "collect them on this model"
        )
