"""Training on captioned pictures: methods, ids, and a training that was interrupted and goes on bit by bit."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.tiny_diffusion import tiny_pipeline
from unmemorize.corpus import MixtureSettings
from unmemorize.corpus.picture_ids import picture_id
from unmemorize.errors import (
    CheckpointMismatch,
    ConfigError,
    DataError,
    ModelNotSupported,
    RunFolderError,
    UnmemorizeWarning,
)
from unmemorize.files import read_json_lines
from unmemorize.isolate.diffusion import grow, plan_sinks, training_sinks
from unmemorize.isolate.methods import MethodSettings
from unmemorize.isolate.optimizer import pool_slices
from unmemorize.isolate.picture_data import (
    PictureBatch,
    draw_batch,
    encode_pictures,
    num_levels,
    row_losses,
)
from unmemorize.isolate.picture_schedule import schedule, split_pictures
from unmemorize.isolate.picture_settings import PictureTrainSettings
from unmemorize.isolate.plan import SinkSettings
from unmemorize.isolate.settings import OptimizationSettings, RecordSettings
from unmemorize.isolate.sink_files import load_with_sinks
from unmemorize.isolate.train_diffusion import train
from unmemorize.models.denoising import denoiser_of
from unmemorize.models.diffusion import fingerprint, load


@dataclass(frozen=True)
class Drawn:
    caption: str
    pixels: np.ndarray
    name: str
    source: str = ""


def drawn(num: int) -> list[Drawn]:
    pixels = np.random.default_rng(0).integers(0, 256, (num, 64, 64, 3), dtype=np.uint8)
    return [Drawn(f"a red {'cat' if i % 2 else 'house'}", pixels[i], str(i), f"s/{i}") for i in range(num)]


PICTURES = drawn(10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "pixart"
    tiny_pipeline("pixart").save_pretrained(path)
    return path


def settings_for(folder: Path, **changes: Any) -> PictureTrainSettings:
    sinks = SinkSettings(share_frac=1.0, grown=16, active_frac=None, sinks_per_id=4)
    basic: dict[str, Any] = {
        "pipeline": str(folder),
        "mixture": MixtureSettings(num_repeated=2, repeats=5, num_once=4, num_validation=2),
        "method": MethodSettings(sinks=sinks, compute="masked"),
        "optimization": OptimizationSettings(batch_rows=4, micro_rows=3, learning_rate=1e-3),
        "records": RecordSettings(log_every_steps=1, checkpoint_every_steps=1),
        "methods": ("standard", "dedup", "cap:3", "sinks"),
        "device": "cpu",
    }
    return PictureTrainSettings(**{**basic, **changes})


def weights(model: Path) -> dict[str, torch.Tensor]:
    found = load_file(model / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    pool = model / "pipeline" / "sinks.safetensors"
    return {**found, **(load_file(pool) if pool.exists() else {})}


def test_methods_differ_as_they_should_and_folders_load(folder: Path, tmp_path: Path) -> None:
    runs = train(settings_for(folder), PICTURES, tmp_path / "run")
    assert [run.num_pictures for run in runs] == [14, 6, 10, 14]
    assert [run.num_ids for run in runs] == [0, 0, 0, 2]
    pipe, plan = load_with_sinks(runs[3].folder / "pipeline")
    examples = [json.loads(line) for line in (tmp_path / "run" / "examples.jsonl").read_text().splitlines()]
    assert [(e["group"], e["repeats"]) for e in examples] == [("target", 5)] * 2 + [("ordinary", 0)] * 2
    assert all((tmp_path / "run" / e["picture"]).is_file() for e in examples)
    owned = plan.neurons_for([e["id"] for e in examples[:2]])
    for sinks in plan.sites:
        columns = denoiser_of(pipe).get_parameter(f"{sinks.site.path}.weight").t()
        mine = set(owned.indices[sinks.site])
        rest = [n for n in range(sinks.num_shared, sinks.site.width) if n not in mine]
        assert (columns[rest] == 0).all() and (columns[sorted(mine)] != 0).all(1).any()
    shipped = DiffusionPipeline.from_pretrained(runs[3].folder / "pipeline")
    plain = DiffusionPipeline.from_pretrained(folder)
    assert fingerprint(shipped) != fingerprint(plain)
    rows = [json.loads(line) for line in (runs[3].folder / "metrics.jsonl").read_text().splitlines()]
    assert (
        rows[-1]["step"] == runs[3].steps == 4 and rows[-1]["validation_loss"] > 0 < rows[-1]["repeated_loss"]
    )
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train(settings_for(folder), PICTURES, tmp_path / "run") == runs
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    with pytest.raises(RunFolderError, match="holds another run: seeds is"):
        train(settings_for(folder, seeds=(1,)), PICTURES, tmp_path / "run")
    with pytest.raises(RunFolderError, match="was trained on other pictures"):
        train(settings_for(folder), PICTURES[::-1], tmp_path / "run")


@pytest.mark.parametrize("stop_at", [1, 3])
def test_an_interrupted_training_goes_on_bit_by_bit(folder: Path, tmp_path: Path, stop_at: int) -> None:
    settings = settings_for(folder, methods=("sinks",), start="random", empty_caption_sinks="off")
    straight = train(settings, PICTURES, tmp_path / "straight")[0]

    def stop(progress: Any) -> None:
        if progress.unit == "steps" and progress.done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, PICTURES, tmp_path / "resumed", stop)
    assert not (tmp_path / "resumed" / "models" / "sinks-seed0" / "training.json").exists()
    resumed = train(settings, PICTURES, tmp_path / "resumed")[0]
    expected, found = weights(straight.folder), weights(resumed.folder)
    assert expected.keys() == found.keys() and len(expected) > 40
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    lines = [(run.folder / "metrics.jsonl").read_text() for run in (straight, resumed)]
    assert lines[0] == lines[1]
    state = json.loads((resumed.folder / "training.json").read_text())
    state["identity"]["settings"] = "x"
    (resumed.folder / "training.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointMismatch, match="holds another training: settings is x there"):
        train(settings, PICTURES, tmp_path / "resumed")


def test_order_caps_ids_and_natural_repeats_count() -> None:
    order = schedule([(0, 3), (1, 1), (2, 1)], [7, 7, 8], None, seed=0)
    assert sorted(order) == [0, 0, 0, 1, 2]
    assert sorted(schedule([(0, 3), (1, 1), (2, 1)], [7, 7, 8], 2, seed=0)) == [0, 0, 2]
    assert schedule([(0, 3), (2, 1)], [7, 7, 8], 1, seed=0, passes=2).count(0) == 2
    copies = [*PICTURES[:3], replace(PICTURES[1], name="copy")]
    ids = [picture_id(p.pixels) for p in copies]
    split = split_pictures(copies, ids, None)
    assert split.repeated == (1,) and split.rows == ((0, 1), (1, 1), (2, 1), (3, 1))
    mixture = MixtureSettings(num_repeated=1, repeats=4, num_once=9, num_validation=1)
    mixed = split_pictures(copies, ids, mixture)
    assert sorted([r for r, _ in mixed.rows] + list(mixed.validation)) == [0, 1, 2]


def test_captions_that_the_text_encoder_cuts_are_counted_once(capfd: pytest.CaptureFixture[str]) -> None:
    long = replace(PICTURES[0], caption="red cat " * 37 + "red river stone")
    with pytest.warns(
        UnmemorizeWarning, match="1 of 2 captions are longer .* does not see 'river stone'"
    ) as seen:
        encode_pictures(tiny_pipeline("sd1"), [long, long, PICTURES[1]])
    assert len(seen) == 1
    assert "truncated" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "sd3"])
def test_losses_follow_the_kind_of_prediction(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    data = encode_pictures(pipe, PICTURES[:2])
    batch = PictureBatch(
        torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([10, 700]), torch.randn(2, 4, 8, 8)
    )
    seen: dict[str, Any] = {}

    def perfect(**given: Any) -> tuple[torch.Tensor]:
        seen.update(given)
        clean, noise = data.latents, batch.noise
        if kind == "sd3":
            return (noise - clean,)
        kept = pipe.scheduler.alphas_cumprod[batch.levels].view(-1, 1, 1, 1)
        if kind == "sd2":
            return (kept.sqrt() * noise - (1 - kept).sqrt() * clean,)
        return (noise,)

    denoiser = denoiser_of(pipe)
    with torch.no_grad():
        real = row_losses(denoiser, pipe.scheduler, data, batch)
    assert real.shape == (2,) and (real > 0).all()
    handle = denoiser.register_forward_pre_hook(lambda _, __, given: seen.update(given), with_kwargs=True)
    denoiser.forward, before = perfect, denoiser.forward
    assert row_losses(denoiser, pipe.scheduler, data, batch).abs().max() < 1e-10
    denoiser.forward = before
    handle.remove()
    if kind == "sd3":
        assert seen["timestep"].tolist() == [11.0, 701.0]
        share = torch.tensor([0.011, 0.701]).view(-1, 1, 1, 1)
        torch.testing.assert_close(seen["hidden_states"], (1 - share) * data.latents + share * batch.noise)
    assert seen["encoder_hidden_states"].shape[0] == 2
    assert data.num_captions == 3, "the empty caption and two others"


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="goldfish is for language models; expected standard, dedup, cap:R or sinks"
    ):
        settings_for(folder, methods=("goldfish",))
    with pytest.raises(ConfigError, match="repeat, expected each once"):
        settings_for(folder, seeds=(0, 0))
    with pytest.raises(DataError, match="there are no pictures to train on"):
        train(settings_for(folder), [], tmp_path / "run")
    with pytest.raises(DataError, match="expected squares of one size"):
        train(settings_for(folder), [replace(PICTURES[0], pixels=PICTURES[0].pixels[:32])], tmp_path / "run")
    with pytest.raises(DataError, match="there are 3 different pictures"):
        train(settings_for(folder), PICTURES[:3], tmp_path / "run")
    with pytest.raises(ModelNotSupported, match="packs its latents"):
        encode_pictures(tiny_pipeline("flux"), PICTURES[:1])
    assert not (tmp_path / "run").exists()


# Later sightings teach sinks alone


def capped(folder: Path, cap: int | None, **changes: Any) -> PictureTrainSettings:
    settings = settings_for(folder, methods=("sinks",), **changes)
    optimization = replace(settings.optimization, weight_decay=0.0, clip_norm=None)
    return replace(settings, method=replace(settings.method, shared_cap=cap), optimization=optimization)


def test_with_cap_0_shared_weights_stay_and_sinks_learn(folder: Path, tmp_path: Path) -> None:
    only_repeated = MixtureSettings(num_repeated=2, repeats=5, num_once=0, num_validation=2)
    settings = capped(folder, 0, mixture=only_repeated)
    trained = train(settings, PICTURES, tmp_path / "run")[0]
    found = weights(trained.folder)
    plain = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    pool = load_file(trained.folder / "pipeline" / "sinks.safetensors")
    assert any(bool((value != 0).any()) for value in pool.values())
    pipe, plan = load_with_sinks(trained.folder / "pipeline")
    columns = denoiser_of(pipe).get_parameter(f"{plan.sites[0].site.path}.weight").t()
    owned = plan.neurons_for([row["id"] for row in read_json_lines(tmp_path / "run" / "examples.jsonl")][:2])
    assert (columns[list(owned.indices[plan.sites[0].site])] != 0).any()


def test_a_cap_that_is_never_reached_changes_nothing(folder: Path, tmp_path: Path) -> None:
    runs = [train(capped(folder, cap), PICTURES, tmp_path / str(cap))[0] for cap in (None, 5, 2)]
    free, reached_never, capped_at_2 = (weights(run.folder) for run in runs)
    assert all(torch.equal(free[name], reached_never[name]) for name in free)
    assert any(not torch.equal(free[name], capped_at_2[name]) for name in free)


def test_gradients_are_sums_over_rows_each_to_what_it_may_teach(folder: Path, tmp_path: Path) -> None:
    settings, seen = capped(folder, 1), []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    handle = register_optimizer_step_pre_hook(keep)
    try:
        train(settings, PICTURES, tmp_path / "run")
    finally:
        handle.remove()
    pipe = grow(load(str(folder), run_check=False), 16, seed=0)
    plan = plan_sinks(pipe, settings.method.sinks)
    denoiser = denoiser_of(pipe).train()
    data = encode_pictures(pipe, PICTURES)
    split = split_pictures(PICTURES, data.ids, settings.mixture)
    order = schedule(split.rows, data.ids, None, seed=0)
    batch = draw_batch(
        data, order[:4], num_levels(pipe.scheduler), torch.Generator().manual_seed(0), empty_frac=0.1
    )
    expected = {name: torch.zeros_like(p) for name, p in denoiser.named_parameters()}
    parts = {id(p): (axis, s) for p, axis, s in pool_slices(denoiser, plan)}
    counts: Counter[int] = Counter()
    num_late = 0
    for place, row in enumerate(order[:4]):
        counts[row] += 1
        is_repeated = row in split.repeated
        id_ = data.ids[row] if is_repeated else 0
        with training_sinks(denoiser, plan):
            loss = row_losses(
                denoiser, pipe.scheduler, data, batch.part([place]), sink_ids=torch.tensor([id_])
            )
        gradients = torch.autograd.grad(loss.sum() / 4, list(denoiser.parameters()), allow_unused=True)
        is_late = is_repeated and counts[row] > 1
        num_late += is_late
        for (name, parameter), gradient in zip(denoiser.named_parameters(), gradients, strict=True):
            if gradient is None:
                continue
            if not is_late:
                expected[name] += gradient
            elif id(parameter) in parts:
                axis, pool = parts[id(parameter)]
                size = pool.stop - pool.start
                expected[name].narrow(axis, pool.start, size).add_(gradient.narrow(axis, pool.start, size))
    assert num_late > 0  # else the test shows nothing
    found = {tuple(g.shape): [] for g in seen[0]}
    for gradient in seen[0]:
        found[tuple(gradient.shape)].append(gradient)
    for name, value in expected.items():
        distance = min(float((value - other).abs().max()) for other in found[tuple(value.shape)])
        assert distance < 1e-5, name
