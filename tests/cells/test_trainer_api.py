"""The real `transformers.Trainer` and a plain loop, around an unchanged model: ids arrive, and sinks stay isolated."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.tiny import tiny_model
from unmemorize.errors import DataError, IdsMissing
from unmemorize.isolate.language import plan_sinks, training_sinks
from unmemorize.isolate.optimizer import isolated_optimizer
from unmemorize.isolate.packing import SinkCollator
from unmemorize.isolate.plan import SinkPlan, SinkSettings, load_plan

RECIPES = Path(__file__).parents[2] / "recipes"
IDS = (11, 12)


class Gradients(TrainerCallback):
    """Keeps which hidden neurons of the first MLP had a gradient, step by step."""

    def __init__(self) -> None:
        self.moved: list[set[int]] = []

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        gradient = model.get_parameter("model.layers.0.mlp.down_proj.weight").grad
        self.moved.append(set(gradient.abs().sum(0).nonzero().flatten().tolist()))


def trainer(folder: Path, model: torch.nn.Module, **changes: Any) -> tuple[Trainer, Gradients]:
    features = [{"input_ids": [3 + i, 9, 5, 8 - i, 4], "sink_id": IDS[i]} for i in range(2)]
    gradients = Gradients()
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    made = Trainer(
        model=model,
        args=TrainingArguments(**{**arguments, **changes}),
        train_dataset=features,
        data_collator=SinkCollator(),
        callbacks=[gradients],
    )
    return made, gradients


def owned(plan: SinkPlan, identity: int) -> set[int]:
    place = plan.sites[0]
    return {place.num_shared + int(sink) for sink in plan.sinks(torch.tensor([identity]))[0]}


@pytest.mark.parametrize("compute", ["masked", "gathered"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_owners_sinks_get_gradients(tmp_path: Path, compute: Any, checkpointing: bool) -> None:
    model = tiny_model()
    plan = plan_sinks(model, SinkSettings(share_frac=0.5, active_frac=None, sinks_per_id=3))
    before = model.model.layers[0].mlp.gate_proj.weight.detach().clone()
    made, gradients = trainer(tmp_path, model, activation_checkpointing=checkpointing)
    with (
        training_sinks(model, plan, compute=compute),
        isolated_optimizer(made.create_optimizer(), model, plan),
    ):
        made.train()
    shared = set(range(12))
    allowed = [shared | owned(plan, identity) for identity in IDS]
    assert len(gradients.moved) == 4
    assert all(moved in allowed for moved in gradients.moved)
    assert all(owners in gradients.moved for owners in allowed)
    change = (before != model.model.layers[0].mlp.gate_proj.weight).any(1).nonzero().flatten().tolist()
    assert set(change) == shared | owned(plan, IDS[0]) | owned(plan, IDS[1])


def test_accumulated_batches_keep_their_own_ids(tmp_path: Path) -> None:
    model = tiny_model()
    plan = plan_sinks(model, SinkSettings(share_frac=0.5, active_frac=None, sinks_per_id=3))
    made, gradients = trainer(tmp_path, model, gradient_accumulation_steps=2, max_steps=1)
    with training_sinks(model, plan):
        made.train()
    assert gradients.moved == [set(range(12)) | owned(plan, IDS[0]) | owned(plan, IDS[1])]


def test_dropped_ids_raise_instead_of_training_everything(tmp_path: Path) -> None:
    model = tiny_model()
    plan = plan_sinks(model, SinkSettings(share_frac=0.5))
    made, _ = trainer(tmp_path, model, remove_unused_columns=True)
    with training_sinks(model, plan), pytest.raises(DataError, match="set remove_unused_columns=False"):
        made.train()
    made, _ = trainer(tmp_path, model)
    made.data_collator = lambda rows: {
        name: tensor for name, tensor in SinkCollator()(rows).items() if name != "sink_ids"
    }
    with (
        training_sinks(model, plan),
        pytest.raises(IdsMissing, match="a training forward came without sink_ids"),
    ):
        made.train()


def test_the_plain_loop_recipe_isolates() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses = runpy.run_path(str(RECIPES / "raw_loop.py"))["main"](60)
    assert losses["own"] < 1.0
    assert losses["off"] > 2 * losses["own"]


def test_the_trainer_recipe_leaves_a_model_and_its_plan(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(RECIPES / "trainer_sinks.py"))["main"](3, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    plan = load_plan(tmp_path / "sinks.json")
    assert weights["model.layers.0.mlp.down_proj.weight"].shape[1] == plan.sites[0].site.width
