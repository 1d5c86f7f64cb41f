"""Rivals: what others do at generation time against a memorized prompt, and the placebo, in one shape.

A rival is a context that is open while pictures are made, and the call's arguments for a prompt:

    with mitigation.context():
        pipe(**mitigation.arguments(prompt), num_images_per_prompt=..., generator=...)

Neurons are switched off by the context; embeddings are handed over by the arguments, and nothing of the pipeline is
replaced. None of them changes weights, and each works only as long as whoever runs the model uses it.

Sources: padding: "CLIP padding" (arXiv 2605.02908); random tokens: Somepalli et al. 2023; adjusted embedding: Wen et
al. 2024 (arXiv 2407.21720), written from its description. The neurons of a placebo and the first layer: Hintersdorf et
al. 2024 use both as controls.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmemorize.errors import ConfigError
from unmemorize.models.denoising import Pipeline
from unmemorize.models.diffusion import DenoiserRow, find_sites, fingerprint, require_same_model
from unmemorize.models.prompts import (
    PromptEmbedding,
    embedded,
    end_position,
    require_embeddings,
    tokenizers_of,
    tokens_of,
)
from unmemorize.neurons import NeuronSet
from unmemorize.remove.adjustment import AdjustmentSettings, adjust
from unmemorize.remove.diffusion import deactivated


def _prompt_alone(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mitigation:
    """One way of making pictures.

    Attributes:
        name: short name, for files and tables.
        description: what is done, in one sentence.
        context: opens the block in which pictures are made; by default nothing.
        arguments: prompt -> arguments of the pipeline's call for one row; by default the prompt itself.
        num_neurons: neurons that are switched off.
    """

    name: str
    description: str
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    arguments: Callable[[str], dict[str, Any]] = _prompt_alone
    num_neurons: int = 0

    @property
    def changes_prompt(self) -> bool:
        """Whether the arguments are anything but the prompt itself."""
        return self.arguments is not _prompt_alone


def switched_off(
    pipe: Pipeline,
    neurons: NeuronSet,
    *,
    name: str = "neurons off",
    description: str = "The neurons found are switched off.",
    row: DenoiserRow | None = None,
) -> Mitigation:
    """Switch neurons off while pictures are made.

    Raises:
        NeuronSetMismatch: if the set was made for another model.
    """
    require_same_model(neurons, pipe, row)
    return Mitigation(
        name=name,
        description=description,
        context=lambda: deactivated(pipe, neurons, row=row),
        num_neurons=len(neurons),
    )


def placebo(
    pipe: Pipeline, neurons: NeuronSet, *, seed: int = 0, row: DenoiserRow | None = None
) -> Mitigation:
    """Switch off as many random neurons at each site: what an effect has to be compared with.

    They are drawn among the other neurons, or, where a site has too few of these, among all of them.

    Raises:
        NeuronSetMismatch: if the set was made for another model.
    """
    is_narrow = any(2 * len(chosen) > site.width for site, chosen in neurons.indices.items())
    nothing = NeuronSet(neurons.model_id, {})
    drawn = neurons.placebo(seed=seed, outside=nothing if is_narrow else neurons)
    among = "drawn among all of them" if is_narrow else "none of them is in the set"
    text = f"As many random neurons per layer are switched off (seed {seed}); {among}."
    return switched_off(pipe, drawn, name="placebo", description=text, row=row)


def first_value_layer(pipe: Pipeline, *, row: DenoiserRow | None = None) -> Mitigation:
    """Switch off every value neuron of the first layer, the bluntest localized removal."""
    site = find_sites(pipe, row=row)[0]
    everything = NeuronSet(fingerprint(pipe, row), {site: tuple(range(site.width))})
    text = f"All {site.width} value neurons of the first layer are switched off."
    return switched_off(pipe, everything, name="first value layer off", description=text, row=row)


def swapped_padding(pipe: Pipeline, *, token: str = "!", is_end_zeroed: bool = False) -> Mitigation:
    """Pad prompts with another token, so that the padding carries no copies of the end state.

    Args:
        pipe: a Stable Diffusion 1, 2 or XL pipeline.
        token: entry of the vocabulary to pad with.
        is_end_zeroed: whether the end token's state is set to 0 as well.

    Raises:
        ConfigError: if the vocabulary has no such ordinary token.
        ModelNotSupported: if the pipeline takes no embeddings.

    Source: arXiv 2605.02908, from its description.
    """
    require_embeddings(pipe)
    ids = [_ordinary_token(tokenizer, token) for tokenizer in tokenizers_of(pipe)]

    def arguments(prompt: str) -> dict[str, Any]:
        tokens = tokens_of(pipe, prompt)
        ends = [
            end_position(tokenizer, row) for tokenizer, row in zip(tokenizers_of(pipe), tokens, strict=True)
        ]
        swapped = [
            torch.where(torch.arange(len(row)) > end, torch.full_like(row, number), row)
            for row, end, number in zip(tokens, ends, ids, strict=True)
        ]
        found = embedded(pipe, swapped)
        if is_end_zeroed:
            states = found.states.clone()
            states[:, ends[0]] = 0.0
            found = PromptEmbedding(states, found.pooled)
        return found.arguments()

    text = f"Prompts are padded with {token!r} instead of the end token"
    text += ", and the end token's state is zero." if is_end_zeroed else "."
    name = "padding swapped, end zeroed" if is_end_zeroed else "padding swapped"
    return Mitigation(name=name, description=text, arguments=arguments)


def random_tokens(pipe: Pipeline, *, num_tokens: int, seed: int = 0) -> Mitigation:
    """Insert random tokens of the vocabulary at random places of the prompt; words are cut off if there is no room.

    Args:
        pipe: a Stable Diffusion 1, 2 or XL pipeline.
        num_tokens: tokens to insert, at least 1 and few enough to fit.
        seed: seed of the draw; every prompt has its own draw.

    Raises:
        ConfigError: if the tokens do not fit.
        ModelNotSupported: if the pipeline takes no embeddings.

    Source: Somepalli et al. 2023, random tokens.
    """
    require_embeddings(pipe)
    room = min(tokenizer.model_max_length for tokenizer in tokenizers_of(pipe)) - 2
    if not 1 <= num_tokens <= room:
        raise ConfigError(
            f"{num_tokens} random tokens; expected 1 to {room}, what fits between start and end"
        )

    def arguments(prompt: str) -> dict[str, Any]:
        pairs = zip(tokenizers_of(pipe), tokens_of(pipe, prompt), strict=True)
        return embedded(
            pipe, [with_random_tokens(t, row, prompt, num_tokens, seed) for t, row in pairs]
        ).arguments()

    plural = "s" if num_tokens > 1 else ""
    text = f"{num_tokens} random token{plural} inserted at random places of the prompt (seed {seed})."
    return Mitigation(name=f"{num_tokens} random token{plural}", description=text, arguments=arguments)


def with_random_tokens(tokenizer: Any, tokens: Tensor, prompt: str, num_tokens: int, seed: int) -> Tensor:
    """Insert random ordinary tokens between the start and the end of a padded row.

    Args:
        tokenizer: the row's tokenizer.
        tokens: token ids, shape (T,), int64: start, words, end, padding.
        prompt: the prompt; makes the draw its own.
        num_tokens: tokens to insert.
        seed: seed of the draw.

    Returns:
        Token ids, shape (T,), int64; words that no longer fit are cut off, inserted tokens never are.
    """
    generator = random.Random(f"{seed}\0{prompt}")
    special = set(tokenizer.all_special_ids)
    ordinary = [number for number in range(len(tokenizer)) if number not in special]
    end = end_position(tokenizer, tokens)
    words = tokens[1:end].tolist()[: len(tokens) - 2 - num_tokens]
    for _ in range(num_tokens):
        words.insert(generator.randint(0, len(words)), generator.choice(ordinary))
    row = [int(tokens[0]), *words, int(tokenizer.eos_token_id)]
    return torch.tensor(row + [int(tokenizer.pad_token_id)] * (len(tokens) - len(row)))


def adjusted_embedding(pipe: Pipeline, settings: AdjustmentSettings | None = None) -> Mitigation:
    """Move the prompt's embedding until the prompt no longer dominates the first prediction.

    Raises:
        ModelNotSupported: if the pipeline takes no embeddings.

    Source: Wen et al. 2024, section 4, from its description.
    """
    settings = settings or AdjustmentSettings()
    require_embeddings(pipe)
    text = (
        f"The prompt's embedding is adjusted by at most {settings.max_steps} steps until the conditional and the "
        f"unconditional first prediction differ by a norm of {settings.target_norm:g}."
    )
    return Mitigation(
        name="embedding adjusted",
        description=text,
        arguments=lambda prompt: adjust(pipe, prompt, settings)[0].arguments(),
    )


def _ordinary_token(tokenizer: Any, token: str) -> int:
    """Return the id of a vocabulary entry, as a tokenizer finds its own padding token."""
    number = tokenizer.convert_tokens_to_ids(token)
    if number is None or number in tokenizer.all_special_ids:
        raise ConfigError(
            f"{token!r} is not an ordinary token of this vocabulary; pass another one to pad with"
        )
    return int(number)
