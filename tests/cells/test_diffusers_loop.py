"""The recipe for diffusers' own loop: it trains, only owned sinks move, and the folder it leaves loads anywhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from tests.tiny_diffusion import tiny_pipeline
from unmemorize.corpus.picture_ids import picture_ids
from unmemorize.isolate.sink_files import load_with_sinks, save_with_sinks
from unmemorize.models.denoising import denoiser_of
from unmemorize.models.diffusion import fingerprint
from unmemorize.remove.diffusion import excise

RECIPE = Path(__file__).parents[2] / "recipes" / "diffusers_loop.py"


def recipe() -> Any:
    spec = importlib.util.spec_from_file_location("diffusers_loop", RECIPE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_trains_owned_sinks_only(tmp_path: Path) -> None:
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
    plain = tiny_pipeline("sd1")
    before = {name: weight.clone() for name, weight in plain.unet.state_dict().items()}
    torch.manual_seed(0)
    pipe, plan = recipe().train(plain, pictures, ["a cat", "the moon", "red stone"], 3)
    assert all(torch.equal(weight, before[name]) for name, weight in plain.unet.state_dict().items())
    owned = plan.neurons_for(picture_ids(pictures))
    weights = dict(denoiser_of(pipe).named_parameters())
    for sinks in plan.sites:
        columns = weights[f"{sinks.site.path}.weight"].t()
        mine = list(owned.indices[sinks.site])
        rest = sorted(set(range(sinks.num_shared, sinks.site.width)) - set(mine))
        assert (columns[rest] == 0).all() and (columns[mine] != 0).any()
        assert not torch.equal(columns[: sinks.num_shared], before[f"{sinks.site.path}.weight"].t())
    folder = save_with_sinks(pipe, plan, tmp_path / "run")
    assert fingerprint(load_with_sinks(folder)[0]) == fingerprint(pipe)
    shipped = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert fingerprint(shipped) == fingerprint(excise(pipe, plan.pool()))
