"""Localization under half precision, other attention processors and schedulers, and what it says along the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from tests.planted.planted_pipeline import ORDINARY, ROW, PlantedPipeline
from tests.tiny_diffusion import tiny_pipeline
from unmemorize.errors import NeuronSetMismatch, SitesNotFound, UnmemorizeWarning
from unmemorize.localize.activations import collect_statistics
from unmemorize.localize.diffusion import localize
from unmemorize.localize.passes import NemoSettings, first_step
from unmemorize.localize.results import describe
from unmemorize.localize.scores import correlation
from unmemorize.localize.search import SearchSettings
from unmemorize.models.diffusion import find_sites
from unmemorize.models.prompts import cut_words

MEMORIZED, OTHER = "old zorvex here", "tall lamp there"
CAPTIONS = ["a red cat", "the blue house", "a photo of the moon"]


@pytest.mark.parametrize("ranking", ["unusual", "gradient"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_planted_neurons_are_found_in_half_precision(dtype: torch.dtype, ranking: Any) -> None:
    pipe: Any = PlantedPipeline(((0, 2), (2, 5)))
    pipe.unet.to(dtype)
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    settings = NemoSettings(ranking=ranking)
    memorized, other = localize(pipe, [MEMORIZED, OTHER], statistics, settings, row=ROW)
    assert memorized.refined == ((2,), (), (5,))
    assert not other.is_memorized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_half_precision_pipeline_gives_nearly_the_same_maps_and_slopes(dtype: torch.dtype) -> None:
    pipe = tiny_pipeline("sd1")
    maps, slopes = _looks(pipe)
    half_maps, half_slopes = _looks(pipe.to(dtype))
    assert (half_maps - maps).abs().mean() < 0.02
    assert correlation(half_maps, maps).min() > 0.99
    best = max(range(len(slopes)), key=lambda i: float(slopes[i].abs().max()))
    for i, (ours, half) in enumerate(zip(slopes, half_slopes, strict=True)):
        assert half.isfinite().all()
        if i == best:
            assert torch.nn.functional.cosine_similarity(ours, half, dim=0) > 0.9


class Counting:
    """A processor of a user's own."""

    def __init__(self) -> None:
        self.inner, self.calls = AttnProcessor(), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


def test_processors_stay_as_the_user_set_them() -> None:
    pipe = tiny_pipeline("sd1")
    looks = []
    own = Counting()
    for processor in (AttnProcessor2_0(), AttnProcessor(), own):
        pipe.unet.set_attn_processor(processor)
        looks.append(_looks(pipe))
        assert set(pipe.unet.attn_processors.values()) == {processor}
    assert own.calls > 0
    for maps, slopes in looks[1:]:
        assert torch.allclose(maps, looks[0][0], atol=1e-4)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(slopes, looks[0][1], strict=True))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with NumPy 2
@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        LCMScheduler,
        PNDMScheduler,
    ],
)
def test_other_schedulers_ask_nearly_the_same_question(scheduler: Any) -> None:
    """At the first steps all of them show nearly pure noise at nearly the same timestep."""
    pipe = tiny_pipeline("sd1")
    maps, _ = _looks(pipe)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    found, _ = _looks(pipe)
    assert correlation(found, maps).min() > 0.99
    statistics = collect_statistics(pipe, CAPTIONS)
    (result,) = localize(pipe, ["a red cat house"], statistics, NemoSettings(num_samples=2))
    assert not result.is_memorized


def _looks(pipe: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return maps of two samples, one of them also with a whole site closed, and slopes."""
    sites = find_sites(pipe)
    passes = first_step(pipe, "a red cat house", sites, NemoSettings(num_samples=2))
    off = frozenset((3, index) for index in range(sites[3].width))
    maps = passes.maps([(0, frozenset()), (1, frozenset()), (0, off)])
    assert (maps[0] - maps[2]).abs().max() > 1e-4
    return maps, passes.slopes(0, maps[0])


def test_words_that_no_encoder_reads_are_named_once() -> None:
    pipe = tiny_pipeline("sd1")
    statistics = collect_statistics(pipe, CAPTIONS)
    long = "red cat " * 37 + "red river stone"
    assert cut_words(pipe, long) == "river stone"
    with pytest.warns(UnmemorizeWarning, match="longer than the text encoder reads; .*'river stone'") as seen:
        list(localize(pipe, [long, "a cat"], statistics))
    assert len(seen) == 1
    assert cut_words(pipe, "red cat") == ""
    assert cut_words(tiny_pipeline("sd3"), long) != ""
    assert cut_words(PlantedPipeline(), long) == ""


def test_results_are_described() -> None:
    pipe: Any = PlantedPipeline(((1, 3),))
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    found, nothing = localize(pipe, [MEMORIZED, OTHER], statistics, row=ROW)
    assert describe(found).startswith(
        f"'{MEMORIZED}': 1 neuron at 1 site breaks the memory in all 4 kept samples"
    )
    assert "not memorized: no two samples are alike enough (best pair 0." in describe(nothing)
    never = NemoSettings(search=SearchSettings(refinement_threshold=-1.0))
    (short,) = localize(pipe, [MEMORIZED], statistics, never, row=ROW)
    assert short.is_replaced
    assert "memory not broken: no candidate set brings the score below the threshold" in describe(short)
    assert f"{short.threshold:.3f}" in describe(short)


def test_what_does_not_fit_the_model_is_refused() -> None:
    pipe = tiny_pipeline("sd1")
    with pytest.raises(SitesNotFound, match="no blocks named 'joint'; this denoiser has down, mid, up"):
        find_sites(pipe, blocks=["joint"])
    other = collect_statistics(tiny_pipeline("sdxl"), CAPTIONS)
    with pytest.raises(NeuronSetMismatch, match="collect them on this model"):
        localize(pipe, ["a cat"], other)
