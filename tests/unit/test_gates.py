"""Gates multiply, capture, fold, nest, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.tiny import FAMILIES, tiny_model, tokens
from unmemorize.errors import ConfigError, ModelNotSupported, ShapeMismatch, SitesNotFound
from unmemorize.gates import apply_gate, capture, closed, folded, gated, module_at
from unmemorize.models.language import find_mlps
from unmemorize.neurons import NeuronSet, Site


class Two(nn.Module):
    """Two linear layers, the second one transposed if wanted."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.second = Conv1D(4, 8) if is_transposed else nn.Linear(8, 4)
        nn.init.normal_(self.second.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(tokens).relu())
        return out


def two(is_transposed: bool = False) -> Two:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Two(is_transposed)


INPUT = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
SITES = (
    Site("first", "out", 8),
    Site("second", "in", 8),
    Site("first", "out", 3, 2),
    Site("second", "in", 3, 5),
)


def gate_for(site: Site) -> Tensor:
    return torch.rand(site.width, generator=torch.Generator().manual_seed(site.width))


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("site", [*SITES, Site("second", "out", 4), Site("second", "out", 2, 1)])
@torch.no_grad()
def test_gate_equals_fold(site: Site, is_transposed: bool) -> None:
    model = two(is_transposed)
    plain = model(INPUT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with gated(model, {site: gate_for(site)}):
        at_run_time = model(INPUT)
    torch.testing.assert_close(folded(model, {site: gate_for(site)})(INPUT), at_run_time)
    assert not torch.allclose(at_run_time, plain, atol=1e-3)
    assert torch.equal(model(INPUT), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["in", "out"])
@torch.no_grad()
def test_gate_equals_fold_in_every_family(family: str, side: Any) -> None:
    model = tiny_model(family).eval()
    sites = [mlp.site for mlp in find_mlps(model)]
    if side == "out":
        sites = [Site(path, "out", mlp.site.width) for mlp in find_mlps(model) for path in mlp.up_paths]
    gates = {site: gate_for(site) for site in sites}
    plain = model(tokens()).logits
    with gated(model, gates):
        at_run_time = model(tokens()).logits
    torch.testing.assert_close(folded(model, gates)(tokens()).logits, at_run_time, atol=1e-6, rtol=0)
    assert (at_run_time - plain).abs().max() > 1e-4
    with gated(model, {site: torch.ones(site.width) for site in sites}):
        assert torch.equal(model(tokens()).logits, plain)
    assert torch.equal(model(tokens()).logits, plain)


@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_capture_reads_and_changes_nothing(site: Site) -> None:
    model = two()
    hidden = model.first(INPUT) if site.path == "first" else model.first(INPUT).relu()
    plain = model(INPUT)
    with capture(model, [site]) as record:
        assert torch.equal(model(INPUT), plain)
        model(INPUT[:1])
    assert [tuple(r.shape) for r in record[site]] == [(2, 3, site.width), (1, 3, site.width)]
    assert torch.equal(record[site][0], hidden[..., site.start : site.start + site.width])
    model(INPUT)
    assert len(record[site]) == 2


@torch.no_grad()
def test_capture_inside_a_gate_sees_gated_neurons() -> None:
    model, site = two(), SITES[1]
    with gated(model, {site: gate_for(site)}), capture(model, [site]) as record:
        model(INPUT)
    torch.testing.assert_close(record[site][0], model.first(INPUT).relu() * gate_for(site))


@torch.no_grad()
def test_nested_gates_multiply_and_zero_twice_is_zero_once() -> None:
    model, site = two(), SITES[1]
    neurons = NeuronSet("x", {site: (1, 4)})
    with gated(model, closed(neurons)):
        once = model(INPUT)
        with gated(model, closed(neurons)):
            assert torch.equal(model(INPUT), once)
        assert torch.equal(model(INPUT), once)
    half = {site: torch.full((8,), 0.5)}
    with gated(model, half), gated(model, half):
        nested = model(INPUT)
    with gated(model, {site: torch.full((8,), 0.25)}):
        torch.testing.assert_close(model(INPUT), nested)
    overlapping = {SITES[2]: gate_for(SITES[2]), SITES[0]: gate_for(SITES[0])}
    both = folded(model, overlapping)
    with gated(model, overlapping):
        torch.testing.assert_close(model(INPUT), both(INPUT))


def test_closed_scales_only_its_neurons() -> None:
    gates = closed(NeuronSet("x", {SITES[0]: (1, 4)}), scale=0.5)
    assert gates[SITES[0]].tolist() == [1, 0.5, 1, 1, 0.5, 1, 1, 1]


@torch.no_grad()
def test_gates_by_row_and_by_token_fit_flattened_tokens() -> None:
    by_row = torch.rand(2, 1, 8, generator=torch.Generator().manual_seed(3))
    by_token = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(4))
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(5))
    for gate in (by_row, by_token):
        expected = hidden * gate
        assert torch.equal(apply_gate(hidden, gate), expected)
        assert torch.equal(apply_gate(hidden.view(6, 8), gate), expected.view(6, 8))


@pytest.mark.parametrize(
    ("gate", "channels", "start"),
    [
        ((3, 1, 8), (2, 3, 8), 0),
        ((2, 4, 8), (2, 3, 8), 0),
        ((2, 4, 8), (6, 8), 0),
        ((4, 1, 8), (6, 8), 0),
        ((9,), (2, 3, 8), 0),
        ((4,), (2, 3, 8), 5),
        ((2, 3, 8), (8,), 0),
    ],
)
def test_gates_of_another_shape_are_refused(gate: Any, channels: Any, start: int) -> None:
    with pytest.raises(
        ShapeMismatch, match="does not fit channels of shape .*; pass one gate a row or a token"
    ):
        apply_gate(torch.ones(channels), torch.ones(gate), start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gates_never_promote(dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 3, 8).to(dtype)
    assert apply_gate(hidden, torch.rand(8)).dtype == dtype
    assert apply_gate(hidden, torch.rand(2, 1, 4), 2).dtype == dtype


def test_gates_are_not_in_place_and_pass_gradients() -> None:
    hidden = torch.randn(2, 8, requires_grad=True)
    apply_gate(hidden, torch.tensor([0.0, 2.0, 1.0]), 4).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[0].tolist() == [1, 1, 1, 1, 0, 2, 1, 1]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_everything_is_restored_after_an_exception() -> None:
    model, site = two(), SITES[1]
    plain = model(INPUT)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        gated(model, {site: torch.zeros(8)}),
        capture(model, [site]),
    ):
        raise RuntimeError("on purpose")
    assert hooks(model) == 0 and torch.equal(model(INPUT), plain)
    missing = Site("third", "in", 8)
    with pytest.raises(SitesNotFound), gated(model, {site: torch.zeros(8), missing: torch.zeros(8)}):
        pass
    with pytest.raises(SitesNotFound), capture(model, [site, missing]):
        pass
    assert hooks(model) == 0 and torch.equal(model(INPUT), plain)


def test_missing_modules_are_named_with_near_ones() -> None:
    model = tiny_model("llama")
    with pytest.raises(
        SitesNotFound, match="no module 'layers.0.mlp.down_proj' in LlamaForCausalLM; near: model"
    ):
        module_at(model, "layers.0.mlp.down_proj")


def test_folding_into_an_adapter_is_refused() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8))
            self.bias = None

    model = two()
    model.second = Adapter()
    with pytest.raises(ModelNotSupported, match="cannot fold into second, a Adapter; merge its adapter"):
        folded(model, {SITES[1]: torch.zeros(8)})


def test_folding_inside_an_open_block_is_refused() -> None:
    model, gates = two(), {SITES[1]: torch.zeros(8)}
    with (
        gated(model, gates),
        pytest.raises(ConfigError, match="block is open on this model; close it before"),
    ):
        folded(model, gates)
    assert hooks(folded(model, gates)) == 0
