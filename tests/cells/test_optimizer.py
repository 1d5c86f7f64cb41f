"""Sinks that received no gradient are bit-identical after a step, whatever the optimizer remembers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import WIDTH, tiny_model, tokens
from unmemorize.errors import ConfigError
from unmemorize.isolate.language import plan_sinks, training_sinks
from unmemorize.isolate.optimizer import isolated_optimizer, pool_slices
from unmemorize.isolate.plan import SinkPlan, SinkSettings
from unmemorize.models.language import find_mlps

TOKENS = tokens(2, 6)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW loop": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
}


def planned(family: str = "llama", **settings: Any) -> tuple[Any, SinkPlan]:
    model = tiny_model(family)
    return model, plan_sinks(
        model, SinkSettings(share_frac=0.5, active_frac=None, sinks_per_id=4, **settings)
    )


def train(model: Any, plan: SinkPlan, optimizer: torch.optim.Optimizer, ids: Tensor, **loss: Any) -> None:
    optimizer.zero_grad()
    with training_sinks(model, plan):
        model(input_ids=TOKENS, labels=TOKENS, sink_ids=ids, use_cache=False).loss.backward()
    optimizer.step()


def rows_of(model: Any, tensors: dict[str, Tensor], neurons: dict[int, list[int]]) -> list[Tensor]:
    """Slices of tensors shaped like the MLP parameters, for neurons by layer."""
    names = {id(p): name for name, p in model.named_parameters()}
    rows: list[Tensor] = []
    for layer, mlp in enumerate(find_mlps(model)):
        chosen = neurons[layer]
        is_transposed = type(mlp.down).__name__ == "Conv1D"
        for linear in mlp.up:
            weight = tensors[names[id(linear.weight)]]
            matrix = weight.t() if is_transposed else weight
            rows.extend(half[chosen].clone() for half in matrix.split(WIDTH))
            if linear.bias is not None:
                rows.append(tensors[names[id(linear.bias)]][chosen].clone())
        down = tensors[names[id(mlp.down.weight)]]
        rows.append((down if is_transposed else down.t())[chosen].clone())
    return rows


def everything(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Weights and every element-wise state, by kind and parameter name."""
    named = dict(model.named_parameters())
    kinds: dict[str, dict[str, Tensor]] = {"weight": {name: p.detach() for name, p in named.items()}}
    for name, parameter in named.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                kinds.setdefault(kind, {})[name] = value
    return kinds


def unowned(model: Any, plan: SinkPlan, ids: list[int]) -> dict[int, list[int]]:
    owned = plan.neurons_for(ids)
    return {
        layer: [n for n in range(WIDTH // 2, WIDTH) if (mlp.site, n) not in owned]
        for layer, mlp in enumerate(find_mlps(model))
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_unowned_sinks_are_bit_identical_with_warm_state(family: str, name: str) -> None:
    model, plan = planned(family)
    optimizer = OPTIMIZERS[name](model.parameters())
    with isolated_optimizer(optimizer, model, plan):
        for step in range(3):
            train(model, plan, optimizer, torch.tensor([5, 9 + step]))
        others = unowned(model, plan, [77, 78])
        before = {kind: rows_of(model, t, others) for kind, t in everything(model, optimizer).items()}
        assert any((row != 0).any() for kind, rows in before.items() if kind != "weight" for row in rows)
        shared_before = [p.detach().clone() for p in model.parameters()]
        train(model, plan, optimizer, torch.tensor([77, 78]))
        after = {kind: rows_of(model, t, others) for kind, t in everything(model, optimizer).items()}
    for kind, rows in before.items():
        assert all(torch.equal(a, b) for a, b in zip(rows, after[kind], strict=True)), kind
    assert all(not torch.equal(a, b) for a, b in zip(shared_before, model.parameters(), strict=True))


def test_without_the_block_they_move() -> None:
    model, plan = planned()
    optimizer = OPTIMIZERS["AdamW loop"](model.parameters())
    for _ in range(2):
        train(model, plan, optimizer, torch.tensor([5, 9]))
    others = unowned(model, plan, [77, 78])
    before = rows_of(model, everything(model, optimizer)["weight"], others)
    train(model, plan, optimizer, torch.tensor([77, 78]))
    after = rows_of(model, everything(model, optimizer)["weight"], others)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_everything_else_moves_as_without_the_block(name: str) -> None:
    results: list[dict[str, dict[str, Tensor]]] = []
    owned: dict[int, list[int]] = {}
    for is_isolated in (False, True):
        model, plan = planned()
        optimizer = OPTIMIZERS[name](model.parameters())
        if is_isolated:
            with isolated_optimizer(optimizer, model, plan):
                for _ in range(3):
                    train(model, plan, optimizer, torch.tensor([5, 9]))
        else:
            for _ in range(3):
                train(model, plan, optimizer, torch.tensor([5, 9]))
        others = unowned(model, plan, [5, 9])
        owned = {layer: [n for n in range(WIDTH) if n not in chosen] for layer, chosen in others.items()}
        results.append(
            {
                kind: {name: tensor.clone() for name, tensor in tensors.items()}
                for kind, tensors in everything(model, optimizer).items()
            }
        )
    for kind, tensors in results[0].items():
        for a, b in zip(rows_of(model, tensors, owned), rows_of(model, results[1][kind], owned), strict=True):
            assert torch.equal(a, b), kind
        for parameter, tensor in tensors.items():
            if "mlp" not in parameter:
                assert torch.equal(tensor, results[1][kind][parameter])


@pytest.mark.parametrize("name", ["AdamW fused", "AdamW loop", "SGD momentum"])
@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_learning_rate_scale_is_a_learning_rate(name: str, scale: float) -> None:
    model, plan = planned()
    ids = torch.tensor([5, 9])
    optimizer = OPTIMIZERS[name](model.parameters())
    with isolated_optimizer(optimizer, model, plan, sink_learning_rate_scale=scale):
        train(model, plan, optimizer, ids)
    reference, _ = planned()
    optimizer = OPTIMIZERS[name](reference.parameters())
    for group in optimizer.param_groups:
        group["lr"] *= scale
    train(reference, plan, optimizer, ids)
    plain, _ = planned()
    train(plain, plan, OPTIMIZERS[name](plain.parameters()), ids)
    owned = plan.neurons_for(ids.tolist())
    sinks = {layer: list(owned.indices[place.site]) for layer, place in enumerate(plan.sites)}
    shared = {0: list(range(12)), 1: list(range(12))}
    for chosen, expected in ((sinks, reference), (shared, plain)):
        for a, b in zip(
            rows_of(model, dict(model.named_parameters()), chosen),
            rows_of(expected, dict(expected.named_parameters()), chosen),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_accumulation_and_clipping_keep_isolation() -> None:
    model, plan = planned(per_layer=True)
    optimizer = OPTIMIZERS["AdamW fused"](model.parameters())
    with isolated_optimizer(optimizer, model, plan), training_sinks(model, plan):
        for ids in ([5, 9], [77, 78]):
            for id in ids:
                model(
                    input_ids=TOKENS, labels=TOKENS, sink_ids=torch.tensor([id]), use_cache=False
                ).loss.backward()
            others = unowned(model, plan, ids)
            before = rows_of(model, everything(model, optimizer)["weight"], others)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
            after = rows_of(model, everything(model, optimizer)["weight"], others)
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_layers_without_sinks_and_frozen_parameters_are_left_alone() -> None:
    model, plan = planned(layers=(1,))
    assert {id(p) for p, _, _ in pool_slices(model, plan)} == {
        id(linear.weight) for linear in (*find_mlps(model)[1].up, find_mlps(model)[1].down)
    }
    find_mlps(model)[1].down.weight.requires_grad_(False)
    optimizer = OPTIMIZERS["AdamW loop"]([p for p in model.parameters() if p.requires_grad])
    frozen = find_mlps(model)[1].down.weight.clone()
    with isolated_optimizer(optimizer, model, plan):
        train(model, plan, optimizer, torch.tensor([5, 9]))
    assert torch.equal(find_mlps(model)[1].down.weight, frozen)


def test_hooks_are_gone_after_the_block() -> None:
    model, plan = planned()
    optimizer = OPTIMIZERS["SGD momentum"](model.parameters())
    with pytest.raises(RuntimeError, match="on purpose"), isolated_optimizer(optimizer, model, plan):
        raise RuntimeError("on purpose")
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scales_that_are_not_positive_are_refused(scale: float) -> None:
    model, plan = planned()
    optimizer = OPTIMIZERS["SGD momentum"](model.parameters())
    with pytest.raises(ConfigError, match=f"sink_learning_rate_scale is {scale}, expected above 0"):
        with isolated_optimizer(optimizer, model, plan, sink_learning_rate_scale=scale):
            pass


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, plan = planned()
    optimizer = OPTIMIZERS["SGD momentum"](tiny_model("llama").parameters())
    with pytest.raises(
        ConfigError, match="the optimizer holds none of this model's sinks; build it from this model"
    ):
        with isolated_optimizer(optimizer, model, plan):
            pass


def test_an_accelerated_optimizer_is_unwrapped() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, plan = planned()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, OPTIMIZERS["AdamW loop"](model.parameters()))
    model = accelerator.unwrap_model(prepared)
    with isolated_optimizer(optimizer, model, plan):
        train(model, plan, optimizer, torch.tensor([5, 9]))
        others = unowned(model, plan, [77, 78])
        before = rows_of(model, dict(model.named_parameters()), others)
        train(model, plan, optimizer, torch.tensor([77, 78]))
        after = rows_of(model, dict(model.named_parameters()), others)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
