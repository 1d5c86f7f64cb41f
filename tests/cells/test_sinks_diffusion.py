"""Sinks in text-to-image models: every kind of denoiser equals the literal loop, and nothing stays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference.gated_denoiser import GateOf, gates_of, literal_sites
from tests.tiny_diffusion import denoiser_arguments, tiny_pipeline
from unmemorize.errors import (
    ConfigError,
    IdError,
    IdsMissing,
    NeuronSetMismatch,
    ShapeMismatch,
    SitesNotFound,
)
from unmemorize.isolate.diffusion import plan_sinks, sink_state, training_sinks
from unmemorize.isolate.plan import SinkPlan, SinkSettings
from unmemorize.models.denoising import denoiser_of

DENOISERS = ("sd1", "sdxl", "pixart", "sd3", "flux")
BOTH = ("hidden", "values")
FIRST = torch.tensor([5, 2**63 - 1])
SECOND = torch.tensor([0, 9])


@cache
def made(kind: str) -> tuple[Any, dict[str, Any]]:
    pipe = tiny_pipeline(kind)
    return pipe, denoiser_arguments(pipe, 2)


def denoiser_for(kind: str) -> tuple[Any, dict[str, Any]]:
    pipe, arguments = made(kind)
    return denoiser_of(pipe), arguments


def sinks_for(model: Any, kinds: Sequence[str] = BOTH, **settings: Any) -> SinkPlan:
    return plan_sinks(model, SinkSettings(**{"share_frac": 0.5, **settings}), kinds=kinds)


def loss_of(denoiser: Any, arguments: dict[str, Any], **more: Any) -> Tensor:
    loss: Tensor = denoiser(**arguments, **more)[0].square().mean()
    return loss


def run(denoiser: Any, arguments: dict[str, Any], **more: Any) -> tuple[Tensor, list[Tensor]]:
    """Return the prediction and the gradients of all parameters."""
    denoiser.zero_grad()
    output = denoiser(**arguments, **more)[0]
    output.square().mean().backward()
    return output.detach(), gradients(denoiser)


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def literal(
    denoiser: Any, arguments: dict[str, Any], plan: SinkPlan, gate: GateOf
) -> tuple[Tensor, list[Tensor]]:
    with literal_sites(denoiser, plan, gate):
        return run(denoiser, arguments)


def assert_equal(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=5e-6, rtol=0)
    assert_close(found[1], expected[1])


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-3)


# training: against the loop


@pytest.mark.parametrize("kind", DENOISERS)
def test_training_equals_the_loop_with_and_without_checkpointing(kind: str) -> None:
    denoiser, arguments = denoiser_for(kind)
    plan = sinks_for(denoiser)
    before = set(denoiser.state_dict())
    plain = run(denoiser, arguments)[0]
    expected = [literal(denoiser, arguments, plan, gates_of(plan, ids.tolist())) for ids in (FIRST, SECOND)]
    with training_sinks(denoiser, plan):
        assert_equal(run(denoiser, arguments, sink_ids=FIRST), expected[0])
        assert set(denoiser.state_dict()) == before
    summed = [a + b for a, b in zip(expected[0][1], expected[1][1], strict=True)]
    assert not torch.allclose(plain, expected[0][0], atol=1e-4)
    runs: list[int] = []
    handle = counted(denoiser, plan, runs)
    denoiser.enable_gradient_checkpointing()
    try:
        with training_sinks(denoiser, plan):
            denoiser.zero_grad()
            first = loss_of(denoiser, arguments, sink_ids=FIRST)
            second = loss_of(denoiser, arguments, sink_ids=SECOND)
            first.backward()
            second.backward()
        assert len(runs) == 4, "the layer ran twice for each of two batches"
        assert_close(gradients(denoiser), summed)
    finally:
        handle.remove()
        denoiser.disable_gradient_checkpointing()
    assert torch.equal(run(denoiser, arguments)[0], plain), "nothing stays"


def counted(denoiser: Any, plan: SinkPlan, runs: list[int]) -> Any:
    linear = denoiser.get_submodule(plan.sites[0].site.path)
    return linear.register_forward_pre_hook(lambda *_: runs.append(1))
