"""An edit removes memory whose place is known, and brings the model closer to its twin that never had the memory."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from tests.tiny_diffusion import WORDS, _clip, _ddim, _unet, _vae, clip_tokenizer
from unmemorize.gates import module_at
from unmemorize.models.denoising import with_denoiser
from unmemorize.models.diffusion import find_sites, fingerprint
from unmemorize.neurons import NeuronSet
from unmemorize.remove.diffusion import fold
from unmemorize.remove.diffusion_edits import edit_figures, edit_values
from unmemorize.remove.diffusion_moments import collect_second_moments, text_states

WIDTH, ROWS = 128, (1, 3, 4)
MEMORIZED = "the moon of the stone garden"


def wide_pipeline(seed: int) -> Any:
    """A pipeline whose text states are wide enough that one prompt does not fill them."""
    from diffusers import StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer()
        pipe = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_clip(tokenizer, width=WIDTH),
            tokenizer=tokenizer,
            unet=_unet(WIDTH),
            scheduler=_ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval()
    return pipe


def distance(pipe: Any, twin: Any, prompts: list[str]) -> float:
    """Mean distance of latents from the twin's, as a fraction of the twin's norm."""

    def latents(p: Any) -> Any:
        options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        return p(prompts, **options, generator=generators, output_type="latent").images.flatten(1)

    ours, theirs = latents(pipe), latents(twin)
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).mean())


def planted_experiment(seed: int, *, has_variants: bool = True) -> dict[str, tuple[float, float]]:
    """Plant a memory in known rows, remove it in several ways; (memorized, ordinary) distance from the twin each."""
    twin = wide_pipeline(seed)
    draw = random.Random(seed)
    captions = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(300)]
    fresh = [" ".join(draw.choices(WORDS, k=5)) for _ in range(4)]
    ordinary = collect_second_moments(twin, captions)
    state = text_states(twin, [MEMORIZED])[0][0, 4:8].double().mean(0)
    regular = ordinary.mean_product + 1e-3 * ordinary.mean_product.diagonal().mean() * torch.eye(WIDTH)
    direction = torch.linalg.solve(regular, state)
    unet = copy.deepcopy(twin.unet)
    with torch.no_grad():
        for site in find_sites(twin):
            weight = module_at(unet, site.path).weight
            assert isinstance(weight, torch.Tensor)
            weight[list(ROWS)] += (10 * direction / (direction @ state)).float()
    planted = with_denoiser(twin, unet)
    neurons = NeuronSet(fingerprint(planted), {site: ROWS for site in find_sites(planted)})
    edited = edit_values(planted, [MEMORIZED], ordinary, neurons=neurons)
    figures = edit_figures(planted, edited, [MEMORIZED], ordinary)
    assert (figures.num_rows, figures.num_zero_rows) == (len(neurons), 0)
    ways = {
        "before": planted,
        "edit": edited,
        "edit, placebo": edit_values(planted, [MEMORIZED], ordinary, neurons=neurons.placebo(seed=seed)),
        "fold": fold(planted, neurons),
    }
    if has_variants:
        ways["edit, silent"] = edit_values(planted, [MEMORIZED], ordinary, neurons=neurons, target="zero")
        ways["edit, whole layers"] = edit_values(planted, [MEMORIZED], ordinary)
    return {name: (distance(p, twin, [MEMORIZED] * 4), distance(p, twin, fresh)) for name, p in ways.items()}


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[float, float]]:
    return planted_experiment(0, has_variants=False)


def test_the_edit_takes_the_planted_memory_out_and_the_placebo_does_not(results: Any) -> None:
    before = results["before"][0]
    assert results["edit"][0] < 0.25 * before
    assert results["edit, placebo"][0] > 0.75 * before


def test_the_edit_harms_ordinary_prompts_less_than_the_fold(results: Any) -> None:
    assert results["edit"][1] < 0.5 * results["fold"][1]
    assert results["edit"][1] < results["before"][1]
