"""Activations of text-to-image models at their sites, and statistics of them over ordinary captions.

Values of cross-attention depend on the text alone: a whole corpus needs the text encoder and one matrix product per
site, and no denoiser pass. Sites that see the picture too are captured in one pass per caption.

Source: Hintersdorf et al. 2024, released code (mean absolute value over all positions); positions by kind are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from unmemorize.errors import ConfigError
from unmemorize.gates import capture
from unmemorize.localize.neuron_statistics import NeuronStatistics, streamed
from unmemorize.localize.scores import mean_absolute
from unmemorize.models.denoising import Pipeline, denoiser_of, record
from unmemorize.models.diffusion import DenoiserRow, find_sites, fingerprint, row_for, text_values
from unmemorize.neurons import Site
from unmemorize.records import ProgressCallback

Positions = Literal["all", "start", "words", "end", "padding", "tail"]


@torch.no_grad()
def activations_of(
    pipe: Pipeline,
    prompts: Sequence[str],
    sites: Sequence[Site],
    positions: str = "all",
    *,
    row: DenoiserRow | None = None,
) -> list[tuple[Tensor, ...]]:
    """Return each prompt's mean absolute activations, one tensor of shape (F,) per site, float32.

    Cross-attention values need no denoiser pass. Other sites depend on the picture too: they are captured in one pass
    per prompt, at the second step of 50, on the latents of seed 1.

    Args:
        pipe: the pipeline.
        prompts: N prompts.
        sites: the sites.
        positions: token positions that are averaged: "all", "start", "words", "end", "padding" or "tail" (the last
            two).
        row: site table row, for a denoiser that the table does not know.

    Raises:
        ConfigError: if positions are named for sites whose tokens are not the prompt's.
    """
    if (row or row_for(pipe)).has_joint_values or sites[0].side == "in":
        if positions != "all":
            raise ConfigError(f"positions {positions!r} need cross-attention values; use positions='all'")
        found: list[tuple[Tensor, ...]] = []
        for prompt in prompts:
            call = record(pipe, prompt, seeds=(1,))
            with capture(denoiser_of(pipe), sites) as seen:
                call.predict([0], step_idx=1)
            found.append(tuple(mean_absolute(seen[site][0].flatten(1, -2))[0].cpu() for site in sites))
        return found
    values = text_values(pipe, prompts, sites, row)
    chosen = None if positions == "all" else token_positions(pipe, prompts, positions)
    means = [mean_absolute(values[site], chosen).cpu() for site in sites]
    return [tuple(mean[i] for mean in means) for i in range(len(prompts))]


def token_positions(pipe: Pipeline, prompts: Sequence[str], positions: str) -> Tensor:
    """Mark token positions of one kind, shape (N, T), bool.

    Kinds: "start" token, "words", the first "end" token, the "padding" after it, and "tail", which is end and padding.

    Raises:
        ConfigError: if the kind is unknown.
    """
    tokenizer = pipe.tokenizer
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    place = torch.arange(tokens.shape[1]).expand_as(tokens)
    end = (tokens == tokenizer.eos_token_id).int().argmax(1, keepdim=True)
    has_start = tokenizer.bos_token_id is not None and bool((tokens[:, 0] == tokenizer.bos_token_id).all())
    kinds: dict[str, Tensor] = {
        "start": (place == 0) & has_start,
        "words": (place < end) & (place >= int(has_start)),
        "end": place == end,
        "padding": place > end,
        "tail": place >= end,
    }
    if positions not in kinds:
        raise ConfigError(f"unknown positions {positions!r}; expected all, {', '.join(kinds)}")
    return kinds[positions]


def collect_statistics(
    pipe: Pipeline,
    captions: Iterable[str],
    sites: Sequence[Site] | None = None,
    *,
    positions: Positions = "all",
    batch_size: int = 64,
    path: str | Path | None = None,
    row: DenoiserRow | None = None,
    progress: ProgressCallback | None = None,
) -> NeuronStatistics:
    """Compute activation statistics of ordinary captions, streamed.

    Args:
        pipe: the pipeline.
        captions: captions; read once, never held together.
        sites: by default the row's default value sites.
        positions: token positions that are averaged.
        batch_size: captions per batch.
        path: file that is written after every batch and continued from if it exists.
        row: site table row, for a denoiser that the table does not know.
        progress: called after each batch.

    Raises:
        DataError: if there are fewer than two captions, or the file was made from others.
        NeuronSetMismatch: if the file was made for another model.
    """
    sites = tuple(sites or find_sites(pipe, row=row))

    def measure(batch: Sequence[str]) -> list[Tensor]:
        found = activations_of(pipe, batch, sites, positions, row=row)
        return [torch.stack([one[i] for one in found]) for i in range(len(sites))]

    return streamed(
        NeuronStatistics.empty(fingerprint(pipe, row), sites, positions),
        captions,
        measure,
        name=str,
        unit="captions",
        batch_size=batch_size,
        path=path,
        progress=progress,
    )
