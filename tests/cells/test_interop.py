"""Neuron sets in the words of plain PyTorch, TransformerLens and nnsight."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import FAMILIES, WIDTH, tiny_model, tokens
from unmemorize.errors import NeuronSetMismatch, SitesNotFound
from unmemorize.gates import closed, gated, module_at, site_width
from unmemorize.models.interop import to_hooks, to_nnsight, to_transformer_lens
from unmemorize.models.language import find_mlps, signature
from unmemorize.neurons import NeuronSet, Site

torch.set_num_threads(1)


def drawn(model: torch.nn.Module) -> NeuronSet:
    first, last = (find_mlps(model)[layer].site for layer in (0, 1))
    return NeuronSet(signature(model), {first: (0, 5), last: (WIDTH - 1,)})


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_do_what_gates_do(family: str) -> None:
    model = tiny_model(family).eval()
    neurons, rows = drawn(model), tokens()
    for scale in (0.0, 0.5):
        with gated(model, closed(neurons, scale=scale)):
            expected = model(input_ids=rows, use_cache=False).logits
        hooks = to_hooks(neurons, scale=scale)
        assert all(site_width(module_at(model, path), "in") == WIDTH for path in hooks)
        handles = [module_at(model, path).register_forward_pre_hook(hook) for path, hook in hooks.items()]
        found = model(input_ids=rows, use_cache=False).logits
        for handle in handles:
            handle.remove()
        assert torch.equal(found, expected)
        assert not torch.equal(found, model(input_ids=rows, use_cache=False).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_other_libraries(family: str) -> None:
    model = tiny_model(family)
    neurons = drawn(model)
    assert to_transformer_lens(neurons, model) == {
        "blocks.0.mlp.hook_post": (0, 5),
        "blocks.1.mlp.hook_post": (WIDTH - 1,),
    }
    for (path, indices), site in zip(to_nnsight(neurons).items(), neurons.indices, strict=True):
        module = eval(f"model.{path}", {"model": model})
        assert module is module_at(model, site.path)
        assert indices == neurons.indices[site]


def test_what_has_no_such_name_is_refused() -> None:
    model = tiny_model("llama")
    values = NeuronSet(signature(model), {Site("model.layers.0.self_attn.v_proj", "out", 16): (0,)})
    for convert in (to_hooks, to_nnsight):
        with pytest.raises(SitesNotFound, match="is a site on the output side"):
            convert(values)
    with pytest.raises(SitesNotFound, match="is not the last projection of an MLP of this model"):
        to_transformer_lens(values, model)
    with pytest.raises(NeuronSetMismatch, match="the neuron set was made for language/gpt2"):
        to_transformer_lens(drawn(tiny_model("gpt2")), model)
