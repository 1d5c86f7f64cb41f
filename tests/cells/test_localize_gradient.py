"""The gradient ranking: planted neurons come first, slopes equal differences, and the model is left as it was."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from tests.planted.planted_pipeline import ORDINARY, ROW, PlantedPipeline
from tests.tiny_diffusion import tiny_pipeline
from unmemorize.errors import ConfigError, UnmemorizeWarning
from unmemorize.localize.activations import collect_statistics
from unmemorize.localize.diffusion import localize
from unmemorize.localize.orders import slope_order
from unmemorize.localize.passes import NemoSettings, Passes, first_step
from unmemorize.localize.scores import correlation
from unmemorize.models.diffusion import find_sites

MEMORIZED = "old zorvex here"
GRADIENT = NemoSettings(ranking="gradient")


@pytest.mark.parametrize(
    ("planted", "rule"),
    [
        (((1, 3),), "or"),
        (((0, 2), (2, 5)), "or"),
        (((0, 1), (1, 1), (2, 1)), "or"),
        (((0, 2), (2, 5)), "and"),
    ],
)
def test_planted_neurons_are_found(planted: tuple[tuple[int, int], ...], rule: str) -> None:
    pipe: Any = PlantedPipeline(planted, rule=rule)
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    (result,) = localize(pipe, [MEMORIZED], statistics, GRADIENT, row=ROW)
    found = {(layer, index) for layer, chosen in enumerate(result.refined) for index in chosen}
    assert found == set(planted) if rule == "or" else len(found) == 1 and found <= set(planted)
    assert (result.cost.sample_backwards, result.is_replaced) == (1, False)


def test_planted_neurons_rank_at_the_top_without_any_statistics() -> None:
    planted = ((0, 2), (2, 5))
    pipe: Any = PlantedPipeline(planted, rule="and")
    sites = find_sites(pipe, row=ROW)
    passes = first_step(pipe, MEMORIZED, sites, GRADIENT)
    slopes = passes.slopes(0, passes.maps([(0, frozenset())])[0])
    nothing = [torch.zeros(site.width) for site in sites]
    assert slope_order(slopes, nothing)[0] == planted[1]  # "and" hangs on the weaker one
    assert (passes.cost.sample_forwards_run, passes.cost.sample_backwards) == (1 + 3, 1)


@pytest.mark.parametrize("kind", ["sd1", "sd3"])
def test_slopes_equal_differences_and_leave_nothing_behind(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    sites = find_sites(pipe)
    denoiser = pipe.unet if kind == "sd1" else pipe.transformer
    frozen = next(denoiser.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in denoiser.parameters()]
    passes = first_step(pipe, "a red cat", sites, GRADIENT)
    plain = passes.maps([(0, frozenset())])
    slopes = passes.slopes(0, plain[0])
    assert [parameter.requires_grad for parameter in denoiser.parameters()] == flags
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    gc.collect()
    kept = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.grad_fn is not None]
    assert not kept
    largest = max(range(len(sites)), key=lambda i: float(slopes[i].abs().max()))
    for index in slopes[largest].abs().topk(3).indices.tolist():
        expected = _difference(passes, plain, largest, index)
        assert float(slopes[largest][index]) == pytest.approx(expected, rel=0.05, abs=1e-6)


def _difference(passes: Passes, plain: torch.Tensor, layer: int, index: int, step: float = 0.05) -> float:
    """The literal definition: move one neuron up and down and see how the correlation moves."""
    scores = []
    for sign in (1, -1):
        gates = {site: torch.full((1, site.width), 0.5) for site in passes.sites}
        gates[passes.sites[layer]][0, index] += sign * step
        prediction = passes.call.predict([0], step_idx=1, gates=gates)[-1]
        maps = passes.call.clean_direction(prediction, [0], step_idx=1)
        scores.append(float(correlation(maps.double(), plain.double())))
    return (scores[0] - scores[1]) / (2 * step)


def test_without_memory_for_it_the_order_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = PlantedPipeline(((1, 3),))
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Passes, "slopes", full)
    with pytest.warns(UnmemorizeWarning, match="out of memory in the backward pass"):
        (result,) = localize(pipe, [MEMORIZED], statistics, GRADIENT, row=ROW)
    assert result.refined == ((), (3,), ())


def test_correlation_does_not_depend_on_the_scale_of_a_channel() -> None:
    maps = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    moved = maps * torch.tensor([2.0, 0.1, 30.0]).view(1, 3, 1, 1) + 5
    assert correlation(maps, moved).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert correlation(maps, -moved).tolist() == pytest.approx([-1.0, -1.0], abs=1e-5)
    assert abs(float(correlation(maps[:1], maps[1:]))) < 0.5
    assert correlation(maps, torch.ones_like(maps)).abs().max() == 0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected unusual or gradient"):
        NemoSettings(ranking="random")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="level between 0 and 1"):
        NemoSettings(ranking="gradient", gradient_level=1.0)
    with pytest.raises(ConfigError, match="orders fast mode's candidates; mode is compat"):
        NemoSettings(ranking="gradient", mode="compat")
