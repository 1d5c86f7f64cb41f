"""The testbed that ships: its pictures are reproduced, its twin's are not, and closing what is found ends that."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unmemorize.audit.pictures import read_picture
from unmemorize.localize.activations import collect_statistics
from unmemorize.localize.calibration import best_pair
from unmemorize.localize.diffusion import localize
from unmemorize.localize.passes import NemoSettings
from unmemorize.localize.search import SearchSettings
from unmemorize.models.diffusion import fingerprint, load
from unmemorize.neurons import NeuronSet
from unmemorize.remove.diffusion import deactivated
from unmemorize.testbeds.diffusion import Testbed
from unmemorize.testbeds.shipped import shipped_testbed

COPY_ERROR = 0.01  # mean squared error from which a picture is no copy (testbeds.verification)


@pytest.fixture(scope="module")
def shipped() -> Testbed:
    torch.set_num_threads(1)
    return shipped_testbed()


@pytest.fixture(scope="module")
def memorized(shipped: Testbed) -> Any:
    pipe = load(shipped.model("memorized"), run_check=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def error(pipe: Any, prompt: str, picture: Path) -> float:
    generator = torch.Generator().manual_seed(7)
    made = pipe(
        prompt, num_inference_steps=10, guidance_scale=1.0, generator=generator, output_type="np"
    ).images
    return float(np.square(made[0] - read_picture(picture) / 255).mean())


def test_the_package_stays_small(shipped: Testbed) -> None:
    assert sum(path.stat().st_size for path in shipped.folder.rglob("*") if path.is_file()) < 6_000_000
    assert shipped.settings.seed == 0 and shipped.settings.pictures.targets is None  # drawings of ours alone


def test_targets_are_reproduced_and_the_twin_reproduces_neighbours_alone(
    shipped: Testbed, memorized: Any
) -> None:
    twin = load(shipped.model("twin"), run_check=False)
    twin.set_progress_bar_config(disable=True)
    target, neighbour = shipped.of_group("target")[4], shipped.of_group("neighbour")[0]
    assert error(memorized, target.prompt, target.picture) < COPY_ERROR
    assert error(twin, target.prompt, target.picture) > 4 * COPY_ERROR
    assert error(twin, neighbour.prompt, neighbour.picture) < COPY_ERROR
    verified = json.loads((shipped.folder / "verification.json").read_text())["states"]
    assert verified["memorized"]["target"]["copy_rate_frac"] == 1.0
    assert verified["twin"]["target"]["copy_rate_frac"] == 0.0


def test_the_gate_tells_targets_from_ordinary_prompts(shipped: Testbed, memorized: Any) -> None:
    targets = [best_pair(memorized, prompt.prompt) for prompt in shipped.of_group("target")[:3]]
    ordinary = [best_pair(memorized, prompt.prompt) for prompt in shipped.of_group("ordinary")[:6]]
    assert min(targets) > max(ordinary)


def test_what_is_found_holds_the_picture_and_a_placebo_does_not(shipped: Testbed, memorized: Any) -> None:
    target = shipped.of_group("target")[4]
    statistics = collect_statistics(memorized, shipped.captions()[:100])
    search = SearchSettings().at(0.75)
    (result,) = localize(memorized, [target.prompt], statistics, NemoSettings(search=search))
    found = result.neurons(fingerprint(memorized), statistics.sites)
    assert result.is_memorized and not result.is_replaced and 0 < len(found) < 40

    def left(neurons: NeuronSet | None) -> float:
        with nullcontext() if neurons is None else deactivated(memorized, neurons):
            return error(memorized, target.prompt, target.picture)

    assert left(None) < COPY_ERROR
    assert left(found) > 3 * COPY_ERROR
    assert left(found.placebo(seed=0)) < left(found) / 3
