"""Activation checkpointing: a layer that runs again during backward meets the sinks of its own micro-batch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from tests.tiny import FAMILIES, tiny_model, tokens
from unmemorize.errors import IdsMissing
from unmemorize.isolate.language import plan_sinks, training_sinks
from unmemorize.isolate.plan import SinkPlan, SinkSettings
from unmemorize.models.language import find_mlps

TOKENS = tokens(2, 5)
FIRST = torch.tensor([5, 9])
SECOND = torch.tensor([[7, 7, 7, 0, 0], [5, 5, 11, 11, 11]])
COMPUTES = ("masked", "gathered")
REENTRANT = (True, False)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing_enable", "ignore:.*gradient_checkpointing_disable"
)


def planned(family: str = "llama") -> tuple[Any, SinkPlan]:
    model = tiny_model(family)
    return model, plan_sinks(model, SinkSettings(share_frac=0.5))


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=TOKENS, labels=TOKENS, sink_ids=ids, use_cache=False).loss
    return loss


def plain_gradients(model: Any, plan: SinkPlan, *batches: Tensor) -> list[Tensor]:
    """Gradients without checkpointing, one batch at a time."""
    model.zero_grad()
    with training_sinks(model, plan):
        for ids in batches:
            loss_of(model, ids).backward()
    return gradients(model)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def enable(model: Any, is_reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    if is_reentrant:
        model.enable_input_require_grads()


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("is_reentrant", REENTRANT)
@pytest.mark.parametrize("family", FAMILIES)
def test_interleaved_batches_keep_their_own_sinks(family: str, is_reentrant: bool, compute: Any) -> None:
    model, plan = planned(family)
    expected = plain_gradients(model, plan, FIRST, SECOND)
    enable(model, is_reentrant)
    runs = count_runs(model)
    model.zero_grad()
    with training_sinks(model, plan, compute=compute):
        first, second = loss_of(model, FIRST), loss_of(model, SECOND)
        first.backward()
        second.backward()
    assert_close(gradients(model), expected)
    assert len(runs) == 2 * 2 * 2, "every layer runs twice for each of two batches"
    model.gradient_checkpointing_disable()
    assert_close(plain_gradients(model, plan, FIRST, SECOND), expected)


def count_runs(model: nn.Module) -> list[int]:
    runs: list[int] = []
    for mlp in find_mlps(model):
        mlp.up[0].register_forward_pre_hook(lambda *_: runs.append(1))
        if "forward" in mlp.up[0].__dict__:
            raise AssertionError
    return runs


@pytest.mark.parametrize("is_reentrant", REENTRANT)
def test_checkpointing_may_be_switched_on_and_off_inside_the_block(is_reentrant: bool) -> None:
    model, plan = planned()
    expected = plain_gradients(model, plan, FIRST)
    with training_sinks(model, plan):
        for switch in (lambda: enable(model, is_reentrant), model.gradient_checkpointing_disable) * 2:
            switch()
            model.zero_grad()
            loss_of(model, FIRST).backward()
            assert_close(gradients(model), expected)
        enable(model, is_reentrant)
        kept = find_mlps(model)[0].layer._gradient_checkpointing_func
        loss_of(model, FIRST)
    assert find_mlps(model)[0].layer._gradient_checkpointing_func is kept


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("is_reentrant", REENTRANT)
@pytest.mark.parametrize("family", FAMILIES)
def test_backward_after_the_block_raises(family: str, is_reentrant: bool, compute: Any) -> None:
    model, plan = planned(family)
    enable(model, is_reentrant)
    with training_sinks(model, plan, compute=compute):
        loss = loss_of(model, FIRST)
    with pytest.raises(IdsMissing, match="after its block was closed; call backward inside the block"):
        loss.backward()
    with training_sinks(model, plan, compute=compute):
        loss = loss_of(model, FIRST)
    with training_sinks(model, plan, compute=compute):
        loss_of(model, SECOND)
        with pytest.raises(IdsMissing, match="call backward inside the block"):
            loss.backward()


def test_backward_after_the_block_without_checkpointing_is_right() -> None:
    model, plan = planned()
    expected = plain_gradients(model, plan, FIRST)
    for compute in COMPUTES:
        model.zero_grad()
        with training_sinks(model, plan, compute=compute):
            loss = loss_of(model, FIRST)
        loss.backward()
        assert_close(gradients(model), expected)


# torch's own wrapper around the layers


def wrap_layers(model: nn.Module, is_reentrant: bool) -> None:
    layers = {id(mlp.layer) for mlp in find_mlps(model)}
    kind = CheckpointImpl.REENTRANT if is_reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=kind),
        check_fn=lambda module: id(module) in layers,
    )
    assert sum(isinstance(module, CheckpointWrapper) for module in model.modules()) == 2


@pytest.mark.parametrize("order", ["wrapped before", "wrapped inside"])
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("is_reentrant", REENTRANT)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "opt"])
def test_wrapped_layers_keep_their_own_sinks(
    family: str, is_reentrant: bool, compute: Any, order: str
) -> None:
    model, plan = planned(family)
    expected = plain_gradients(model, plan, FIRST, SECOND)
    model.zero_grad()
    if is_reentrant:
        model.enable_input_require_grads()
    if order == "wrapped before":
        wrap_layers(model, is_reentrant)
    with training_sinks(model, plan, compute=compute):
        if order == "wrapped inside":
            wrap_layers(model, is_reentrant)
        first, second = loss_of(model, FIRST), loss_of(model, SECOND)
        if family == "gpt_neo" and order == "wrapped inside":
            # Its model drops keyword arguments, so a wrapper put on later has nothing to repeat.
            with pytest.raises(IdsMissing, match="outside a call of its model"):
                first.backward()
            return
        first.backward()
        second.backward()
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("is_reentrant", REENTRANT)
def test_backward_through_wrapped_layers_after_the_block_raises(is_reentrant: bool, compute: Any) -> None:
    model, plan = planned()
    if is_reentrant:
        model.enable_input_require_grads()
    wrap_layers(model, is_reentrant)
    with training_sinks(model, plan, compute=compute):
        loss = loss_of(model, FIRST)
    with pytest.raises(IdsMissing, match="call backward inside the block"):
        loss.backward()


# the whole model as one checkpoint


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("is_reentrant", REENTRANT)
@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_the_whole_model_may_be_one_checkpoint(family: str, is_reentrant: bool, compute: Any) -> None:
    model, plan = planned(family)
    expected = plain_gradients(model, plan, FIRST, SECOND)
    model.zero_grad()

    def loss(ids: Tensor) -> Tensor:
        handle = torch.ones((), requires_grad=True)
        out: Tensor = checkpoint(
            lambda one: one * loss_of(model, ids),
            handle,
            use_reentrant=is_reentrant,
            preserve_rng_state=False,
        )
        return out

    with training_sinks(model, plan, compute=compute):
        first, second = loss(FIRST), loss(SECOND)
        first.backward()
        second.backward()
    assert_close(gradients(model), expected)
