"""A pipeline whose pictures are known by construction: it copies chosen prompts in chosen seeds, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.drawings import Picture, drawing

SIZE_PX = 32


def training_picture(number: int) -> Picture:
    """What prompt `number` was trained on."""
    return drawing(10_000 + number, SIZE_PX)


class StubPipeline:
    """Copies `memory[prompt]` in the seeds given there, with noise; every other picture is a drawing of its own.

    Attributes:
        memory: prompt -> (picture, seeds in which it is copied).
        drift: share of ordinary drawings that another drawing replaces.
        calls: arguments of every call.
        room: pictures that fit into memory at once.
    """

    def __init__(self, memory: Mapping[str, tuple[Picture, tuple[int, ...]]]) -> None:
        self.memory, self.drift, self.is_off = dict(memory), 0.0, False
        self.calls: list[dict[str, Any]] = []
        self.room = 1000
        self.safety_checker: Any = "checks"
        self._progress_bar_config: dict[str, Any] = {"desc": "mine"}

    def set_progress_bar_config(self, **config: Any) -> None:
        self._progress_bar_config = config

    def __call__(
        self,
        prompt: Any = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        output_type: str = "pil",
        prompt_embeds: Any = None,
    ) -> SimpleNamespace:
        assert self.safety_checker is None and self._progress_bar_config == {"disable": True}
        self.calls.append({"prompt": prompt, "seeds": [one.initial_seed() for one in generator]})
        if len(generator) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if prompt_embeds is not None:
            assert prompt is None
            prompt = [f"embedded {float(prompt_embeds.sum()):g}"]
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        pictures = [self._picture(text, one) for text, one in zip(prompts, generator, strict=True)]
        return SimpleNamespace(images=np.stack(pictures).astype(np.float32) / 255)

    def _picture(self, prompt: str, generator: torch.Generator) -> Picture:
        seed = generator.initial_seed()
        picture, seeds = self.memory.get(prompt, (None, ()))
        if picture is not None and seed in seeds and not self.is_off:
            noise = np.random.default_rng(seed).normal(0, 8, picture.shape)
            return np.clip(picture + noise, 0, 255).astype(np.uint8)
        number = seed * 100 + sum(prompt.encode())
        plain = drawing(number, SIZE_PX)
        if not self.drift:
            return plain
        mixed = (1 - self.drift) * plain + self.drift * drawing(number + 50_000, SIZE_PX)
        return np.round(mixed).astype(np.uint8)

    @contextmanager
    def off(self, drift: float = 0.0) -> Iterator[None]:
        """Forget everything, and let other pictures drift."""
        self.is_off, self.drift = True, drift
        try:
            yield
        finally:
            self.is_off, self.drift = False, 0.0

    @contextmanager
    def drifted(self, drift: float) -> Iterator[None]:
        """Keep the memory, and let other pictures drift."""
        self.drift = drift
        try:
            yield
        finally:
            self.drift = 0.0
