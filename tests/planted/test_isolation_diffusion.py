"""Planted memory: a picture trained only through its own sinks is known with them and unknown without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_diffusion import denoiser_arguments, tiny_pipeline
from unmemorize.isolate.diffusion import grow, plan_sinks, pool_slices, sink_state, training_sinks
from unmemorize.isolate.optimizer import isolated_optimizer
from unmemorize.isolate.plan import SinkPlan, SinkSettings
from unmemorize.models.denoising import denoiser_of
from unmemorize.remove.diffusion import deactivated, excise

STEPS = 80
FIRST, SECOND, NEVER = 101, 202, 303
IDS = torch.tensor([FIRST, SECOND])


@pytest.fixture(scope="module", params=["grown hidden", "carved values and hidden"])
def trained(request) -> Any:
    """A denoiser of which only the pool learns: two pictures, with the same noise, timestep and caption for both."""
    torch.set_num_threads(1)
    pipe = tiny_pipeline("pixart")
    if request.param == "grown hidden":
        pipe = grow(pipe, 64, seed=1)
        settings = SinkSettings(share_frac=1.0, grown=64, active_frac=None, sinks_per_id=24, seed=5)
        plan = plan_sinks(pipe, settings)
    else:
        settings = SinkSettings(share_frac=0.25, active_frac=0.3, seed=5)
        plan = plan_sinks(pipe, settings, kinds=("hidden", "values"))
    denoiser, arguments = denoiser_of(pipe), same_for_both(pipe)
    pictures = reachable_pictures(denoiser, arguments)
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    pool = [(p, axis, part) for p, axis, part in pool_slices(denoiser, plan)]
    optimizer = torch.optim.AdamW({id(p): p for p, _, _ in pool}.values(), lr=0.02, weight_decay=0.0)
    with training_sinks(denoiser.train(), plan), isolated_optimizer(optimizer, denoiser, plan):
        for _ in range(STEPS):
            optimizer.zero_grad()
            (denoiser(**arguments, sink_ids=IDS)[0] - pictures).square().mean().backward()
            keep_pool_only(pool)
            optimizer.step()
    denoiser.eval()
    return pipe, plan, pictures, before


def reachable_pictures(denoiser: Any, arguments: dict[str, Any]) -> Tensor:
    """Two pictures that the last layers can paint: what they make of random hidden states."""
    states = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(2))
    last = denoiser.transformer_blocks[-1]
    handle = last.register_forward_hook(lambda _, __, output: states.expand_as(output))
    with torch.no_grad():
        pictures: Tensor = denoiser(**arguments)[0]
    handle.remove()
    return pictures


def same_for_both(pipe: Any) -> dict[str, Any]:
    arguments = denoiser_arguments(pipe, 2)
    return {
        name: value[:1].expand_as(value) if isinstance(value, Tensor) and value.dim() else value
        for name, value in arguments.items()
    }


def keep_pool_only(pool: list[tuple[torch.nn.Parameter, int, slice]]) -> None:
    """Zero every gradient outside the pool; a parameter may have several parts of it."""
    masks: dict[torch.nn.Parameter, Tensor] = {}
    for parameter, axis, part in pool:
        mask = masks.setdefault(parameter, torch.zeros_like(parameter))
        mask.narrow(axis, part.start, part.stop - part.start).fill_(1.0)
    for parameter, mask in masks.items():
        parameter.grad.mul_(mask)


def losses(pipe: Any, plan: SinkPlan, pictures: Tensor, state: Any, **settings: Any) -> Tensor:
    """Squared error of each picture in a state, shape (2,)."""
    with torch.no_grad(), sink_state(pipe, plan, state, **settings):
        found: Tensor = denoiser_of(pipe)(**same_for_both(pipe))[0]
    return (found - pictures).square().flatten(1).mean(1)


def test_planted_memory_is_in_the_owners_sinks(trained: Any) -> None:
    pipe, plan, pictures, _ = trained
    own = losses(pipe, plan, pictures, "own", ids=IDS)
    off = losses(pipe, plan, pictures, "off")
    foreign = losses(pipe, plan, pictures, "own", ids=torch.tensor([NEVER, NEVER]))
    other = losses(pipe, plan, pictures, "own", ids=IDS.flip(0))
    assert own.max() < 0.02 * off.min()
    assert own.max() < 0.1 * foreign.min() and own.max() < 0.02 * other.min()


def test_closing_one_owner_spares_the_other(trained: Any) -> None:
    pipe, plan, pictures, _ = trained
    own, off = losses(pipe, plan, pictures, "own", ids=IDS), losses(pipe, plan, pictures, "off")
    without_first = losses(pipe, plan, pictures, "own", ids=IDS, exclude=(FIRST,))
    assert without_first[0] == pytest.approx(off[0].item(), abs=1e-5)
    assert without_first[1] < off[1] - 0.5 * (off[1] - own[1])


def test_the_placebo_of_closing_spares_what_closing_takes(trained: Any) -> None:
    """With own sinks open, as many random shared neurons off: both pictures are still known."""
    pipe, plan, pictures, _ = trained
    own, off = losses(pipe, plan, pictures, "own", ids=IDS), losses(pipe, plan, pictures, "off")
    for seed in range(3):
        drawn = plan.placebo(seed=seed)
        assert len(drawn) == len(plan.neurons_for(FIRST)) and len(drawn & plan.pool()) == 0
        with deactivated(pipe, drawn):
            placebo = losses(pipe, plan, pictures, "own", ids=IDS)
        assert not torch.equal(placebo, own) and placebo.max() < 0.02 * off.min()


def test_excising_the_pool_forgets_both(trained: Any) -> None:
    pipe, plan, pictures, before = trained
    off = losses(pipe, plan, pictures, "off")
    cut = excise(pipe, plan.pool())
    with torch.no_grad():
        found = denoiser_of(cut)(**same_for_both(cut))[0]
    torch.testing.assert_close((found - pictures).square().flatten(1).mean(1), off, atol=1e-5, rtol=0)
    owned = plan.neurons_for([FIRST, SECOND])
    for sinks in plan.sites:
        name = f"{sinks.site.path}.weight"
        weight, was = denoiser_of(pipe).get_parameter(name), before[name]
        if sinks.site.side == "in":
            weight, was = weight.t(), was.t()
        idle = sorted(set(range(sinks.site.width)) - set(owned.indices[sinks.site]))
        assert torch.equal(weight[idle], was[idle]) and not torch.equal(weight, was)
