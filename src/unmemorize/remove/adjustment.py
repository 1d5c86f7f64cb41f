"""A prompt's embedding, moved until the prompt no longer dominates the first prediction.

For a memorized prompt the conditional prediction is far from the unconditional one at the very first step. A few steps
of AdamW on the embedding lower that distance,

    min over e of  || denoiser(x_T, T, e) - denoiser(x_T, T, empty prompt) ||

and stop at a target, so that as much of the prompt as possible is kept. The start token's state stays as it is. The
weights are not changed: this protects only who runs the model with it.

Source: Wen et al. 2024 (arXiv 2407.21720), written from its description; rate, steps and target are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, ModelNotSupported
from unmemorize.models.denoising import DenoiserCall, Pipeline, record
from unmemorize.models.prompts import PromptEmbedding, embedded, prediction_for, tokens_of


@dataclass(frozen=True, slots=True, kw_only=True)
class AdjustmentSettings:
    """How a prompt's embedding is adjusted.

    Attributes:
        learning_rate: of AdamW, unitless.
        max_steps: steps at most.
        target_norm: the norm at which to stop, in units of the prediction.
        num_samples: latents that the norm is averaged over.
        seed: seed of these latents.
        num_steps: length of the schedule whose first step is used.
        size_px: side of the picture in pixels; by default the pipeline's own.
    """

    learning_rate: float = 0.05
    max_steps: int = 10
    target_norm: float = 3.0
    num_samples: int = 1
    seed: int = 0
    num_steps: int = 50
    size_px: int | None = None

    def __post_init__(self) -> None:
        if (
            min(self.learning_rate, self.max_steps, self.num_samples, self.num_steps) <= 0
            or self.target_norm < 0
        ):
            raise ConfigError(f"{self}: expected positive rates and counts, and a target norm of at least 0")


def adjust(
    pipe: Pipeline, prompt: str, settings: AdjustmentSettings | None = None
) -> tuple[PromptEmbedding, list[float]]:
    """Adjust one prompt's embedding; the start token's state stays as it is.

    Returns:
        The embedding, and the norm before each step and after the last one; each cost a forward pass for every
        sample, each step a backward pass, and the unconditional prediction one forward pass in all.

    Raises:
        ModelNotSupported: if the pipeline takes no embeddings.
    """
    settings = settings or AdjustmentSettings()
    original = embedded(pipe, tokens_of(pipe, prompt))
    call = record(
        pipe,
        prompt,
        num_samples=settings.num_samples,
        seeds=(settings.seed,),
        num_steps=settings.num_steps,
        guidance=7.5,
        size_px=settings.size_px,
    )
    if call.rows != 2:
        raise ModelNotSupported(
            f"{type(pipe).__name__} makes no unconditional prediction, so there is no norm to lower; use another rival"
        )
    with torch.no_grad():
        plain = _first_prediction(call, call.conditions["encoder_hidden_states"][:1], 0)
    start, rest = original.states[:, :1].float(), original.states[:, 1:].float().clone().requires_grad_()
    optimizer = torch.optim.AdamW([rest], lr=settings.learning_rate)
    norms: list[float] = []
    for step in range(settings.max_steps + 1):
        with torch.set_grad_enabled(step < settings.max_steps):
            states = torch.cat([start, rest], dim=1)
            gap = (_first_prediction(call, states, -1) - plain).float().flatten(1).norm(dim=1).mean()
        norms.append(float(gap.detach()))
        if norms[-1] <= settings.target_norm or step == settings.max_steps:
            break
        (rest.grad,) = torch.autograd.grad(gap, [rest])
        optimizer.step()
    moved = torch.cat([start, rest.detach()], dim=1).to(original.states)
    return PromptEmbedding(moved, original.pooled), norms


def _first_prediction(call: DenoiserCall, states: Tensor, row_idx: int) -> Tensor:
    timesteps = call.timesteps[:1].expand(len(call.latents))
    return prediction_for(call, call.latents, timesteps, states, row_idx=row_idx)
