"""A stand-in pipeline whose memory is known: chosen value neurons hold one picture for prompts with one word.

While the planted neurons of a prompt are active its prediction is one fixed picture for every latent; otherwise it is a
smoothed copy of the latent, different for every sample. With rule "or" any active planted neuron keeps the picture,
with rule "and" it needs all of them.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from unmemorize.models.diffusion import DenoiserRow

ROW = DenoiserRow(
    blocks=(("blocks", "blocks"),), default_blocks=("blocks",), values=("attn2.to_v",), hidden=("ff.net.2",)
)
WIDTH_TEXT, WIDTH, NUM_TOKENS = 48, 12, 8
ORDINARY = [
    f"{a} {b} {c}" for a in ("red", "old", "tall") for b in ("cat", "tree", "lamp") for c in ("here", "there")
]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn2 = nn.Module()
        self.attn2.to_v = nn.Linear(WIDTH_TEXT, WIDTH, bias=False)
        self.ff = nn.Module()
        self.ff.net = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Linear(4, 4)])


class PlantedDenoiser(nn.Module):
    """Three value layers, the planted neurons, and the picture."""

    def __init__(self, planted: tuple[tuple[int, int], ...], rule: str, word: str, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.planted, self.rule = planted, rule
        self.blocks = nn.ModuleList([_Block() for _ in range(3)])
        self.picture = nn.Parameter(torch.randn((4, 8, 8), generator=generator))
        with torch.no_grad():
            for block in self.blocks:
                block.attn2.to_v.weight.copy_(torch.randn((WIDTH, WIDTH_TEXT), generator=generator) * 0.1)
            for rank, (layer, index) in enumerate(planted):
                direction = embedding(word)
                strength = (8.0 - rank) / direction.square().sum()
                self.blocks[layer].attn2.to_v.weight[index] = direction * strength

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        values = [block.attn2.to_v(encoder_hidden_states).amax(1) for block in self.blocks]
        held = [values[layer][:, index] for layer, index in self.planted]
        level = torch.zeros(len(sample))
        if held:
            level = torch.stack(held).amax(0) if self.rule == "or" else torch.stack(held).amin(0)
        share = torch.sigmoid(6 * (level - 3)).view(-1, 1, 1, 1)
        smooth = nn.functional.avg_pool2d(sample, 5, stride=1, padding=2) * 20
        picture = nn.functional.interpolate(self.picture[None], scale_factor=6, mode="bilinear") * 20
        return (sample + (1 - share) * smooth + share * picture,)


class PlantedPipeline:
    """The few parts of a pipeline that localization uses."""

    def __init__(
        self,
        planted: tuple[tuple[int, int], ...] = (),
        *,
        rule: str = "or",
        word: str = "zorvex",
        seed: int = 0,
    ) -> None:
        self.unet = PlantedDenoiser(planted, rule, word, seed)
        self.scheduler = DDIMScheduler(steps_offset=1, set_alpha_to_one=False)
        self.components = {"unet": self.unet}
        self._progress_bar_config: dict[str, Any] = {}

    def set_progress_bar_config(self, **config: Any) -> None:
        """Keep the settings, as a pipeline does."""
        self._progress_bar_config = config

    def __call__(
        self, prompt: list[str], num_images_per_prompt: int, num_inference_steps: int, generator: Any
    ) -> SimpleNamespace:
        states = torch.stack([_encoded(text) for text in prompt]).repeat_interleave(num_images_per_prompt, 0)
        self.scheduler.set_timesteps(num_inference_steps)
        shape = (len(states), 4, 48, 48)
        if isinstance(generator, list):
            latents = torch.cat([torch.randn((1, *shape[1:]), generator=one) for one in generator])
        else:
            latents = torch.randn(shape, generator=generator)
        states, latents = states.to(self.unet.picture.dtype), latents.to(self.unet.picture.dtype)
        self.unet(latents, self.scheduler.timesteps[0], encoder_hidden_states=states, return_dict=False)
        return SimpleNamespace(images=latents)


def embedding(word: str) -> Tensor:
    """A fixed random vector for a word, shape (WIDTH_TEXT,)."""
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big")
    return torch.randn(WIDTH_TEXT, generator=torch.Generator().manual_seed(seed))


def _encoded(text: str) -> Tensor:
    words = (["<start>", *text.split(), "<end>"] + ["<pad>"] * NUM_TOKENS)[:NUM_TOKENS]
    return torch.stack([embedding(word) for word in words])
