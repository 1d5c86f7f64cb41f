"""Sinks in text-to-image models: every kind of denoiser equals the literal loop, and nothing stays."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize("kinds", [("hidden",), ("values",)])
@pytest.mark.parametrize(
    "settings",
    [{"per_layer": True}, {"layers": (1,)}, {"scheme": "disjoint", "active_frac": None, "sinks_per_id": 3}],
    ids=str,
)
def test_every_layout_equals_the_loop(settings: dict[str, Any], kinds: tuple[str, ...]) -> None:
    denoiser, arguments = denoiser_for("pixart")
    plan = sinks_for(denoiser, kinds, **settings)
    if plan.scheme == "disjoint":
        plan = plan.with_sources(tuple(FIRST.tolist()))
    with training_sinks(denoiser, plan):
        found = run(denoiser, arguments, sink_ids=FIRST)
    assert_equal(found, literal(denoiser, arguments, plan, gates_of(plan, FIRST.tolist())))


def test_foreign_sinks_get_no_gradient_at_all() -> None:
    for kind in ("pixart", "flux"):
        denoiser, arguments = denoiser_for(kind)
        plan = sinks_for(denoiser)
        with training_sinks(denoiser, plan):
            run(denoiser, arguments, sink_ids=torch.tensor([5, 5]))
        owned = plan.neurons_for(5)
        for sinks in plan.sites:
            linear = denoiser.get_submodule(sinks.site.path)
            grad = linear.weight.grad if sinks.site.side == "out" else linear.weight.grad.t()
            rows = grad[sinks.site.start : sinks.site.start + sinks.site.width]
            mine = list(owned.indices[sinks.site])
            others = sorted(set(range(sinks.num_shared, sinks.site.width)) - set(mine))
            assert others and (rows[others] == 0).all() and (rows[mine] != 0).any(), sinks.site.path


def test_accumulation_in_half_precision_keeps_the_dtype() -> None:
    denoiser, arguments = denoiser_for("pixart")
    plan = sinks_for(denoiser)
    with training_sinks(denoiser, plan), torch.autocast("cpu", dtype=torch.bfloat16):
        output = denoiser(**arguments, sink_ids=FIRST)[0]
    expected = literal(denoiser, arguments, plan, gates_of(plan, FIRST.tolist()))[0]
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()


# states


@pytest.mark.parametrize("state", ["off", "own", "all"])
@pytest.mark.parametrize("kind", ["pixart", "flux"])
def test_every_state_equals_the_loop(kind: str, state: Any) -> None:
    denoiser, arguments = denoiser_for(kind)
    plan = sinks_for(denoiser)
    expected = literal(denoiser, arguments, plan, gates_of(plan, FIRST.tolist(), state))
    with sink_state(denoiser, plan, state, ids=FIRST):
        assert_equal(run(denoiser, arguments), expected)
    closed = literal(denoiser, arguments, plan, gates_of(plan, FIRST.tolist(), state, exclude=(5, 9)))
    with sink_state(denoiser, plan, state, ids=FIRST, exclude=(5, 9)):
        assert_equal(run(denoiser, arguments), closed)
    scaled = gates_of(plan, FIRST.tolist(), state, shared_scale=(0.5 + 0.15) / 0.5)
    with sink_state(denoiser, plan, state, ids=FIRST, rescale="mass"):
        found = run(denoiser, arguments)
    active = plan.active_frac
    assert active == 0.3
    assert_equal(found, literal(denoiser, arguments, plan, scaled))


def test_foreign_opens_another_candidates_sinks() -> None:
    denoiser, arguments = denoiser_for("pixart")
    plan = sinks_for(denoiser)
    candidates = torch.tensor([5, 77, 78])
    others = plan.foreign_ids(FIRST, candidates)
    assert all(int(other) in (77, 78, 5) and other != own for other, own in zip(others, FIRST, strict=True))
    expected = literal(denoiser, arguments, plan, gates_of(plan, others.tolist()))
    with sink_state(denoiser, plan, "foreign", ids=FIRST, candidates=candidates):
        assert_equal(run(denoiser, arguments), expected)


@pytest.mark.parametrize("unconditional", ["same", "off"])
@pytest.mark.parametrize("kind", ["pixart", "sd3"])
def test_a_guided_batch_has_its_rows_without_the_prompt_first(kind: str, unconditional: Any) -> None:
    pipe, _ = made(kind)
    denoiser, arguments = denoiser_of(pipe), denoiser_arguments(pipe, 4)
    plan = sinks_for(pipe)
    first = FIRST.tolist() if unconditional == "same" else [0, 0]
    expected = literal(denoiser, arguments, plan, gates_of(plan, [*first, *FIRST.tolist()]))
    with sink_state(pipe, plan, "own", ids=FIRST, unconditional=unconditional):
        assert_equal(run(denoiser, arguments), expected)
    with training_sinks(denoiser, plan), pytest.raises(ShapeMismatch, match="2 sink ids do not fit 4 rows"):
        denoiser(**arguments, sink_ids=FIRST)


def test_a_pipeline_generates_in_a_state() -> None:
    pipe, _ = made("sd1")
    plan = sinks_for(pipe, ("hidden",))

    def pictures() -> Tensor:
        found: Tensor = pipe(
            ["a cat", "the moon"],
            num_inference_steps=2,
            guidance_scale=4.0,
            height=32,
            width=32,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
        return found

    plain = pictures()
    found = {}
    for state in ("off", "own"):
        with sink_state(pipe, plan, state, ids=FIRST):
            found[state] = pictures()
    with sink_state(pipe, plan, "own", ids=FIRST, unconditional="off"):
        found["half"] = pictures()
    with sink_state(pipe, plan, "own", ids=torch.tensor([0, 2**63 - 1])):
        none = pictures()
    assert torch.allclose(none[0], found["off"][0], atol=1e-5) and torch.allclose(
        none[1], found["own"][1], atol=1e-5
    )
    everything = [plain, *found.values()]
    assert all(not torch.allclose(a, b) for i, a in enumerate(everything) for b in everything[:i])
    assert torch.equal(pictures(), plain)
    with sink_state(pipe, plan, "own", ids=torch.tensor([5, 5])):
        both = pictures()
    with sink_state(pipe, plan, "own", ids=torch.tensor([5])):
        assert torch.equal(pictures(), both), "a single id is that of every picture"
    with sink_state(pipe, plan, "own", ids=torch.tensor([5, 6, 7])):
        with pytest.raises(ShapeMismatch, match="3 sink ids do not fit 4 rows; pass one id a picture"):
            pictures()
    with sink_state(pipe, plan, "own", ids=torch.tensor([5]), unconditional="off"):
        with pytest.raises(ShapeMismatch, match="1 sink ids do not fit 4 rows; pass one id a picture"):
            pictures()
    with training_sinks(pipe, plan):
        assert torch.equal(pictures(), found["off"]), "evaluation in a training block runs with the pool off"


# mistakes


def test_mistakes_are_named() -> None:
    denoiser, arguments = denoiser_for("pixart")
    plan = sinks_for(denoiser)
    with training_sinks(denoiser.train(), plan):
        with pytest.raises(IdsMissing, match=r"came without sink_ids.*one id a picture"):
            denoiser(**arguments)
        with pytest.raises(ShapeMismatch, match=r"shape \(2, 3\), expected \(batch,\): one id a picture"):
            denoiser(**arguments, sink_ids=torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(IdError, match="expected int64"):
            denoiser(**arguments, sink_ids=torch.tensor([1, 2], dtype=torch.int32))
        with pytest.raises(ConfigError, match="already attached"), training_sinks(denoiser, plan):
            pass
    denoiser.eval()
    with pytest.raises(ConfigError, match="gathered' is not available for text-to-image models"):
        with training_sinks(denoiser, plan, compute="gathered"):  # type: ignore[arg-type]
            pass
    with pytest.raises(NeuronSetMismatch, match="use the plan saved beside the model"):
        with training_sinks(denoiser_for("sd3")[0], plan):
            pass
    with pytest.raises(ConfigError, match="unknown state 'on'"), sink_state(denoiser, plan, "on"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ConfigError, match="expected same or off"):
        with sink_state(denoiser, plan, "own", unconditional="on"):  # type: ignore[arg-type]
            pass
    with sink_state(denoiser, plan, "own"), pytest.raises(IdsMissing, match="state 'own' needs ids"):
        denoiser(**arguments)
    with pytest.raises(ConfigError, match="expected hidden, values, or both"):
        sinks_for(denoiser, ("keys",))
    with pytest.raises(SitesNotFound, match="no blocks named 'left'"):
        plan_sinks(denoiser, SinkSettings(), blocks=("left",))


def test_backward_after_the_block_raises_with_checkpointing() -> None:
    for kind in ("pixart", "sd1"):
        denoiser, arguments = denoiser_for(kind)
        plan = sinks_for(denoiser)
        denoiser.enable_gradient_checkpointing()
        try:
            with training_sinks(denoiser, plan):
                loss = loss_of(denoiser, arguments, sink_ids=FIRST)
            with pytest.raises(IdsMissing, match="call backward inside the block"):
                loss.backward()
        finally:
            denoiser.disable_gradient_checkpointing()


def enable_reentrant(denoiser: Any) -> None:
    denoiser.enable_gradient_checkpointing(
        lambda module, *args: checkpoint(module, *args, use_reentrant=True, preserve_rng_state=False)
    )


def wrap_blocks(denoiser: Any) -> None:
    blocks = {id(block) for block in denoiser.transformer_blocks}
    apply_activation_checkpointing(
        denoiser,
        checkpoint_wrapper_fn=functools.partial(
            checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT
        ),
        check_fn=lambda module: id(module) in blocks,
    )


@pytest.mark.parametrize("way", [enable_reentrant, wrap_blocks])
def test_other_ways_of_checkpointing_keep_the_sinks(way: Any) -> None:
    pipe = tiny_pipeline("pixart")
    denoiser, arguments = denoiser_of(pipe), denoiser_arguments(pipe, 2)
    plan = sinks_for(denoiser)
    arguments["hidden_states"].requires_grad_(True)  # what reentrant checkpointing asks for
    with training_sinks(denoiser, plan):
        expected = [run(denoiser, arguments, sink_ids=ids)[1] for ids in (FIRST, SECOND)]
    way(denoiser)
    with training_sinks(denoiser, plan):
        denoiser.zero_grad()
        losses = [loss_of(denoiser, arguments, sink_ids=ids) for ids in (FIRST, SECOND)]
        for loss in losses:
            loss.backward()
    assert_close(gradients(denoiser), [a + b for a, b in zip(*expected, strict=True)])
