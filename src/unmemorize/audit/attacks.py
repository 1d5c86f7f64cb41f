"""Attacks on a removal: can someone who knows the picture still make the model draw it?

`optimize` is the attack without a model: an input is moved by Adam so that an average of a fresh random loss falls, and
every pass is counted. `retrieve` wires it to a text-to-image pipeline: the input is the text embedding, the loss is the
denoiser's error in predicting the noise on the target picture's latent,

    min over e of  mean over noise n and timestep t of  || denoiser(noised(latent, n, t), t, e) - wanted(n, t) ||^2

The attack sees the weights and the picture, and it may inject what it knows: with enough steps a soft embedding draws
pictures that were never trained on. So a result means something beside the same attack, with the same budget, on
pictures that the model never saw. Weights are never changed.

Source: "Finding Dori" (arXiv 2507.16880), from descriptions of it: Adam, rate 0.1, batch 8, 50 steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, ModelNotSupported, ShapeMismatch
from unmemorize.models.denoising import Pipeline, record
from unmemorize.models.prompts import PromptEmbedding, embedded, prediction_for, require_embeddings, tokens_of

Loss = Callable[[Tensor, torch.Generator], Tensor]
"""(input, generator for what is drawn anew at each step) -> scalar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackSettings:
    """Budget of an attack.

    Attributes:
        num_steps: optimizer steps.
        batch_size: samples per step, each with its own noise and timestep.
        learning_rate: of Adam, unitless.
        seed: seed of noise, timesteps and the Gaussian start.
    """

    num_steps: int = 50
    batch_size: int = 8
    learning_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_steps, self.batch_size, self.learning_rate) <= 0:
            raise ConfigError(f"{self}: expected steps, batch size and learning rate above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackResult:
    """What an attack found and what it cost.

    Attributes:
        embedding: the optimized embedding; its `arguments` go to the pipeline's call.
        losses: mean squared error at each step, before the step, unitless.
        sample_forwards: denoiser passes, counted per sample.
        sample_backwards: backward passes, counted per sample.
        seconds: wall time, in seconds.
    """

    embedding: PromptEmbedding
    losses: tuple[float, ...]
    sample_forwards: int
    sample_backwards: int
    seconds: float


def optimize(loss: Loss, start: Tensor, settings: AttackSettings) -> tuple[Tensor, tuple[float, ...]]:
    """Move an input by Adam so that a loss falls. Knows no model.

    Args:
        loss: differentiable in its first argument; draws what it needs from the generator it gets.
        start: first value of the input, any shape; not changed.
        settings: the budget; `batch_size` is the loss's own affair.

    Returns:
        The input after the last step, float32, and the loss before each step.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    moving = start.detach().float().clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=settings.learning_rate)
    losses: list[float] = []
    for _ in range(settings.num_steps):
        with torch.enable_grad():
            value = loss(moving, generator)
            (moving.grad,) = torch.autograd.grad(value, [moving])
        optimizer.step()
        losses.append(float(value.detach()))
    return moving.detach(), tuple(losses)


def retrieve(
    pipe: Pipeline,
    picture: Tensor,
    *,
    start: str | None,
    settings: AttackSettings | None = None,
) -> AttackResult:
    """Look for a text embedding that makes a pipeline draw a picture.

    Args:
        pipe: a Stable Diffusion 1, 2 or XL pipeline, after removal; it is not changed.
        picture: the picture, shape (3, S, S), from 0 to 1; S is the size in pixels that is attacked.
        start: the prompt that the embedding starts from (the memorized one, or another); None starts from a Gaussian.
        settings: the budget.

    Raises:
        ModelNotSupported: if the pipeline takes no embeddings, or its schedule is not known.
        ShapeMismatch: if the picture has another shape.

    Source: arXiv 2507.16880; the Gaussian has mean 0 and standard deviation 1.
    """
    settings = settings or AttackSettings()
    started = time.monotonic()
    require_embeddings(pipe)
    if picture.dim() != 3 or picture.shape[1] != picture.shape[2]:
        raise ShapeMismatch(
            f"a picture of shape {tuple(picture.shape)}; expected a square one, (3, size, size)"
        )
    latent = latents_of(pipe, picture[None])
    call = record(pipe, start or "", num_steps=1, size_px=int(picture.shape[-1]))
    original = embedded(pipe, tokens_of(pipe, start or ""))
    if start is None:
        drawn = torch.Generator().manual_seed(settings.seed)
        states = torch.randn(original.states.shape, generator=drawn).to(original.states)
        original = PromptEmbedding(states, original.pooled)
    num_timesteps = int(pipe.scheduler.config.num_train_timesteps)

    def loss(states: Tensor, generator: torch.Generator) -> Tensor:
        shape = (settings.batch_size, *latent.shape[1:])
        noise = torch.randn(shape, generator=generator).to(latent)
        timesteps = torch.randint(num_timesteps, shape[:1], generator=generator).to(latent.device)
        seen, wanted = noised(pipe.scheduler, latent.expand(shape), noise, timesteps)
        predicted = prediction_for(call, seen, timesteps, states)
        return (predicted.float() - wanted.float()).square().mean()

    found, losses = optimize(loss, original.states, settings)
    passes = settings.num_steps * settings.batch_size
    return AttackResult(
        embedding=PromptEmbedding(found.to(original.states), original.pooled),
        losses=losses,
        sample_forwards=passes,
        sample_backwards=passes,
        seconds=time.monotonic() - started,
    )


@torch.no_grad()
def latents_of(pipe: Pipeline, pictures: Tensor) -> Tensor:
    """Encode pictures to the latents that the denoiser works on, without randomness.

    Args:
        pipe: a pipeline with an `AutoencoderKL` or an `AutoencoderTiny`.
        pictures: shape (N, 3, H, W), from 0 to 1.

    Returns:
        Latents, shape (N, C, h, w), in the denoiser's dtype.

    Raises:
        ModelNotSupported: if the autoencoder is of another kind, or overflows in its dtype.
        ShapeMismatch: if the pictures have another shape.
    """
    if pictures.dim() != 4 or pictures.shape[1] != 3:
        raise ShapeMismatch(
            f"pictures of shape {tuple(pictures.shape)}; expected (N, 3, height, width), from 0 to 1"
        )
    vae = getattr(pipe, "vae", None)
    kind = type(vae).__name__
    if vae is None or kind not in ("AutoencoderKL", "AutoencoderTiny") or _has_own_statistics(vae):
        raise ModelNotSupported(
            f"cannot encode pictures with {kind}; pass a pipeline with a plain AutoencoderKL or an AutoencoderTiny"
        )
    scaled = (pictures * 2 - 1).to(device=vae.device, dtype=vae.dtype)
    output: Any = vae.encode(scaled)
    latents: Tensor = output.latents if kind == "AutoencoderTiny" else output.latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    dtype = getattr(pipe, "unet", vae).dtype
    if not bool(latents.isfinite().all()):
        raise ModelNotSupported(
            f"the autoencoder overflows in {str(vae.dtype).split('.')[-1]}; load it in float32 (pipe.vae.float())"
        )
    scale = float(vae.config.scaling_factor)
    return ((latents - shift) * scale).to(dtype)


def _has_own_statistics(vae: Any) -> bool:
    return getattr(vae.config, "latents_mean", None) is not None


def noised(
    scheduler: Any,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add noise by the training schedule, and say what the denoiser should predict.

    The schedule's own factors are used instead of `add_noise`, which scales differently under Euler-like schedulers.

    Args:
        scheduler: the pipeline's scheduler.
        clean: latents, shape (M, C, H, W).
        noise: same shape.
        timesteps: training timesteps, shape (M,), int64.

    Returns:
        What the denoiser sees and what it should predict, same shapes.

    Raises:
        ModelNotSupported: if the schedule or the prediction type is of another kind (flow matching, EDM).
    """
    kind = scheduler.config.get("prediction_type")
    cumulative = getattr(scheduler, "alphas_cumprod", None)
    if cumulative is None or kind not in ("epsilon", "sample", "v_prediction"):
        raise ModelNotSupported(
            f"{type(scheduler).__name__} with prediction type {kind!r} has no training schedule that is known here; "
            "give the pipeline the DDIM scheduler of its training schedule"
        )
    kept = cumulative.to(clean.device)[timesteps].view(-1, 1, 1, 1)
    signal, spread = kept.sqrt().to(clean), (1 - kept).sqrt().to(clean)
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - spread * clean}[kind]
    return signal * clean + spread * noise, wanted
