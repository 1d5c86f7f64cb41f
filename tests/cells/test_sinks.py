"""Sinks in language models: every state, both computes and every family equal the literal loop, and nothing stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference.masked_mlp import GateOf, gate_of, literal_mlps
from tests.tiny import FAMILIES, WIDTH, tiny_model, tokens
from unmemorize.errors import (
    ConfigError,
    IdError,
    IdsMissing,
    NeuronSetMismatch,
    ShapeMismatch,
    UnmemorizeError,
)
from unmemorize.gates import capture, closed, gated
from unmemorize.isolate.language import grow, plan_sinks, sink_state, training_sinks
from unmemorize.isolate.plan import SinkPlan, SinkSettings
from unmemorize.isolate.states import rescale_factor
from unmemorize.models.language import find_mlps, resized

BATCH, LENGTH = 2, 5
TOKENS = tokens(BATCH, LENGTH)
BY_ROW = torch.tensor([5, 2**63 - 1])
BY_TOKEN = torch.tensor([[5, 5, 9, 9, 0], [0, 7, 5, 2**63 - 1, 7]])
COMPUTES = ("masked", "gathered")


def sinks_for(model: nn.Module, **settings: Any) -> SinkPlan:
    if "sinks_per_id" in settings:
        settings["active_frac"] = None
    return plan_sinks(model, SinkSettings(**{"share_frac": 0.5, **settings}))


def run(model: Any, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """Return logits and the gradients of all parameters."""
    model.zero_grad()
    output = model(input_ids=TOKENS, labels=TOKENS, use_cache=False, **inputs)
    output.loss.backward()
    return output.logits.detach(), gradients(model)


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def literal(model: nn.Module, gate: GateOf) -> tuple[Tensor, list[Tensor]]:
    with literal_mlps(model, (BATCH, LENGTH), gate):
        return run(model)


def assert_equal(
    found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], atol: float = 2e-6
) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=0)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


# training: against the loop


@pytest.mark.parametrize("ids", [BY_ROW, BY_TOKEN], ids=["by row", "by token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_the_loop(family: str, ids: Tensor) -> None:
    model = tiny_model(family)
    plan = sinks_for(model)
    expected = literal(model, gate_of(plan, ids))
    for compute in COMPUTES:
        with training_sinks(model, plan, compute=compute):
            assert_equal(run(model, sink_ids=ids), expected)
    assert not torch.allclose(run(model)[0], expected[0], atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"per_layer": True},
        {"layers": (1,)},
        {"layers": (0,), "per_layer": True},
        {"share_frac": 0.0, "sinks_per_id": 1},
        {"active_frac": 1.0},
        {"scheme": "disjoint", "sinks_per_id": 3},
        {"scheme": "published"},
    ],
    ids=str,
)
def test_every_layout_equals_the_loop(settings: dict[str, Any]) -> None:
    model = tiny_model("llama")
    plan = sinks_for(model, **settings)
    ids = BY_TOKEN
    if plan.scheme == "disjoint":
        plan = plan.with_sources((9, 2**63 - 1, 7, 5))
    elif plan.scheme == "published":
        ids = BY_TOKEN.clamp(max=12_345)
    expected = literal(model, gate_of(plan, ids))
    for compute in COMPUTES if plan.has_exact_count else COMPUTES[:1]:
        with training_sinks(model, plan, compute=compute):
            assert_equal(run(model, sink_ids=ids), expected)


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_grown_pool_equals_the_loop(compute: Any) -> None:
    model = grow(tiny_model("phi3"), 16)
    with torch.no_grad():
        for mlp in find_mlps(model):
            mlp.down.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    plan = plan_sinks(model, SinkSettings(share_frac=1.0, grown=16, active_frac=None, sinks_per_id=4))
    assert plan.sites[0].num_shared == WIDTH
    expected = literal(model, gate_of(plan, BY_TOKEN))
    with training_sinks(model, plan, compute=compute):
        assert_equal(run(model, sink_ids=BY_TOKEN), expected)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_foreign_sinks_get_no_gradient_at_all(family: str, compute: Any) -> None:
    model = tiny_model(family)
    plan = sinks_for(model, sinks_per_id=3)
    with training_sinks(model, plan, compute=compute):
        run(model, sink_ids=BY_ROW)
    owned = plan.neurons_for(BY_ROW.tolist())
    for mlp in find_mlps(model):
        unowned = [n for n in range(WIDTH) if (mlp.site, n) not in owned and n >= WIDTH // 2]
        is_transposed = type(mlp.down).__name__ == "Conv1D"
        down = mlp.down.weight.grad if is_transposed else mlp.down.weight.grad.t()
        assert (down[unowned] == 0).all() and (down[list(owned.indices[mlp.site])] != 0).any()
        for linear in mlp.up:
            rows = linear.weight.grad.t() if is_transposed else linear.weight.grad
            assert (rows.view(-1, WIDTH, rows.shape[1])[:, unowned] == 0).all()
            if linear.bias is not None:
                assert (linear.bias.grad[unowned] == 0).all()


@pytest.mark.parametrize("compute", COMPUTES)
def test_id_zero_is_the_off_state(compute: Any) -> None:
    model = tiny_model("llama")
    for scheme in ("keyed", "disjoint"):
        plan = sinks_for(model, scheme=scheme, sinks_per_id=2)
        expected = literal(model, gate_of(plan, BY_ROW, "off"))
        with training_sinks(model, plan, compute=compute):
            assert_equal(run(model, sink_ids=torch.zeros(BATCH, dtype=torch.int64)), expected)
            assert_equal(run(model, sink_ids=torch.zeros(BATCH, LENGTH, dtype=torch.int64)), expected)


@pytest.mark.parametrize("compute", COMPUTES)
def test_one_id_may_serve_the_whole_batch(compute: Any) -> None:
    model = tiny_model("llama")
    plan = sinks_for(model)
    with training_sinks(model, plan, compute=compute):
        assert_equal(run(model, sink_ids=torch.tensor([5])), run(model, sink_ids=torch.tensor([5, 5])))


@pytest.mark.parametrize("compute", COMPUTES)
def test_gradients_accumulate_over_micro_batches(compute: Any) -> None:
    model = tiny_model("llama")
    plan = sinks_for(model)
    with training_sinks(model, plan, compute=compute):
        together = run(model, sink_ids=BY_ROW)[1]
        model.zero_grad()
        losses = [
            model(input_ids=TOKENS[i : i + 1], labels=TOKENS[i : i + 1], sink_ids=BY_ROW[i : i + 1]).loss
            for i in range(BATCH)
        ]
        for loss in losses:
            (loss / BATCH).backward()
    torch.testing.assert_close(gradients(model), together, atol=1e-6, rtol=1e-4)


# states: against the loop


@pytest.mark.parametrize("ids", [BY_ROW, BY_TOKEN], ids=["by row", "by token"])
@pytest.mark.parametrize("state", ["off", "own", "all"])
@pytest.mark.parametrize("exclude", [(), (5,), (9, 2**63 - 1)])
def test_states_equal_the_loop(state: Any, ids: Tensor, exclude: tuple[int, ...]) -> None:
    for family, settings in (("llama", {}), ("gpt2", {"per_layer": True})):
        model = tiny_model(family).eval()
        plan = sinks_for(model, **settings)
        expected = literal(model, gate_of(plan, ids, state, exclude=exclude))
        flipped = literal(model, gate_of(plan, ids.flip(0), state, exclude=exclude))
        with sink_state(model, plan, state, ids=ids, exclude=exclude):
            assert_equal(run(model), expected)
            assert_equal(run(model, sink_ids=ids.flip(0)), flipped)


@pytest.mark.parametrize("ids", [BY_ROW, BY_TOKEN], ids=["by row", "by token"])
def test_foreign_opens_the_sinks_of_other_ids(ids: Tensor) -> None:
    model = tiny_model("llama").eval()
    plan = sinks_for(model)
    for candidates in (None, torch.tensor([101, 102, 5])):
        others = plan.foreign_ids(ids.reshape(-1).clamp(min=1), candidates).view_as(ids)
        expected = literal(model, gate_of(plan, torch.where(ids > 0, others, 0)))
        with sink_state(model, plan, "foreign", ids=ids, candidates=candidates):
            assert_equal(run(model), expected)


def test_all_of_a_disjoint_plan_opens_each_slice_by_the_share_of_its_owners() -> None:
    model = tiny_model("llama").eval()
    plan = sinks_for(model, scheme="disjoint", sinks_per_id=3).with_sources((7, 9))
    gate = [1.0] * 12 + [0.5] * 6 + [0.0] * 6
    expected = literal(model, lambda *_: gate)
    with sink_state(model, plan, "all"):
        assert_equal(run(model), expected)


@pytest.mark.parametrize(
    ("rescale", "factor"), [("none", 1.0), ("published", 1.3 / 0.7), ("mass", 0.79 / 0.7)]
)
def test_rescaling_multiplies_shared_neurons(rescale: Any, factor: float) -> None:
    model = tiny_model("llama", intermediate_size=40).eval()
    plan = plan_sinks(model, SinkSettings(share_frac=0.7, active_frac=0.3 if rescale != "published" else 0.6))
    factor = (0.7 + 0.6) / 0.7 if rescale == "published" else factor
    assert rescale_factor(plan, rescale) == pytest.approx(factor)
    expected = literal(model, gate_of(plan, BY_ROW, "off", shared_scale=factor))
    with sink_state(model, plan, "off", rescale=rescale):
        assert_equal(run(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pool_off_equals_the_narrowed_model(family: str) -> None:
    model = tiny_model(family).eval()
    plan = sinks_for(model)
    narrow = resized(model, [torch.arange(plan.sites[0].num_shared)] * 2)
    with sink_state(model, plan, "off"):
        torch.testing.assert_close(model(TOKENS).logits, narrow(TOKENS).logits, atol=1e-6, rtol=0)
    with training_sinks(model, plan):
        torch.testing.assert_close(model(TOKENS).logits, narrow(TOKENS).logits, atol=1e-6, rtol=0)


# nothing stays


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that a model computes the same bits, has the same keys, hooks and forwards afterwards."""

    def picture() -> tuple[Any, ...]:
        counts = [
            (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
            for m in model.modules()
        ]
        functions = [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
        return list(model.state_dict()), counts, functions, set(model.__dict__)

    before, bits = picture(), run(model)
    yield
    assert picture() == before
    after = run(model)
    assert torch.equal(after[0], bits[0])
    assert all(torch.equal(a, b) for a, b in zip(after[1], bits[1], strict=True))


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_behaviour_is_bit_identical_afterwards(family: str, compute: Any) -> None:
    model = tiny_model(family)
    plan = sinks_for(model)
    keys = list(model.state_dict())
    with unchanged(model):
        with training_sinks(model, plan, compute=compute):
            run(model, sink_ids=BY_ROW)
            assert list(model.state_dict()) == keys
        with sink_state(model, plan, "off"):
            run(model)
            assert list(model.state_dict()) == keys


@pytest.mark.parametrize("compute", COMPUTES)
def test_everything_is_restored_after_exceptions(compute: Any) -> None:
    model = tiny_model("llama")
    plan = sinks_for(model)
    with unchanged(model):
        with pytest.raises(RuntimeError, match="on purpose"), training_sinks(model, plan, compute=compute):
            run(model, sink_ids=BY_ROW)
            raise RuntimeError("on purpose")
        with pytest.raises(IndexError), training_sinks(model, plan, compute=compute):
            model(input_ids=torch.full((2, 3), 10_000), sink_ids=BY_ROW)
        with pytest.raises(KeyboardInterrupt), sink_state(model, plan, "off"):
            raise KeyboardInterrupt
    with training_sinks(model, plan, compute=compute):
        expected = run(model, sink_ids=BY_ROW)
        with pytest.raises(IndexError):
            model(input_ids=torch.full((2, 3), 10_000), sink_ids=BY_TOKEN)
        again = run(model, sink_ids=BY_ROW)
    assert torch.equal(again[0], expected[0])


def test_all_gates_open_is_bit_identical_to_the_plain_model() -> None:
    for family in FAMILIES:
        model = tiny_model(family)
        plan = sinks_for(model, active_frac=1.0)
        plain = run(model)
        with training_sinks(model, plan):
            found = run(model, sink_ids=BY_TOKEN.clamp(min=1))
        assert torch.equal(found[0], plain[0])
        assert all(torch.equal(a, b) for a, b in zip(found[1], plain[1], strict=True))


# mistakes


def test_training_without_ids_raises_and_evaluation_without_ids_is_off() -> None:
    model = tiny_model("llama")
    plan = sinks_for(model)
    with sink_state(model.eval(), plan, "off"):
        off = model(TOKENS).logits
    for compute in COMPUTES:
        with training_sinks(model, plan, compute=compute):
            model.train()
            with pytest.raises(
                IdsMissing, match=r"without sink_ids, .*pass sink_ids= .*remove_unused_columns=False"
            ):
                model(input_ids=TOKENS, labels=TOKENS)
            model.eval()
            torch.testing.assert_close(model(TOKENS).logits, off, atol=1e-6, rtol=0)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([1, 2], dtype=torch.int32), IdError, "sink_ids are torch.int32, expected int64"),
        (torch.tensor([1.0, 2.0]), IdError, "sink_ids are torch.float32"),
        (torch.tensor([1, -2]), IdError, "sink id -2 is out of range, expected 0"),
        (torch.tensor(3), ShapeMismatch, r"sink_ids have shape \(\), expected \(batch,\)"),
        (torch.ones(2, 5, 1, dtype=torch.int64), ShapeMismatch, r"sink_ids have shape \(2, 5, 1\)"),
        (torch.tensor([1, 2, 3]), ShapeMismatch, r"sink ids of shape \(3,\) do not fit tokens of shape"),
        (torch.ones(2, 4, dtype=torch.int64), ShapeMismatch, r"sink ids of shape \(2, 4\) do not fit"),
        (torch.ones(2, 1, dtype=torch.int64), ShapeMismatch, r"sink ids of shape \(2, 1\) do not fit"),
        (torch.ones(4, 5, dtype=torch.int64), ShapeMismatch, r"sink ids of shape \(4, 5\) do not fit"),
    ],
)
def test_wrong_ids_are_refused(
    family: str, compute: Any, ids: Tensor, error: type[UnmemorizeError], message: str
) -> None:
    model = tiny_model(family)
    plan = sinks_for(model)
    with training_sinks(model, plan, compute=compute), pytest.raises(error, match=message):
        model(input_ids=TOKENS, sink_ids=ids)


@pytest.mark.parametrize("compute", COMPUTES)
def test_ids_of_half_the_batch_are_refused(compute: Any) -> None:
    model = tiny_model("llama")
    with (
        training_sinks(model, sinks_for(model), compute=compute),
        pytest.raises(ShapeMismatch, match="do not fit"),
    ):
        model(input_ids=tokens(4, 6), sink_ids=BY_ROW)


def test_unknown_sources_are_refused_in_every_call() -> None:
    model = tiny_model("llama")
    plan = sinks_for(model, scheme="disjoint", sinks_per_id=2).with_sources((5, 9))
    for compute in COMPUTES:
        with (
            training_sinks(model, plan, compute=compute),
            pytest.raises(IdError, match=r"ids \[7\] are not registered"),
        ):
            model(input_ids=TOKENS, sink_ids=torch.tensor([5, 7]))
    with sink_state(model, plan, "off", exclude=(7,)), pytest.raises(IdError, match="not registered"):
        model(input_ids=TOKENS)


def test_states_need_ids_and_names() -> None:
    model = tiny_model("llama").eval()
    plan = sinks_for(model)
    for state in ("own", "foreign"):
        with (
            sink_state(model, plan, state),
            pytest.raises(IdsMissing, match=f"state '{state}' needs ids; pass ids="),
        ):
            model(TOKENS)
    with (
        pytest.raises(ConfigError, match="unknown state 'on'; expected off, own"),
        sink_state(model, plan, "on"),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="unknown compute 'fast'"),
        training_sinks(model, plan, compute="fast"),
    ):
        pass
    with pytest.raises(ConfigError, match="unknown rescale 'x'"):
        rescale_factor(plan, "x")
    published = sinks_for(model, scheme="published")
    with (
        pytest.raises(ConfigError, match="use compute='masked'"),
        training_sinks(model, published, compute="gathered"),
    ):
        pass


def test_plans_of_another_architecture_are_refused() -> None:
    model = tiny_model("llama")
    plan = sinks_for(tiny_model("llama", intermediate_size=32))
    with unchanged(model):
        with pytest.raises(
            NeuronSetMismatch, match="the plan was made for language/llama-.*, this model is language"
        ):
            with training_sinks(model, plan):
                pass
        with pytest.raises(NeuronSetMismatch), sink_state(model, plan, "off"):
            pass


def test_blocks_do_not_nest() -> None:
    model = tiny_model("llama")
    plan = sinks_for(model)
    with unchanged(model):
        with training_sinks(model, plan):
            with pytest.raises(
                ConfigError, match="already attached to this model; close the open block first"
            ):
                with sink_state(model, plan, "all"):
                    pass
            run(model, sink_ids=BY_ROW)
        with sink_state(model, plan, "off"):
            run(model)


def test_layers_outside_a_call_of_the_model_are_refused() -> None:
    model = tiny_model("llama")
    with training_sinks(model, sinks_for(model)):
        with pytest.raises(IdsMissing, match="layer 0 ran outside a call of its model"):
            model.model(input_ids=TOKENS)


def test_growing_and_planning_must_agree() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="24 neurons per layer, fewer than grown=24; call grow"):
        sinks_for(model, share_frac=1.0, grown=24)
    with pytest.raises(ConfigError, match="growing widens every layer"):
        sinks_for(grow(model, 4), grown=4, layers=(0,))


# with other things


def test_gates_on_top_of_sinks_multiply() -> None:
    model = tiny_model("llama").eval()
    plan = sinks_for(model)
    half = closed(plan.pool(), scale=0.5)
    base = gate_of(plan, BY_ROW)
    expected = literal(model, lambda *at: [g * (1.0 if n < 12 else 0.5) for n, g in enumerate(base(*at))])
    with sink_state(model, plan, "own", ids=BY_ROW), gated(model, half):
        assert_equal(run(model), expected)
    with gated(model, half), sink_state(model, plan, "own", ids=BY_ROW):
        assert_equal(run(model), expected)
    sites = [place.site for place in plan.sites]
    with sink_state(model, plan, "off"), capture(model, sites) as record, torch.no_grad():
        model(TOKENS)
    assert all((record[site][0][..., 12:] == 0).all() for site in sites)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # asked for by peft
@pytest.mark.parametrize(
    "target", [["q_proj"], ["q_proj", "gate_proj", "down_proj"]], ids=["attention", "MLP"]
)
def test_sinks_work_inside_a_peft_model(target: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    settings = peft.LoraConfig(r=2, target_modules=target, task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, settings)
    plan = sinks_for(model)
    mask = gate_of(plan, BY_ROW)
    gates = [torch.tensor([[mask(layer, row, 0)] for row in range(BATCH)]) for layer in range(2)]
    with gated(model, {place.site: gate for place, gate in zip(plan.sites, gates, strict=True)}):
        expected = run(wrapped)
    with training_sinks(model, plan):
        assert_equal(run(wrapped, sink_ids=BY_ROW), expected)
    if "down_proj" in target:
        with (
            unchanged(wrapped),
            pytest.raises(ConfigError, match=r"is a Linear|which gathering would bypass"),
        ):
            with training_sinks(model, plan, compute="gathered"):
                pass
    else:
        with training_sinks(model, plan, compute="gathered"):
            assert_equal(run(wrapped, sink_ids=BY_ROW), expected)


# precision


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_half_precision_is_not_promoted(family: str, compute: Any, kind: str) -> None:
    model = tiny_model(family)
    plan = sinks_for(model)
    exact = run_in(model, plan, compute, "none")
    if kind == "weights":
        model = model.to(torch.bfloat16)
    dtypes: list[torch.dtype] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        dtypes.extend((args[0].dtype, output.dtype))

    handles = [mlp.down.register_forward_hook(note) for mlp in find_mlps(model)]
    run_in(model, None, compute, kind)
    plain = list(dtypes)
    dtypes.clear()
    logits = run_in(model, plan, compute, kind)
    assert dtypes == plain and torch.bfloat16 in dtypes
    torch.testing.assert_close(logits.float(), exact, atol=0.03, rtol=0)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
    for handle in handles:
        handle.remove()


def run_in(model: nn.Module, plan: SinkPlan | None, compute: Any, kind: str) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        if plan is None:
            return run(model)[0]
        with training_sinks(model, plan, compute=compute):
            return run(model, sink_ids=BY_TOKEN)[0]
