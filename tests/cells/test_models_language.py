"""Language site tables: every family resolves, checks itself, resizes and grows; everything else is refused clearly."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tests.reference.masked_mlp import LAST_PROJECTION
from tests.tiny import FAMILIES, WIDTH, tiny_model, tokens
from unmemorize.errors import (
    ConfigError,
    ModelNotSupported,
    NeuronSetMismatch,
    SelfCheckFailed,
    SitesNotFound,
)
from unmemorize.isolate.language import grow, plan_sinks, sink_state, training_sinks
from unmemorize.isolate.plan import SinkSettings
from unmemorize.models import language
from unmemorize.models.language import (
    MlpRow,
    check,
    find_mlps,
    fingerprint,
    load,
    require_same_model,
    resized,
    row_for,
    signature,
)
from unmemorize.neurons import NeuronSet


def test_tiny_models_are_quick_and_alike() -> None:
    tiny_model("llama")
    start_s = time.perf_counter()
    first = tiny_model("llama")
    assert time.perf_counter() - start_s < 0.5
    state = torch.get_rng_state()
    second = tiny_model("llama")
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(first) == fingerprint(second) != fingerprint(tiny_model("llama", seed=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_where_the_architecture_has_them(family: str) -> None:
    mlps = find_mlps(tiny_model(family))
    assert [mlp.site.path for mlp in mlps] == [LAST_PROJECTION[family].format(layer) for layer in range(2)]
    assert all(mlp.site.width == WIDTH and mlp.site.side == "in" for mlp in mlps)


@pytest.mark.parametrize("family", FAMILIES)
def test_self_check_passes_and_restores_the_mode(family: str) -> None:
    for is_training in (True, False):
        model = tiny_model(family).train(is_training)
        results = check(model)
        assert [result.name for result in results] == [
            "sites exist",
            "ones are the identity",
            "zeros are not",
            "gate equals fold",
        ]
        assert all(result.passed for result in results), results
        assert model.training == is_training


def test_self_check_in_half_precision() -> None:
    assert all(result.passed for result in check(tiny_model("llama").to(torch.bfloat16)))


def test_self_check_fails_where_neurons_have_no_effect() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        find_mlps(model)[1].down.weight.zero_()
    failed = [result for result in check(model) if not result.passed]
    assert [result.name for result in failed] == ["zeros are not"]
    assert "model.layers.1.mlp.down_proj" in failed[0].detail


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_resizing_to_the_same_neurons_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    same = resized(model, [torch.arange(WIDTH)] * 2)
    assert fingerprint(same) == fingerprint(model)
    assert torch.equal(same.eval()(tokens()).logits, model.eval()(tokens()).logits)
    same.get_input_embeddings().weight.zero_()
    assert model.get_input_embeddings().weight.any()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_resizing_reorders_and_fills(family: str) -> None:
    model = tiny_model(family).eval()
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))
    chosen = torch.cat([order[:5], torch.tensor([-1]), order[5:], torch.tensor([-1])])
    other = resized(model, [chosen, chosen.flip(0)])
    assert not other.training and find_mlps(other)[0].site.width == WIDTH + 2
    torch.testing.assert_close(other(tokens()).logits, model(tokens()).logits, atol=1e-6, rtol=0)


def test_resizing_needs_one_width() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"cannot resize 2 MLPs to widths \[3, 4\]: .* fold at equal width"):
        resized(model, [torch.arange(3), torch.arange(4)])
    with pytest.raises(ConfigError, match="cannot resize 2 MLPs"):
        resized(model, [torch.arange(3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_growing_changes_nothing_until_it_trains(family: str, dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_model(family).config, dtype=dtype).eval()
    generator_state = torch.get_rng_state()
    wider = grow(model, 40)
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert wider.dtype == dtype and not wider.training
    assert {b.dtype for b in wider.buffers()} == {b.dtype for b in model.buffers()}
    logits = wider(tokens()).logits
    torch.testing.assert_close(logits, model(tokens()).logits, atol=1e-6, rtol=0)
    for mlp in find_mlps(wider):
        assert mlp.site.width == WIDTH + 40
    again, other = grow(model, 40), grow(model, 40, seed=1)
    assert fingerprint(again) == fingerprint(wider) != fingerprint(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_grown_sinks_can_train(family: str) -> None:
    wider = grow(tiny_model(family), 8)
    wider(input_ids=tokens(), labels=tokens()).loss.backward()
    for mlp in find_mlps(wider):
        columns = mlp.down.weight.grad.t() if type(mlp.down).__name__ != "Conv1D" else mlp.down.weight.grad
        assert (columns[WIDTH:].abs().sum(1) > 0).sum() >= 4  # a ReLU may be off for every token


def test_growing_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot grow 0 sinks, expected 1 or more"):
        grow(tiny_model("llama"), 0)


# names


def test_signatures_follow_widths_and_fingerprints_follow_weights() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    assert signature(model) == signature(other) != signature(grow(model, 1))
    assert signature(model) != signature(tiny_model("mistral"))
    assert signature(model).startswith("language/llama-") and signature(model).endswith("-*")
    assert fingerprint(model) != fingerprint(other)
    assert fingerprint(model.to(torch.bfloat16)) != fingerprint(tiny_model("llama"))
    assert fingerprint(model).startswith(signature(model)[:-1])


def test_neuron_sets_of_another_model_are_refused() -> None:
    model = tiny_model("llama")
    site = find_mlps(model)[0].site
    require_same_model(NeuronSet(signature(model), {site: (1,)}), model)
    require_same_model(NeuronSet(fingerprint(model), {site: (1,)}), model)
    for other in (fingerprint(tiny_model("llama", seed=1)), signature(tiny_model("gpt2"))):
        with pytest.raises(
            NeuronSetMismatch, match=f"was made for {other[:-2]}.*, this model is language/llama"
        ):
            require_same_model(NeuronSet(other, {site: (1,)}), model)


# models that the table does not know


def test_mixtures_of_experts_are_refused() -> None:
    model = tiny_model("mixtral", num_local_experts=2)
    with pytest.raises(ModelNotSupported, match="mixtral is a mixture of experts: .*; use a dense model"):
        find_mlps(model)


def test_unknown_models_learn_how_to_pass_a_row() -> None:
    with pytest.raises(
        ModelNotSupported,
        match=r"no site table row for model type 'stablelm'; known: gemma, .*row=MlpRow\(layers='model.layers', ",
    ):
        row_for(tiny_model("stablelm"))


def test_a_passed_row_works_end_to_end() -> None:
    model = tiny_model("stablelm").eval()
    row = MlpRow(
        layers="model.layers",
        up=("mlp.gate_proj", "mlp.up_proj"),
        down="mlp.down_proj",
        width_key="intermediate_size",
    )
    assert all(result.passed for result in check(model, row))
    wider = grow(model, 8, row=row)
    plan = plan_sinks(wider, SinkSettings(share_frac=1.0, grown=8, active_frac=0.5), row=row)
    with torch.no_grad(), sink_state(wider, plan, "off", row=row):
        torch.testing.assert_close(wider(tokens()).logits, model(tokens()).logits, atol=1e-6, rtol=0)


class Plain(nn.Module):
    """A model of nobody's making, which takes no keyword arguments it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)) for _ in range(2)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = inputs + block(inputs)
        return inputs


@pytest.mark.parametrize("compute", ["masked", "gathered"])
def test_a_model_without_keyword_arguments_can_have_sinks(compute: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Plain()
    row = MlpRow(layers="blocks", up=("0",), down="2", width_key="")
    plan = plan_sinks(model, SinkSettings(share_frac=0.5), row=row)
    inputs, ids = torch.ones(2, 3, 4), torch.tensor([3, 0])
    with training_sinks(model, plan, compute=compute, row=row):
        out = model(inputs, sink_ids=ids)
    with torch.no_grad():
        expected = inputs
        for block, place in zip(model.blocks, plan.sites, strict=True):
            gate = torch.zeros(2, 1, 6)
            gate[:, :, :3] = 1
            gate[0, 0, list(plan.neurons_for(3).indices[place.site])] = 1
            expected = expected + block[2](block[1](block[0](expected)) * gate)
    torch.testing.assert_close(out, expected)
    with pytest.raises(ConfigError, match="cannot resize"):
        grow(model, 3, row=row)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": "model.blocks"}, SitesNotFound, "no module 'model.blocks' in LlamaForCausalLM"),
        ({"down": "mlp.c_proj"}, SitesNotFound, "no module 'model.layers.0.mlp.c_proj'"),
        ({"up": ("mlp.fc",)}, SitesNotFound, "no module 'model.layers.0.mlp.fc'"),
        (
            {"down": "self_attn.o_proj"},
            SitesNotFound,
            "mlp.gate_proj makes 24 channels, expected 16 for the 16 neurons",
        ),
        ({"is_fused": True}, SitesNotFound, "makes 24 channels, expected 48"),
        (
            {"layers": "model.norm"},
            SitesNotFound,
            "model.norm holds no decoder layers; correct the table row",
        ),
    ],
)
def test_wrong_rows_are_explained(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    fields = {"layers": "model.layers", "up": ("mlp.gate_proj", "mlp.up_proj"), "down": "mlp.down_proj"}
    with pytest.raises(error, match=message):
        find_mlps(tiny_model("llama"), MlpRow(width_key="intermediate_size", **{**fields, **changes}))


# loading


def test_saved_models_load_and_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert fingerprint(loaded) == fingerprint(model) and not loaded.training
    assert load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    failed = [language.CheckResult("gate equals fold", False, "1 <= 0")]
    monkeypatch.setattr(language, "check", lambda *_: failed)
    with pytest.raises(SelfCheckFailed, match="self-check 'gate equals fold' failed for .*: 1 <= 0"):
        load(tmp_path)
    assert fingerprint(load(tmp_path, run_check=False)) == fingerprint(model)


def test_weights_that_would_be_drawn_at_random_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    weights = load_file(path)
    save_file(weights | {name: torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    with pytest.raises(
        ModelNotSupported, match=rf"holds {name} of shape \(3, 3\), its config.json says \(16, 24\)"
    ):
        load(tmp_path)
    save_file({k: v for k, v in weights.items() if k != name}, path, metadata={"format": "pt"})
    with pytest.raises(
        ModelNotSupported, match=rf"lacks 1 weights of a causal language model \({name} ...\)"
    ):
        load(tmp_path)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotSupported, match=r"a pickle only \(pytorch_model\.bin\).*save_pretrained it"):
        load(tmp_path)
    model.save_pretrained(tmp_path)
    assert fingerprint(load(tmp_path)) == fingerprint(model)


@pytest.mark.parametrize("damage", ["no config", "no weights", "torn weights", "not a language model"])
def test_unloadable_folders_are_explained(tmp_path: Path, damage: str) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "no config":
        (tmp_path / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(
        ModelNotSupported, match="holds no config.json|cannot load .* as a causal language model"
    ):
        load(tmp_path)
