"""Compiled models compute what eager ones compute, with changing ids, and are not compiled again for each batch.

The backend aot_eager captures the same graphs as the default one and needs no compiler of C++.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_model, tokens
from tests.tiny_diffusion import denoiser_arguments, tiny_pipeline
from unmemorize.isolate import diffusion
from unmemorize.isolate.language import plan_sinks, sink_state, training_sinks
from unmemorize.isolate.plan import SinkPlan, SinkSettings
from unmemorize.models.denoising import denoiser_of
from unmemorize.models.language import find_mlps

TOKENS = tokens(2, 6)
BY_ROW = (torch.tensor([5, 9]), torch.tensor([77, 0]), torch.tensor([9, 5]))
BY_TOKEN = (
    torch.tensor([[5, 5, 5, 9, 9, 0], [7, 7, 7, 7, 7, 7]]),
    torch.tensor([[8, 8, 2, 2, 0, 0], [1, 1, 1, 3, 3, 3]]),
)

pytestmark = pytest.mark.filterwarnings("default")  # the compiler's own deprecations are not ours


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def planned(family: str) -> tuple[Any, SinkPlan]:
    model = tiny_model(family)
    return model, plan_sinks(model, SinkSettings(share_frac=0.5))


def run(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    output = model(input_ids=TOKENS, labels=TOKENS, sink_ids=ids, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), [p.grad.clone() for p in model.parameters()]


def compare(model: Any, compiled: Any, ids: Tensor, atol: float = 1e-6) -> None:
    expected, found = run(model, ids), run(compiled, ids)
    torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=1e-4)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("family", "compute"),
    [("llama", "masked"), ("llama", "gathered"), pytest.param("gpt2", "masked", marks=pytest.mark.slow)],
)
def test_compiled_training_follows_the_ids_of_each_batch(family: str, compute: Any) -> None:
    model, plan = planned(family)
    compiled = torch.compile(model, backend="aot_eager")
    with training_sinks(model, plan, compute=compute):
        for ids in BY_ROW:
            compare(model, compiled, ids)
        before = num_graphs()
        for ids in BY_ROW:
            compare(model, compiled, ids + 1000)
        assert num_graphs() == before
        if family == "llama" and compute == "masked":
            for ids in BY_TOKEN:
                compare(model, compiled, ids)


def test_a_compiled_model_notices_blocks_opening_and_closing() -> None:
    model, plan = planned("llama")
    model.eval()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        plain = model(TOKENS).logits
        for state in ("own", "off"):
            torch.testing.assert_close(compiled(TOKENS).logits, plain, atol=1e-6, rtol=0)
            with sink_state(model, plan, state, ids=BY_ROW[0]):
                expected = model(TOKENS).logits
                assert not torch.allclose(expected, plain, atol=1e-5)
                torch.testing.assert_close(compiled(TOKENS).logits, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(compiled(TOKENS).logits, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("compute", ["masked", pytest.param("gathered", marks=pytest.mark.slow)])
def test_layers_compiled_one_by_one(compute: Any) -> None:
    model, plan = planned("llama")
    with training_sinks(model, plan, compute=compute):
        expected = [run(model, ids) for ids in BY_ROW]
    for mlp in find_mlps(model):
        mlp.layer.compile(backend="aot_eager")
    with training_sinks(model, plan, compute=compute):
        for ids, (logits, gradients) in zip(BY_ROW, expected, strict=True):
            found = run(model, ids)
            torch.testing.assert_close(found[0], logits, atol=1e-6, rtol=1e-4)
            for ours, theirs in zip(found[1], gradients, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("pixart", "aot_eager"),
        pytest.param("sd1", "aot_eager", marks=pytest.mark.slow),
        pytest.param("pixart", "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_denoiser_follows_ids_and_states(kind: str, backend: str) -> None:
    if backend == "inductor" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("there is no compiler of C++, which inductor needs on the CPU")
    pipe = diffusion.grow(tiny_pipeline(kind), 6)
    settings = SinkSettings(share_frac=0.5, grown=6, active_frac=None, sinks_per_id=8)
    plan, denoiser = diffusion.plan_sinks(pipe, settings), denoiser_of(pipe)
    arguments = denoiser_arguments(pipe, 2)

    def trained(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        denoiser.zero_grad()
        output = model(**arguments, sink_ids=ids)[0]
        output.square().mean().backward()
        return output.detach(), [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]

    def equal(ids: Tensor) -> None:
        expected, found = trained(denoiser, ids), trained(compiled, ids)
        torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-4)
        for ours, theirs in zip(found[1], expected[1], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)

    compiled = torch.compile(denoiser, backend=backend)
    denoiser.train()
    with diffusion.training_sinks(pipe, plan):
        equal(BY_ROW[0])
        before = num_graphs()
        for ids in (BY_ROW[1], BY_ROW[2] + 1000):
            equal(ids)
        assert num_graphs() == before
    denoiser.eval()
    seen = []
    with torch.no_grad():
        plain = denoiser(**arguments)[0]
        for state in ("off", "own"):
            with diffusion.sink_state(pipe, plan, state, ids=BY_ROW[0]):
                seen.append(denoiser(**arguments)[0])
                torch.testing.assert_close(compiled(**arguments)[0], seen[-1], atol=1e-6, rtol=0)
        assert not any(torch.allclose(one, other, atol=1e-5) for one, other in ((plain, seen[0]), seen))
        torch.testing.assert_close(compiled(**arguments)[0], plain, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["masked", "gathered"])
@pytest.mark.timeout(600)
def test_inductor(compute: Any) -> None:
    model, plan = planned("llama")
    compiled = torch.compile(model)
    with training_sinks(model, plan, compute=compute):
        for ids in (BY_ROW[0], BY_ROW[1], BY_TOKEN[0]):
            compare(model, compiled, ids, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["masked", "gathered"])
@pytest.mark.parametrize("is_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_compiled_and_checkpointed(is_reentrant: bool, compute: Any) -> None:
    model, plan = planned("llama")
    with training_sinks(model, plan, compute=compute):
        expected = [run(model, ids) for ids in BY_ROW]
    model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    if is_reentrant:
        model.enable_input_require_grads()
    compiled = torch.compile(model, backend="aot_eager")
    with training_sinks(model, plan, compute=compute):
        for ids, (logits, gradients) in zip(BY_ROW, expected, strict=True):
            found = run(compiled, ids)
            torch.testing.assert_close(found[0], logits, atol=1e-6, rtol=1e-4)
            for ours, theirs in zip(found[1], gradients, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
