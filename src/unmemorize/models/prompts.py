"""Prompts as token ids and as embeddings, and the denoiser as a differentiable function of an embedding.

Pipelines of the Stable Diffusion 1, 2 and XL kind take an embedding in place of a prompt. So a prompt can be changed
between tokenizer and text encoder (other tokens) or after the text encoder (other embeddings) without touching the
pipeline: `tokens_of` gives the ids, `embedded` does to them what the pipeline does to a prompt, bit for bit, and
`PromptEmbedding.arguments` is what its call takes. Weighted prompts, clip skip and a second prompt are not known here.

    tokens  --text encoder-->  states (1, T, D)  --denoiser-->  prediction

Pipelines with T5 encoders or joint attention are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmemorize.errors import ModelNotSupported
from unmemorize.models.denoising import DenoiserCall, Pipeline, denoiser_of


@dataclass(frozen=True, slots=True)
class PromptEmbedding:
    """What a pipeline's call takes in place of a prompt.

    Attributes:
        states: text states, shape (1, T, D), unitless.
        pooled: pooled state, shape (1, P); None where the pipeline uses none.
    """

    states: Tensor
    pooled: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Return arguments of the pipeline's call; more pictures are asked for by `num_images_per_prompt`."""
        pooled = {} if self.pooled is None else {"pooled_prompt_embeds": self.pooled}
        return {"prompt": None, "prompt_embeds": self.states, **pooled}


def require_embeddings(pipe: Pipeline) -> None:
    """Raise `ModelNotSupported` unless a pipeline takes CLIP embeddings in place of a prompt."""
    known = inspect.signature(type(pipe).__call__).parameters
    kind = type(denoiser_of(pipe)).__name__
    has_clip = all("CLIP" in type(encoder).__name__ for _, encoder in _encoders(pipe))
    if kind != "UNet2DConditionModel" or "prompt_embeds" not in known or not _encoders(pipe) or not has_clip:
        raise ModelNotSupported(
            f"{type(pipe).__name__} with {kind} does not take CLIP embeddings in place of a prompt; "
            "this needs a pipeline of the Stable Diffusion 1, 2 or XL kind"
        )


def tokenizers_of(pipe: Pipeline) -> list[Any]:
    """Return the tokenizers of a pipeline, one per text encoder."""
    return [tokenizer for tokenizer, _ in _encoders(pipe)]


def cut_words(pipe: Pipeline, prompt: str) -> str:
    """Return the words at the end of a prompt that none of the pipeline's text encoders reads; "" if all are read.

    A tokenizer reads as many tokens as its own limit and the pipeline's `max_sequence_length` allow.
    """
    longest = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    allowed = longest.default if longest is not None and isinstance(longest.default, int) else None
    cut: list[str] = []
    for tokenizer in tokenizers_of(pipe):
        limit = min(tokenizer.model_max_length, allowed or tokenizer.model_max_length)
        tokens = tokenizer(prompt, truncation=False, add_special_tokens=False, verbose=False).input_ids
        num_words = limit - tokenizer.num_special_tokens_to_add()
        cut.append(tokenizer.decode(tokens[num_words:]).strip() if len(tokens) > num_words else "")
    return min(cut, key=len, default="")


def shortened(prompt: str, *, num_letters: int = 60) -> str:
    """Cut a prompt for a message."""
    return prompt if len(prompt) <= num_letters else f"{prompt[: num_letters - 1]}…"


def tokens_of(pipe: Pipeline, prompt: str) -> list[Tensor]:
    """Return a prompt's token ids as the pipeline makes them, shape (T,) per text encoder, padded and cut off.

    Raises:
        ModelNotSupported: if the pipeline takes no embeddings.
    """
    require_embeddings(pipe)
    found = []
    for tokenizer in tokenizers_of(pipe):
        text = (
            pipe.maybe_convert_prompt(prompt, tokenizer) if hasattr(pipe, "maybe_convert_prompt") else prompt
        )
        options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        found.append(tokenizer(text, return_tensors="pt", **options).input_ids[0])
    return found


def end_position(tokenizer: Any, tokens: Tensor) -> int:
    """Return the position of the first end token; what follows it is padding."""
    return int((tokens == tokenizer.eos_token_id).int().argmax())


@torch.no_grad()
def embedded(pipe: Pipeline, tokens: Sequence[Tensor]) -> PromptEmbedding:
    """Encode token ids as the pipeline encodes those of a prompt.

    Args:
        pipe: the pipeline.
        tokens: one tensor of shape (T,) per text encoder, int64.

    Raises:
        ModelNotSupported: if the pipeline takes no embeddings.
    """
    require_embeddings(pipe)
    pairs = _encoders(pipe)
    if len(pairs) == 1:
        ((tokenizer, encoder),) = pairs
        ids = tokens[0][None].to(encoder.device)
        mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            mask = (torch.arange(ids.shape[1]) <= end_position(tokenizer, tokens[0]))[None].to(ids)
        return PromptEmbedding(encoder(ids, attention_mask=mask)[0])
    outputs = [
        encoder(ids[None].to(encoder.device), output_hidden_states=True)
        for ids, (_, encoder) in zip(tokens, pairs, strict=True)
    ]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return PromptEmbedding(states.to(pairs[-1][1].dtype), outputs[-1][0])


def prediction_for(
    call: DenoiserCall, latents: Tensor, timesteps: Tensor, states: Tensor, *, row_idx: int = -1
) -> Tensor:
    """Run the denoiser for given latents, timesteps and text states; differentiable in latents and states.

    Args:
        call: a recorded call, which gives every other argument.
        latents: shape (M, C, H, W).
        timesteps: shape (M,), in the denoiser's unit.
        states: text states, shape (1, T, D); converted to the latents' dtype.
        row_idx: the recorded row that the other arguments are taken from; -1 is the prompt's, with guidance 0 the
            empty prompt's.

    Returns:
        Raw predictions, shape (M, ...), in the denoiser's dtype.
    """
    names = list(inspect.signature(type(call.denoiser).forward).parameters)[1:]
    arguments = {
        **_one_row(call.conditions, call.rows, row_idx, len(latents)),
        names[0]: latents,
        "timestep": timesteps.to(latents.device),
        "encoder_hidden_states": states.to(latents).expand(len(latents), -1, -1),
        "return_dict": False,
    }
    output: Tensor = call.denoiser(**arguments)[0]
    return output


def _one_row(value: Any, rows: int, row_idx: int, count: int) -> Any:
    """Take one row of every batched tensor and repeat it, inside nested dictionaries too."""
    if isinstance(value, Mapping):
        return {key: _one_row(part, rows, row_idx, count) for key, part in value.items()}
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows:
        return value[row_idx][None].expand(count, *value.shape[1:])
    return value


def _encoders(pipe: Pipeline) -> list[tuple[Any, Any]]:
    """Return (tokenizer, text encoder) pairs in the order in which the pipeline uses them."""
    pairs = [
        (getattr(pipe, f"tokenizer{end}", None), getattr(pipe, f"text_encoder{end}", None))
        for end in ("", "_2", "_3")
    ]
    return [
        (tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None
    ]
