"""Removal: folded and excised models compute the off state, load without the library, and name what was cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import FAMILIES, tiny_model
from unmemorize.errors import ConfigError, NeuronSetMismatch, RunFolderError
from unmemorize.isolate.language import plan_sinks, sink_state
from unmemorize.isolate.plan import SinkSettings
from unmemorize.models.language import find_mlps
from unmemorize.neurons import NeuronSet
from unmemorize.remove.language import excise, export, fold, prove_plain

TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fold_and_excise_equal_the_off_state(family: str) -> None:
    model = tiny_model(family).eval()
    plan = plan_sinks(model, SinkSettings(share_frac=0.5))
    with sink_state(model, plan, "off"):
        off = model(TOKENS).logits
    assert not torch.allclose(off, model(TOKENS).logits, atol=1e-6)
    narrow = excise(model, plan.pool())
    torch.testing.assert_close(fold(model, plan.pool())(TOKENS).logits, off, atol=1e-6, rtol=0)
    torch.testing.assert_close(narrow(TOKENS).logits, off, atol=1e-6, rtol=0)
    assert find_mlps(narrow)[0].site.width == plan.sites[0].num_shared


@torch.no_grad()
def test_kept_sources_keep_exactly_their_sinks() -> None:
    model = tiny_model("llama").eval()
    plan = plan_sinks(model, SinkSettings(share_frac=0.5, active_frac=None, sinks_per_id=3))
    removed = plan.pool() - plan.neurons_for(77)
    with sink_state(model, plan, "own", ids=torch.tensor([77, 77])):
        own = model(TOKENS).logits
    narrow = excise(model, removed)
    torch.testing.assert_close(narrow(TOKENS).logits, own, atol=1e-6, rtol=0)
    assert find_mlps(narrow)[0].site.width == plan.sites[0].num_shared + 3


@torch.no_grad()
def test_layers_that_lose_fewer_neurons_are_filled_with_zeros() -> None:
    model = tiny_model("llama").eval()
    plan = plan_sinks(model, SinkSettings(share_frac=0.5))
    first, second = (place.site for place in plan.sites)
    uneven = NeuronSet(plan.model_id, {first: (20, 21, 22, 23), second: (22, 23)})
    narrow = excise(model, uneven)
    torch.testing.assert_close(narrow(TOKENS).logits, fold(model, uneven)(TOKENS).logits, atol=1e-6, rtol=0)
    assert find_mlps(narrow)[0].site.width == first.width - 2


@torch.no_grad()
@pytest.mark.parametrize("remover", [fold, excise])
def test_the_export_loads_where_the_library_cannot_be_imported(tmp_path: Path, remover) -> None:
    model = tiny_model("llama").eval()
    plan = plan_sinks(model, SinkSettings(share_frac=0.5))
    with sink_state(model, plan, "off"):
        off = model(TOKENS).logits
    folder = export(remover(model, plan.pool()), tmp_path / "plain", manifest={"way": remover.__name__})
    assert (prove_plain(folder, TOKENS) - off).abs().max() <= 1e-5
    assert json.loads((folder / "unmemorize.json").read_text())["way"] == remover.__name__
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".json", ".safetensors"]


def test_an_occupied_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="already holds something"):
        export(tiny_model("llama"), tmp_path / "plain", manifest={})
    assert [path.name for path in tmp_path.rglob("*")] == ["plain", "mine.txt"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        export(model, tmp_path / "plain", manifest={})
    assert list(tmp_path.iterdir()) == []


def test_foreign_sets_and_empty_models_are_refused() -> None:
    model = tiny_model("llama")
    plan = plan_sinks(model, SinkSettings(share_frac=0.5))
    with pytest.raises(NeuronSetMismatch, match="was made for"):
        fold(tiny_model("qwen2"), plan.pool())
    everything = NeuronSet(plan.model_id, {p.site: tuple(range(p.site.width)) for p in plan.sites})
    with pytest.raises(ConfigError, match="leaves no MLP"):
        excise(model, everything)
