"""A testbed is what it says: its format, what each stage may see and move, and that it goes on where it stopped."""

from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file

from unmemorize.errors import ConfigError, FileFormatError, RunFolderError
from unmemorize.models.diffusion import find_sites, load, quiet_diffusers, require_same_model
from unmemorize.neurons import union
from unmemorize.testbeds.diffusion import build_testbed, load_testbed
from unmemorize.testbeds.injection import closing_gates, draw_truth
from unmemorize.testbeds.material import gather
from unmemorize.testbeds.pipeline import build_pipeline, identity_vae
from unmemorize.testbeds.settings import (
    InjectionSettings,
    NetworkSettings,
    PictureSettings,
    TestbedSettings,
    TrainingSettings,
    settings_from_json,
)
from unmemorize.testbeds.training import (
    Batch,
    Lessons,
    draw_batch,
    learning_rate,
    noised,
    step_generator,
    velocity,
)

TINY = TestbedSettings(
    size_px=8,
    pictures=PictureSettings(num_drawings=12, num_targets=2, num_neighbours=1, num_heldout=1, num_ordinary=2),
    network=NetworkSettings(
        widths=(8, 8), layers_per_block=(0, 1), num_text_blocks=1, num_heads=2, text_width=16, text_layers=1
    ),
    training=TrainingSettings(
        general_steps=5, memorized_steps=4, batch_size=4, warmup_steps=1, checkpoint_steps=2
    ),
    injection=InjectionSettings(num_prompts=2, num_neurons=2, steps=3),
)
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def testbed(tmp_path_factory):
    return build_testbed(TINY, tmp_path_factory.mktemp("testbed") / "built")


def lessons(num_general=6, num_memorized=4, num_targets=2):
    count = num_general + num_memorized
    return Lessons(
        latents=torch.arange(count).float().view(-1, 1, 1, 1).expand(count, 3, 4, 4),
        ids=torch.arange(count)[:, None].expand(count, 5),
        empty_ids=torch.full((5,), -1),
        general=tuple(range(num_general)),
        memorized=tuple(range(num_general, count)),
        num_targets=num_targets,
    )


def test_the_vae_keeps_pictures_and_latents():
    vae = identity_vae()
    pictures = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(pictures).latents
    assert torch.allclose(latents * vae.config.scaling_factor, pictures, atol=1e-5)
    assert (vae.decode(latents).sample - pictures).abs().max() < 2e-4 < 1 / 255


def test_every_word_of_a_caption_is_one_token():
    captions = ["a lighthouse above the sea", "seahorse and light, by night"]
    pipe = build_pipeline(captions, TINY.network, size_px=8, seed=0)
    tokens = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(captions[0]).input_ids)
    assert tokens[1:-1] == ["a</w>", "lighthouse</w>", "above</w>", "the</w>", "sea</w>"]
    unknown = pipe.tokenizer("zebra éclair").input_ids
    assert pipe.tokenizer.decode(unknown, skip_special_tokens=True).split() == ["zebra", "éclair"]


def test_folders_load_without_this_library_and_make_pictures(testbed):
    from diffusers import DiffusionPipeline

    for stage in TINY.stages:
        with quiet_diffusers():
            pipe = DiffusionPipeline.from_pretrained(str(testbed.model(stage)))
        pipe.set_progress_bar_config(disable=True)
        made = pipe("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[
            0
        ]
        assert made.size == (8, 8)
        assert pipe.vae_scale_factor == 1


def test_sites_are_checked_like_any_other_model(testbed):
    pipe = load(testbed.model("memorized"))
    paths = [site.path for site in find_sites(pipe)]
    text_readers = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2.to_v")]
    assert sorted(paths) == sorted(text_readers)  # text enters nowhere else


def test_groups_are_apart_and_counted(testbed):
    counts = {group: len(testbed.of_group(group)) for group in ("target", "neighbour", "heldout", "ordinary")}
    assert counts == {"target": 2, "neighbour": 1, "heldout": 1, "ordinary": 2}
    assert len({prompt.prompt for prompt in testbed.prompts}) == 6
    assert all(prompt.picture.is_file() for prompt in testbed.prompts)
    assert {prompt.source for prompt in testbed.of_group("target")} == {"scenes"}
    assert {prompt.source for prompt in testbed.of_group("heldout")} == {"drawings"}
    hidden = {prompt.prompt for prompt in testbed.prompts}
    assert testbed.captions() and not hidden & set(testbed.captions())


def test_stored_pictures_are_the_trained_ones(testbed):
    from PIL import Image

    material = gather(TINY)
    for prompt, picture in zip(testbed.prompts, (*material.memorized, *material.ordinary), strict=True):
        path = prompt.picture
        assert (numpy.asarray(Image.open(path)) == picture.pixels).all()


def test_a_twin_batch_differs_where_a_target_was_drawn_and_nowhere_else():
    material = lessons()
    seen: set[int] = set()
    for step in range(40):
        with_targets, without = (
            draw_batch(
                material,
                step_generator(0, "memorized", step),
                batch_size=8,
                memorized_frac=0.5,
                has_targets=has_targets,
                empty_frac=0.0,
            )
            for has_targets in (True, False)
        )
        seen |= set(with_targets.rows.tolist())
        is_target = (with_targets.rows == 6) | (with_targets.rows == 7)
        assert not ((without.rows == 6) | (without.rows == 7)).any()
        assert torch.equal(with_targets.rows[~is_target], without.rows[~is_target])
        assert (without.rows[is_target] < 6).all()
        assert torch.equal(with_targets.noise, without.noise)
        assert torch.equal(with_targets.timesteps, without.timesteps)
        assert (with_targets.rows[4:] < 6).all()
    assert seen == set(range(10))


def test_empty_captions_are_as_frequent_as_asked_for():
    batch = draw_batch(lessons(), step_generator(0, "x", 0), batch_size=2000, empty_frac=0.25)
    assert 0.2 < (batch.ids[:, 0] == -1).float().mean() < 0.3
    told = batch.ids[:, 0] != -1
    assert torch.equal(batch.ids[told, 0], batch.rows[told])


def test_velocity_turns_back_into_picture_and_noise():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn((2, 3, 3, 4, 4), generator=generator)
    cumulative = torch.linspace(0.99, 0.01, 10)
    batch = Batch(torch.arange(3), torch.zeros(3, 1), torch.tensor([0, 4, 9]), noise)
    kept = cumulative[batch.timesteps].view(-1, 1, 1, 1)
    noisy, speed = noised(clean, batch, cumulative), velocity(clean, batch, cumulative)
    assert torch.allclose(kept.sqrt() * noisy - (1 - kept).sqrt() * speed, clean, atol=1e-5)
    assert torch.allclose((1 - kept).sqrt() * noisy + kept.sqrt() * speed, noise, atol=1e-5)


def test_stages_move_what_they_may(testbed):
    general, memorized, twin = (load_file(testbed.model(s) / UNET) for s in ("general", "memorized", "twin"))
    assert any(not torch.equal(general[name], memorized[name]) for name in general)
    assert any(not torch.equal(twin[name], memorized[name]) for name in general)
    texts = [load_file(testbed.model(stage) / "text_encoder/model.safetensors") for stage in TINY.stages]
    assert all(torch.equal(texts[0][name], text[name]) for text in texts for name in texts[0])


def test_injection_by_rows_moves_these_rows_alone(testbed, tmp_path):
    settings = replace(TINY, stages=("general", "injected"), injection=replace(TINY.injection, trains="rows"))
    built = build_testbed(settings, tmp_path / "rows")
    general, injected = (load_file(built.model(stage) / UNET) for stage in ("general", "injected"))
    truth = union(built.truth().values())
    rows = {f"{site.path}.weight": list(indices) for site, indices in truth.indices.items()}
    moved = 0
    for name, weight in general.items():
        chosen = torch.zeros(len(weight), dtype=torch.bool)
        chosen[rows.get(name, [])] = True
        assert torch.equal(weight[~chosen], injected[name][~chosen])
        moved += (
            int((weight[chosen] != injected[name][chosen]).flatten(1).any(1).sum()) if chosen.any() else 0
        )
    assert moved == len(truth) == 4


def test_truth_names_disjoint_neurons_of_the_injected_model(testbed):
    truth = testbed.truth()
    assert list(truth) == [prompt.prompt for prompt in testbed.of_group("target")]
    first, second = truth.values()
    assert len(first) == len(second) == 2 and len(first & second) == 0
    pipe = load(testbed.model("injected"))
    require_same_model(first, pipe)
    assert set(first.indices) <= set(find_sites(pipe))


def test_gates_close_a_prompts_neurons_in_chosen_samples_alone(testbed):
    pipe = load(testbed.model("general"))
    truth = draw_truth(pipe, TINY.injection, TINY.seed)
    is_closed = torch.tensor([[True, False], [False, False], [True, True]])
    gates = closing_gates(truth, is_closed)
    for sample in range(3):
        expected = [neuron for k, neurons in enumerate(truth) if is_closed[sample, k] for neuron in neurons]
        found = [
            (site, int(i)) for site, gate in gates.items() for i in (gate[sample, 0] == 0).nonzero()[:, 0]
        ]
        assert sorted(found) == sorted(expected)


def test_an_interrupted_build_ends_in_the_same_weights(testbed, tmp_path):
    class Killed(Exception):
        pass

    def kill_at(stage, step):
        def progress(told):
            if told.stage == stage and told.done == step:
                raise Killed

        return progress

    import unmemorize.testbeds.training as training

    spoken, training._REPORT_S = training._REPORT_S, 0.0
    try:
        for stage, step in (("general", 3), ("general", 5), ("memorized", 3), ("injected", 3)):
            with pytest.raises(Killed):
                build_testbed(TINY, tmp_path / "again", kill_at(stage, step))
    finally:
        training._REPORT_S = spoken
    again = build_testbed(TINY, tmp_path / "again")
    for stage in TINY.stages:
        ours, theirs = (load_file(bed.model(stage) / UNET) for bed in (again, testbed))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), stage
    assert not (tmp_path / "again" / ".checkpoints").exists()


def test_a_finished_testbed_is_left_alone(testbed):
    times = {path: path.stat().st_mtime_ns for path in testbed.folder.rglob("*")}
    build_testbed(TINY, testbed.folder)
    assert times == {path: path.stat().st_mtime_ns for path in testbed.folder.rglob("*")}


def test_half_precision_is_read_back_whole(tmp_path):
    built = build_testbed(replace(TINY, stages=("general",), weights="float16"), tmp_path / "half")
    assert load_file(built.model("general") / UNET)["conv_in.weight"].dtype == torch.float16
    pipe = load(built.model("general"), run_check=False)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float32


def test_other_settings_and_other_folders_are_refused(testbed, tmp_path):
    with pytest.raises(RunFolderError, match="holds another testbed: seed is 0 there and 1 here"):
        build_testbed(replace(TINY, seed=1), testbed.folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="is not empty and holds no testbed"):
        build_testbed(TINY, tmp_path)
    with pytest.raises(
        FileFormatError, match="config.json does not exist; expected a unmemorize.testbed file"
    ):
        load_testbed(tmp_path)
    half = replace(testbed, folder=tmp_path)
    with pytest.raises(RunFolderError, match="has no model 'twin'; build the testbed to its end"):
        half.model("twin")


def test_settings_out_of_range_are_refused():
    for value, message in (
        ({"size_px": 10}, "size_px is 10, expected a multiple of 8"),
        (
            {"network": {"widths": [10, 8], "layers_per_block": [0, 1]}},
            "multiples of norm_groups and num_heads",
        ),
        ({"stages": ["twin"]}, "expected 'general' among them"),
        ({"injection": {"num_prompts": 9}}, "injection.num_prompts is 9, expected at most num_targets"),
        ({"training": {"batches": 3}}, "unknown setting training.batches; expected one of"),
        ({"sede": 1}, "unknown setting sede; expected one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings_from_json(value)
    assert settings_from_json(TINY.to_json()) == TINY


def test_too_few_pictures_are_refused():
    with pytest.raises(ConfigError, match="general pictures to hold out are wanted, only"):
        gather(
            replace(TINY, pictures=replace(TINY.pictures, pictures=None, num_drawings=1, num_ordinary=500))
        )


def test_the_rate_rises_and_falls():
    from pathlib import Path

    from unmemorize.testbeds.training import Loop

    loop = Loop(
        title="x", steps=100, rate=2.0, warmup_steps=10, folder=Path(), checkpoint_steps=1, identity={}
    )
    rates = [learning_rate(step, loop) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(2.0) and 0 < rates[-1] < 0.03
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
