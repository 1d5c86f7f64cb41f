"""Fine-tuning with low-rank adapters on attention while grown feed-forward sinks train: the base does not move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny_diffusion import denoiser_arguments, tiny_pipeline
from unmemorize.errors import ModelNotSupported
from unmemorize.isolate.diffusion import grow, plan_sinks, pool_slices, sink_state, training_sinks
from unmemorize.isolate.optimizer import isolated_optimizer
from unmemorize.isolate.plan import SinkPlan, SinkSettings
from unmemorize.isolate.sink_files import load_with_sinks, save_with_sinks
from unmemorize.models.diffusion import fingerprint
from unmemorize.remove.diffusion import excise, export

NUM, IDS = 6, torch.tensor([3, 4])
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class LowRank(nn.Module):
    """A layer with a low-rank term beside it, in the form that peft's have."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        change: Tensor = self.lora_B(self.lora_A(inputs))
        return self.base_layer(inputs) + change  # type: ignore[no-any-return]


class ByHand:
    """Adapters written here: put on, saved, taken off, put back."""

    def __init__(self, names: tuple[str, ...] = ATTENTION) -> None:
        self.names = names

    def _layers(self, unet: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, str, Any]]:
        for path, layer in list(unet.named_modules()):
            if path.endswith(tuple(f".{name}" for name in self.names)) and isinstance(layer, kind):
                outer, _, last = path.rpartition(".")
                yield unet.get_submodule(outer), last, layer

    def put_on(self, unet: nn.Module) -> None:
        unet.requires_grad_(False)
        for outer, last, layer in self._layers(unet, nn.Linear):
            setattr(outer, last, LowRank(layer))

    def take_off(self, unet: nn.Module, folder: Path) -> None:
        save_file(
            {n: p for n, p in unet.state_dict().items() if "lora_" in n}, folder / "adapter.safetensors"
        )
        for outer, last, layer in self._layers(unet, LowRank):
            setattr(outer, last, layer.base_layer)

    def put_back(self, unet: nn.Module, folder: Path) -> None:
        self.put_on(unet)
        unet.load_state_dict(load_file(folder / "adapter.safetensors"), strict=False)


class Peft:
    """peft through diffusers, where it is installed."""

    def put_on(self, unet: Any) -> None:
        peft = pytest.importorskip("peft", reason="peft is not installed; adapters made by hand are tested")
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=list(ATTENTION)))

    def take_off(self, unet: Any, folder: Path) -> None:
        unet.save_lora_adapter(folder)
        unet.unload_lora()

    def put_back(self, unet: Any, folder: Path) -> None:
        unet.load_lora_adapter(folder, prefix=None, weight_name="pytorch_lora_weights.safetensors")


def prediction(unet: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output: Tensor = unet(**arguments)[0]
    return output


def in_state(pipe: Any, plan: SinkPlan, arguments: dict[str, Any], state: Any) -> Tensor:
    with sink_state(pipe, plan, state, ids=IDS):
        return prediction(pipe.unet, arguments)


@pytest.mark.filterwarnings("default")  # peft's and diffusers' own notes are not ours
@pytest.mark.parametrize("adapters", [ByHand(), Peft()], ids=["by hand", "peft"])
def test_adapters_and_sinks_train_beside_a_base_that_stays(adapters: Any, tmp_path: Path) -> None:
    plain = tiny_pipeline("sd1")
    arguments = denoiser_arguments(plain, 2)
    base = {name: weight.clone() for name, weight in plain.unet.state_dict().items()}
    torch.manual_seed(0)
    pipe = grow(plain, NUM)
    adapters.put_on(pipe.unet)
    plan = plan_sinks(pipe, SinkSettings(share_frac=1.0, grown=NUM, active_frac=None, sinks_per_id=2))
    torch.testing.assert_close(prediction(pipe.unet, arguments), prediction(plain.unet, arguments))
    for parameter, _, _ in pool_slices(pipe, plan):
        parameter.requires_grad_(True)
    trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    pipe.unet.train()
    with (
        training_sinks(pipe, plan),
        isolated_optimizer(optimizer, pipe.unet, plan, freeze_shared=True),
    ):
        for _ in range(3):
            pipe.unet(**arguments, sink_ids=IDS)[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    pipe.unet.eval()

    # base weights stay; owned sinks and every adapter move
    now = {name.replace("base_layer.", ""): weight for name, weight in pipe.unet.state_dict().items()}
    owned = plan.neurons_for(IDS.tolist())
    for name, weight in base.items():
        grown = now[name]
        if grown.shape == weight.shape:
            assert torch.equal(grown, weight), name
    for place in plan.sites:
        old, new = base[f"{place.site.path}.weight"], now[f"{place.site.path}.weight"]
        assert torch.equal(new[:, : place.num_shared], old)
        mine = list(owned.indices[place.site])
        rest = sorted(set(range(place.num_shared, place.site.width)) - set(mine))
        assert (new[:, mine] != 0).any() and (new[:, rest] == 0).all()
        first = place.site.path.replace("net.2", "net.0.proj")
        halves = now[f"{first}.weight"].unflatten(0, (2, -1))
        assert torch.equal(halves[:, : place.num_shared].flatten(0, 1), base[f"{first}.weight"])
    # queries and keys over a single place have no gradient
    moved = [weight for name, weight in now.items() if "lora_B" in name and "to_v" in name]
    assert moved and all((weight != 0).any() for weight in moved)

    # closed, no sink has an influence; open, they have one; adapters work in both
    closed, opened = (in_state(pipe, plan, arguments, state) for state in ("off", "own"))
    assert not torch.equal(closed, opened)
    assert not torch.allclose(closed, prediction(plain.unet, arguments), atol=1e-5)
    torch.testing.assert_close(prediction(excise(pipe, plan.pool()).unet, arguments), closed)
    with torch.no_grad():
        kept = [parameter.clone() for parameter, _, _ in pool_slices(pipe, plan)]
        for parameter, axis, pool in pool_slices(pipe, plan):
            parameter.narrow(axis, pool.start, NUM).add_(1.0)
        assert torch.equal(in_state(pipe, plan, arguments, "off"), closed)
        for (parameter, _, _), old in zip(pool_slices(pipe, plan), kept, strict=True):
            parameter.copy_(old)

    # a folder cannot hold adapters: they are saved on their own
    for write in (
        lambda: save_with_sinks(pipe, plan, tmp_path / "run"),
        lambda: export(excise(pipe, plan.pool()), tmp_path / "run", manifest={}),
    ):
        with pytest.raises(ModelNotSupported, match="have adapters, whose names no ordinary folder has"):
            write()
    assert not (tmp_path / "run").exists()
    adapters.take_off(pipe.unet, tmp_path)
    save_with_sinks(pipe, plan, tmp_path / "run")
    again, same_plan = load_with_sinks(tmp_path / "run")
    assert same_plan == plan and fingerprint(again) == fingerprint(pipe)
    adapters.put_back(again.unet, tmp_path)
    torch.testing.assert_close(in_state(again, plan, arguments, "own"), opened)
    torch.testing.assert_close(in_state(again, plan, arguments, "off"), closed)


def test_adapters_on_the_layers_of_sinks_are_refused() -> None:
    pipe = grow(tiny_pipeline("sd1"), NUM)
    ByHand(("net.2",)).put_on(pipe.unet)
    plan = plan_sinks(pipe, SinkSettings(share_frac=1.0, grown=NUM, active_frac=None, sinks_per_id=2))
    with pytest.raises(ModelNotSupported, match="has an adapter, which all pictures would train"):
        pool_slices(pipe, plan)
