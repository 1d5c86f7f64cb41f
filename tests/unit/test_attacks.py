"""The attack: finds what can be found, counts what it costs, and leaves the model alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.tiny_diffusion import tiny_pipeline
from unmemorize.audit.attacks import AttackSettings, latents_of, noised, optimize, retrieve
from unmemorize.errors import ConfigError, ModelNotSupported, ShapeMismatch

OTHER = "the moon of the river"


def picture(seed: int = 0) -> Tensor:
    return torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(seed))


def test_optimize_finds_a_minimum_and_draws_anew_at_each_step() -> None:
    goal = torch.tensor([1.0, -2.0, 0.5])
    drawn: list[float] = []

    def loss(value: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(3, generator=generator)
        drawn.append(float(noise[0]))
        return (value - goal + 0.01 * noise).square().sum()

    start = torch.zeros(3)
    settings = AttackSettings(num_steps=120, seed=3)
    found, losses = optimize(loss, start, settings)
    torch.testing.assert_close(found, goal, rtol=0, atol=0.05)
    assert torch.equal(start, torch.zeros(3))
    assert len(losses) == 120 and losses[-1] < 0.01 * losses[0]
    assert len(set(drawn)) == 120
    again, _ = optimize(loss, start, settings)
    assert torch.equal(again, found)


@pytest.mark.parametrize(
    ("kind", "start"), [("sd1", "a photo of the red cat"), ("sd2", None), ("sdxl", OTHER)]
)
def test_the_loss_falls_and_the_model_is_untouched(kind: str, start: str | None) -> None:
    pipe = tiny_pipeline(kind)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    settings = AttackSettings(num_steps=8, batch_size=2)
    result = retrieve(pipe, picture(), start=start, settings=settings)
    assert sum(result.losses[-4:]) < sum(result.losses[:4])
    assert (result.sample_forwards, result.sample_backwards) == (16, 16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in pipe.unet.parameters())
    arguments = result.embedding.arguments()
    made = pipe(**arguments, num_inference_steps=1, height=64, width=64, output_type="latent").images
    assert made.shape == (1, 4, 8, 8)
    again = retrieve(pipe, picture(), start=start, settings=settings)
    assert torch.equal(again.embedding.states, result.embedding.states)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_noise_is_that_of_the_training_schedule_under_any_scheduler(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    clean, noise = (torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    timesteps = torch.tensor([1, 400, 999])
    seen, wanted = noised(pipe.scheduler, clean, noise, timesteps)
    torch.testing.assert_close(seen, pipe.scheduler.add_noise(clean, noise, timesteps))
    expected = noise if kind == "sd1" else pipe.scheduler.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(wanted, expected)
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(noised(euler, clean, noise, timesteps), (seen, wanted))
    flow: Any = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ModelNotSupported, match="has no training schedule that is known here"):
        noised(flow, clean, noise, timesteps)


def test_pictures_become_the_latents_the_denoiser_works_on() -> None:
    pipe = tiny_pipeline("sd1")
    pictures = picture()[None]
    with torch.no_grad():
        expected = pipe.vae.encode(pictures * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert torch.equal(latents_of(pipe, pictures), expected)
    shifted = tiny_pipeline("sd3")
    with torch.no_grad():
        mode = shifted.vae.encode(pictures * 2 - 1).latent_dist.mode()
    config = shifted.vae.config
    torch.testing.assert_close(
        latents_of(shifted, pictures), (mode - config.shift_factor) * config.scaling_factor
    )
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).eval()
    found = latents_of(pipe, pictures)
    with torch.no_grad():
        assert torch.equal(found, pipe.vae.encode(pictures * 2 - 1).latents)
    assert found.shape == (1, 4, 8, 8)


def test_bad_input_is_refused() -> None:
    pipe = tiny_pipeline("sd1")
    with pytest.raises(ShapeMismatch, match="expected \\(N, 3, height, width\\)"):
        retrieve(pipe, torch.rand((1, 64, 64)), start=None)
    with pytest.raises(ShapeMismatch, match="expected a square one"):
        retrieve(pipe, torch.rand((3, 64, 32)), start=None)
    overflowing = tiny_pipeline("sd1")
    with torch.no_grad():
        overflowing.vae.quant_conv.bias.fill_(torch.inf)
    with pytest.raises(ModelNotSupported, match="overflows in float32"):
        latents_of(overflowing, picture()[None])
    with pytest.raises(ConfigError, match="above 0"):
        AttackSettings(num_steps=0)
    with pytest.raises(ModelNotSupported, match="does not take CLIP embeddings"):
        retrieve(tiny_pipeline("pixart"), picture(), start=None)
    pipe.vae = torch.nn.Identity()
    with pytest.raises(ModelNotSupported, match="cannot encode pictures with Identity"):
        latents_of(pipe, picture()[None])
