"""The audit of text-to-image models, end to end: on pictures known by construction, and on tiny real pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.drawings import Picture, drawing
from tests.stub_pipeline import StubPipeline, training_picture
from tests.tiny import tiny_model
from tests.tiny_diffusion import tiny_clip, tiny_pipeline
from unmemorize.audit.copy_threshold import MIN_CONTROLS, choose_threshold, strangers
from unmemorize.audit.diffusion import audit_pictures
from unmemorize.audit.picture_figures import PictureSimilarities
from unmemorize.audit.picture_quality import PictureQuality, fid_and_kid
from unmemorize.audit.pictures import PromptCase, read_picture
from unmemorize.audit.prompt_alignment import ClipAlignment, ClipFeatures
from unmemorize.audit.similarity import structure
from unmemorize.audit.ways import PictureAuditSettings, Way
from unmemorize.errors import ConfigError, DataError, ModelNotSupported, RunFolderError
from unmemorize.gates import closed, gated
from unmemorize.models.denoising import denoiser_of
from unmemorize.models.diffusion import find_sites, fingerprint
from unmemorize.neurons import NeuronSet
from unmemorize.records import PictureAudit, PictureState, Progress, Similarity, load_any_audit

SEEDS = (1000, 1001, 1002)
NUM_TARGETS, NUM_COPIED, NUM_ORDINARY = 16, 12, 24
SETTINGS = PictureAuditSettings(seeds=SEEDS, num_resamples=200, batch_size=8)


def make_cases() -> list[PromptCase]:
    targets = [
        PromptCase(prompt=f"target {number}", group="target", pictures=(training_picture(number),))
        for number in range(NUM_TARGETS)
    ]
    ordinary = [
        PromptCase(prompt=f"ordinary {number}", group="ordinary", pictures=(training_picture(100 + number),))
        for number in range(NUM_ORDINARY)
    ]
    return [*targets, *ordinary]


def make_pipe() -> StubPipeline:
    """Of 16 targets 12 are copied, the first 6 in one seed and the other 6 in all."""
    return StubPipeline(
        {
            f"target {number}": (training_picture(number), SEEDS[:1] if number < 6 else SEEDS)
            for number in range(NUM_COPIED)
        }
    )


def make_ways(pipe: StubPipeline) -> list[Way]:
    return [
        Way(state="before", label="before", pipe=pipe),
        Way(state="off", label="off", pipe=pipe, context=partial(pipe.off, 0.3), num_neurons=5),
        Way(state="placebo", label="placebo", pipe=pipe, context=partial(pipe.drifted, 0.1), is_rival=True),
    ]


def figures(audit: PictureAudit, state: str, group: str) -> Similarity:
    found: PictureState = next(one for one in audit.states if one.state == state)
    return next(one for one in found.groups if one.group == group).similarities[0]


def value(measure: Any) -> float:
    assert measure is not None and measure.value is not None, measure
    return float(measure.value)


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[PictureAudit, Path, StubPipeline]:
    folder, pipe = tmp_path_factory.mktemp("audit"), make_pipe()
    return audit_pictures(make_cases(), make_ways(pipe), SETTINGS, folder), folder, pipe


def test_planted_copies_are_counted_exactly(audited: tuple[PictureAudit, Path, StubPipeline]) -> None:
    audit = audited[0]
    before, off, placebo = (figures(audit, name, "target") for name in ("before", "off", "placebo"))
    assert value(before.copy_rate_frac) == NUM_COPIED / NUM_TARGETS
    assert value(before.copy_rate_per_picture_frac) == pytest.approx((6 + 18) / (NUM_TARGETS * 3))
    assert value(placebo.copy_rate_frac) == NUM_COPIED / NUM_TARGETS
    assert value(off.copy_rate_frac) == 0
    assert value(off.copy_rate_change_frac) == -NUM_COPIED / NUM_TARGETS
    assert value(off.copy_similarity) < 0.7 < value(before.copy_similarity)
    assert value(before.seed_similarity) > value(off.seed_similarity)


def test_pictures_never_trained_on_are_not_found(audited: tuple[PictureAudit, Path, StubPipeline]) -> None:
    audit = audited[0]
    assert value(figures(audit, "before", "ordinary").copy_rate_frac) == 0
    for state in (
        "off",
        "placebo",
    ):  # other pictures than those that set the threshold: one in 25 is expected
        assert value(figures(audit, state, "ordinary").copy_rate_frac) <= 1 / NUM_ORDINARY
    assert audit.settings["copy_threshold_rules"]["structure"].startswith("just above the ")
    assert audit.copy_thresholds["structure"] < 0.9


def test_drift_of_ordinary_prompts_stands_beside_the_placebo(
    audited: tuple[PictureAudit, Path, StubPipeline],
) -> None:
    audit, folder, _ = audited
    before, off, placebo = (figures(audit, name, "ordinary") for name in ("before", "off", "placebo"))
    assert before.kept_similarity is None
    compare = structure().similarity
    for name, found in (("off", off), ("placebo", placebo)):
        rows = [
            [
                compare(read_picture(folder / now), read_picture(folder / earlier))
                for now, earlier in zip(prompt.made[name], prompt.made["before"], strict=True)
            ]
            for prompt in audit.prompts
            if prompt.group == "ordinary"
        ]
        assert value(found.kept_similarity) == pytest.approx(np.median(rows, axis=1).mean(), abs=1e-5)
    assert value(off.kept_similarity) < value(placebo.kept_similarity) < 1
    assert off.kept_beyond_placebo is not None and off.kept_beyond_placebo.ci95 is not None
    assert off.kept_beyond_placebo.ci95[1] < 0
    assert placebo.kept_beyond_placebo is None
    assert audit.verdict.startswith(
        "In state 'off' (5 neurons), 0% [0, 19] of 16 target prompts reproduce their training picture, against 75% "
    )
    assert "they move further than with the placebo" in audit.verdict


def test_the_folder_holds_all_that_the_audit_names(
    audited: tuple[PictureAudit, Path, StubPipeline],
) -> None:
    audit, folder, pipe = audited
    assert load_any_audit(folder / "audit.json") == audit
    for number, prompt in enumerate(audit.prompts):
        assert (folder / prompt.picture).is_file()
        assert prompt.made["off"][1] == f"pictures/off/{number:04d}-1001.png"
        assert all((folder / path).is_file() for paths in prompt.made.values() for path in paths)
        assert all(len(values) == len(SEEDS) for values in prompt.copy_similarity.values())
    shown = read_picture(folder / audit.prompts[0].made["before"][0])
    measure = structure()
    assert audit.prompts[0].copy_similarity["before"][0] == pytest.approx(
        measure.similarity(shown, training_picture(0)), abs=1e-5
    )
    assert audit.prompts[0].copy_similarity["before"][0] > audit.copy_thresholds["structure"]
    assert np.array_equal(read_picture(folder / audit.prompts[3].picture), training_picture(3))
    assert not list(folder.rglob("*.partial"))
    assert (pipe.is_off, pipe.drift, pipe.safety_checker) == (False, 0.0, "checks")
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert any("safety checker was off" in limit for limit in audit.limits)


def test_a_second_run_makes_no_pictures_and_says_the_same(
    audited: tuple[PictureAudit, Path, StubPipeline],
) -> None:
    audit, folder, _ = audited
    pipe = make_pipe()
    assert audit_pictures(make_cases(), make_ways(pipe), SETTINGS, folder) == audit
    assert not pipe.calls
    pipe = make_pipe()
    missing = folder / "pictures" / "off" / "0002-1001.png"
    old = missing.read_bytes()
    missing.unlink()
    assert audit_pictures(make_cases(), make_ways(pipe), SETTINGS, folder).verdict == audit.verdict
    assert len(pipe.calls) == 1 and missing.read_bytes() == old


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ways, settings: (ways, PictureAuditSettings(seeds=SEEDS, num_steps=7)), "(num_steps)"),
        (
            lambda ways, settings: (
                [ways[0], Way(state="off", label="off", pipe=ways[0].pipe, identity="x")],
                settings,
            ),
            "(identity, num_neurons)",
        ),
    ],
)
def test_pictures_of_another_run_are_refused(
    audited: tuple[PictureAudit, Path, StubPipeline], change: Callable[..., Any], message: str
) -> None:
    ways, settings = change(make_ways(make_pipe()), SETTINGS)
    with pytest.raises(RunFolderError) as caught:
        audit_pictures(make_cases(), ways, settings, audited[1])
    assert message in str(caught.value) and "choose a new folder" in str(caught.value)


def small_cases(num: int = 2) -> list[PromptCase]:
    return [
        PromptCase(prompt=f"target {number}", group="target", pictures=(training_picture(number),))
        for number in range(num)
    ]


def test_memory_that_runs_out_halves_the_batch_and_is_told(tmp_path: Path) -> None:
    pipe, steps = make_pipe(), []
    pipe.room = 2
    roomy = audit_pictures(small_cases(), make_ways(make_pipe())[:1], SETTINGS, tmp_path / "roomy")
    tight = audit_pictures(
        small_cases(), make_ways(pipe)[:1], SETTINGS, tmp_path / "tight", progress=steps.append
    )
    assert [len(call["seeds"]) for call in pipe.calls] == [6, 3, 1, 1, 1, 1, 1, 1]
    assert roomy.prompts == tight.prompts
    assert any("memory ran out at 8 pictures per call; 1 were made" in limit for limit in tight.limits)
    assert any("memory ran out" in step.message for step in steps if isinstance(step, Progress))
    assert not any("memory ran out" in limit for limit in roomy.limits)
    pipe.room = 0
    with pytest.raises(ConfigError, match="memory ran out for a single picture in state 'before'"):
        audit_pictures(small_cases(), make_ways(pipe)[:1], SETTINGS, tmp_path / "none")


def test_other_errors_restore_the_pipeline_and_are_not_taken_for_memory(tmp_path: Path) -> None:
    pipe = make_pipe()
    ways = [
        Way(state="before", label="before", pipe=pipe),
        Way(
            state="off",
            label="off",
            pipe=pipe,
            context=pipe.off,
            arguments=lambda prompt, seeds: {"prompt": 3},
        ),
    ]
    with pytest.raises(TypeError):
        audit_pictures(small_cases(), ways, SETTINGS, tmp_path)
    assert (pipe.is_off, pipe.safety_checker, pipe._progress_bar_config) == (
        False,
        "checks",
        {"desc": "mine"},
    )
    assert not (tmp_path / "audit.json").exists()


def test_a_way_may_ask_with_other_words(tmp_path: Path) -> None:
    pipe = make_pipe()
    embedding = torch.ones(1, 2, 3)
    ways = [
        Way(state="before", label="before", pipe=pipe),
        Way(
            state="reworded",
            label="reworded",
            pipe=pipe,
            arguments=lambda prompt, seeds: {"prompt": "target 5"},
        ),
        Way(
            state="attack",
            label="attack",
            pipe=pipe,
            arguments=lambda prompt, seeds: {"prompt_embeds": embedding},
        ),
    ]
    cases = [
        PromptCase(prompt=f"about {n}", group="target", pictures=(training_picture(5),)) for n in range(2)
    ]
    settings = PictureAuditSettings(seeds=SEEDS, num_resamples=100, copy_thresholds={"structure": 0.8})
    audit = audit_pictures(cases, ways, settings, tmp_path)
    copied = {
        state: [value >= 0.8 for value in values]
        for state, values in audit.prompts[0].copy_similarity.items()
    }
    assert copied["before"] == copied["attack"] == [False, False, False]
    assert copied["reworded"] == [True, False, False]
    assert [call["prompt"] for call in pipe.calls[1:3]] == ["target 5", "target 5"]
    assert pipe.calls[-1] == {"prompt": None, "seeds": list(SEEDS)}


def test_the_nearest_of_several_training_pictures_counts(tmp_path: Path) -> None:
    cases = [
        PromptCase(prompt="target 0", group="target", pictures=(training_picture(50), training_picture(0))),
        PromptCase(prompt="target 1", group="target", pictures=(training_picture(51),)),
        PromptCase(prompt="target 2", group="target"),
    ]
    audit = audit_pictures(cases, make_ways(make_pipe())[:1], SETTINGS, tmp_path)
    assert audit.prompts[0].copy_similarity["before"][0] > 0.9 > audit.prompts[1].copy_similarity["before"][0]
    assert audit.prompts[2].copy_similarity == {} and audit.prompts[2].picture == ""
    assert (tmp_path / "pictures/training/0000-1.png").is_file()
    assert (
        "between training pictures of different prompts"
        in audit.settings["copy_threshold_rules"]["structure"]
    )
    twins = [
        PromptCase(prompt=f"target {n}", group="target", pictures=(training_picture(9),)) for n in range(2)
    ]
    audit = audit_pictures(twins, make_ways(make_pipe())[:1], SETTINGS, tmp_path / "twins")
    assert any("copies that are not near perfect are missed" in limit for limit in audit.limits)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PictureAuditSettings(seeds=(1, 1)), ConfigError, "and none twice"),
        (
            lambda: PictureAuditSettings(seen_seeds=(1003,)),
            ConfigError,
            "seed 1003 was already used to find neurons",
        ),
        (lambda: PictureAuditSettings(batch_size=0), ConfigError, "batch_size is 0, expected 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_what_cannot_be_audited_is_refused(tmp_path: Path) -> None:
    pipe, case = make_pipe(), small_cases(1)[0]
    before = Way(state="before", label="b", pipe=pipe)
    other = Way(state="off", label="o", pipe=pipe)

    def refused(cases: Any, ways: Any, error: type[Exception], message: str, **more: Any) -> None:
        settings = more.pop("settings", SETTINGS)
        with pytest.raises(error, match=message):
            audit_pictures(cases, ways, settings, tmp_path, **more)

    refused([], [before], DataError, "no prompts to audit")
    refused([case, case], [before], DataError, "occurs twice")
    named = replace(case, name="one")
    refused([named, replace(named, name="two"), named], [before], DataError, "occurs twice")
    across = replace(named, name="two", group="ordinary")
    refused([named, across], [before], DataError, r"occurs twice \(target and ordinary\)")
    lost = Way(state="off", label="o", pipe=pipe, placebo="placebo-2")
    refused([case], [before, lost], ConfigError, "the placebo of state 'off' is 'placebo-2'; expected one")
    refused([PromptCase(prompt=" ", group="target")], [before], DataError, "a prompt is empty")
    refused([PromptCase(prompt="p", group="rest")], [before], DataError, "in group 'rest'; expected one of")  # type: ignore[arg-type]
    refused([case], [other], ConfigError, "the first one must be 'before'")
    refused([case], [before, before], ConfigError, "occurs twice; give each way its own name")
    refused([case], [before, Way(state="A/b", label="", pipe=pipe)], ConfigError, "does not suit a folder")
    refused([case], [before], ConfigError, "headline is 'off'; expected one of", headline="off")
    refused([case], [before], ConfigError, "name each of them once", measures=[structure(), structure()])
    wrong = PictureAuditSettings(copy_thresholds={"sscd_disc_mixup": 0.5})
    refused([case], [before], ConfigError, "which is not measured", settings=wrong)
    refused(
        [case],
        [Way(state="before", label="b", pipe=nn.Linear(1, 1))],
        ModelNotSupported,
        "takes no generator",
    )
    assert not pipe.calls


TINY = PictureAuditSettings(seeds=(7, 8), num_steps=2, size_px=64, batch_size=3, num_resamples=100)


@pytest.mark.parametrize("kind", ["sd1", "pixart", "flux"])
def test_real_pipelines_are_audited_and_restored(kind: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(kind)
    neurons = NeuronSet(fingerprint(pipe), {site: tuple(range(site.width)) for site in find_sites(pipe)})
    ways = [
        Way(state="before", label="before", pipe=pipe),
        Way(
            state="off",
            label="off",
            pipe=pipe,
            context=lambda: gated(denoiser_of(pipe), closed(neurons)),
            num_neurons=len(neurons),
        ),
        Way(state="again", label="again", pipe=pipe, context=nullcontext),
    ]
    words = ["a photo of the cat", "a red house"]
    cases = [PromptCase(prompt=text, group="ordinary") for text in words]
    audit = audit_pictures(cases, ways, TINY, tmp_path)

    def bytes_of(state: str) -> list[bytes]:
        return [(tmp_path / path).read_bytes() for prompt in audit.prompts for path in prompt.made[state]]

    assert bytes_of("before") == bytes_of("again") != bytes_of("off")
    assert len(set(bytes_of("before"))) == 4
    assert read_picture(tmp_path / audit.prompts[0].made["off"][0]).shape == (64, 64, 3)
    expected = pipe(
        words[0],
        num_inference_steps=2,
        guidance_scale=7.0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **({"use_resolution_binning": False} if kind == "pixart" else {}),
    ).images[0]
    shown = read_picture(tmp_path / audit.prompts[0].made["before"][0])
    assert np.abs(shown.astype(float) - expected * 255).max() < 1.5
    assert "there are no target prompts" in audit.verdict
    with torch.no_grad():
        next(denoiser_of(pipe).parameters()).add_(1e-3)
    with pytest.raises(RunFolderError, match="made with other settings \\(weights\\)"):
        audit_pictures(cases, ways, TINY, tmp_path)


def test_alignment_is_the_cosine_of_clip(tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path / "clip")
    alignment = ClipAlignment.load(folder, batch_size=2)
    prompts = ["a cat", "the red house of the moon", "a photo " * 60]
    pictures = [drawing(0, 32), drawing(1, 64), drawing(2, 48)]
    scores = alignment.scores(prompts, pictures)
    tokens = alignment.tokenizer(prompts[1], return_tensors="pt")
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = (drawing(0, 32) / 255 - mean) / std
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        output = alignment.model(**alignment.tokenizer(prompts[0], return_tensors="pt"), pixel_values=pixels)
    expected = torch.cosine_similarity(output.text_embeds, output.image_embeds)
    assert scores[0] == pytest.approx(float(expected), abs=1e-5)
    assert tokens["input_ids"].shape[1] > 2 and scores.shape == (3,)
    features = ClipFeatures(alignment)(torch.from_numpy(drawing(0, 32)).permute(2, 0, 1)[None])
    torch.testing.assert_close(features / features.norm(), output.image_embeds, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelNotSupported, match="does not exist; pass a model.s folder"):
        ClipAlignment.load(tmp_path / "nothing")
    (tmp_path / "pickled").mkdir()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ModelNotSupported, match="pickled holds its weights as a pickle only"):
        ClipAlignment.load(tmp_path / "pickled")
    tiny_model("llama").save_pretrained(tmp_path / "language")
    alignment.tokenizer.save_pretrained(tmp_path / "language")
    with pytest.raises(ModelNotSupported, match=r"lacks \d+ weights of a CLIP model"):
        ClipAlignment.load(tmp_path / "language")
    with pytest.raises(ValueError, match="expected one picture a prompt"):
        alignment.scores(prompts, pictures[:1])
    cases = [PromptCase(prompt=f"target {n}", group="target") for n in range(6)]
    audit = audit_pictures(cases, make_ways(make_pipe())[:2], SETTINGS, tmp_path / "run", alignment=alignment)
    before, off = (state.groups[0] for state in audit.states)
    assert off.alignment is not None and off.alignment_change is not None and before.alignment_change is None
    assert value(off.alignment_change) == pytest.approx(
        value(off.alignment) - value(before.alignment), abs=1e-9
    )
    assert "CLIP" in audit.measures["alignment"]


class MeanColour(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.float().mean(dim=(2, 3)) / 255


def colours(mean: float, seed: int, num: int = 120) -> list[np.ndarray[Any, Any]]:
    """One-colour pictures whose values are normal with a standard deviation of 20."""
    values = np.random.default_rng(seed).normal(mean, 20, (num, 1, 1, 3))
    return list(np.clip(np.round(values), 0, 255).astype(np.uint8).repeat(2, 1).repeat(2, 2))


def test_fid_and_kid_know_equal_from_different_distributions() -> None:
    quality = PictureQuality(features=MeanColour(), reference=colours(120, 0), name="mean colour")
    same_fid, same_kid = fid_and_kid(quality, [colours(120, seed) for seed in (1, 2, 3)])
    far_fid, far_kid = fid_and_kid(quality, [colours(150, seed) for seed in (1, 2, 3)])
    expected = 3 * (30 / 255) ** 2  # equal covariances: the squared distance of the means
    assert value(far_fid) == pytest.approx(expected, rel=0.15)
    assert value(same_fid) < 0.05 * expected
    assert far_kid.ci95 is not None and far_kid.ci95[0] > 0
    assert same_kid.ci95 is not None and same_kid.ci95[0] < 0 < same_kid.ci95[1] + 1e-4
    assert (far_fid.method, far_fid.num) == ("t", 3)


@pytest.mark.parametrize(
    ("num", "seeds", "fid", "kid"),
    [
        (120, 2, "2 seeds; an interval over seeds needs 3", "2 seeds"),
        (99, 3, "99 pictures in the smallest sample; KID needs 100, FID more", "99 pictures"),
    ],
)
def test_small_samples_have_no_fid(num: int, seeds: int, fid: str, kid: str) -> None:
    quality = PictureQuality(features=MeanColour(), reference=colours(120, 0), name="mean colour")
    found = fid_and_kid(quality, [colours(120, seed, num) for seed in range(seeds)])
    assert fid in str(found[0].refused) and kid in str(found[1].refused)


class Wide(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.float().flatten(1).repeat(1, 3)


def test_fid_needs_five_pictures_a_feature_and_the_audit_shows_it(tmp_path: Path) -> None:
    quality = PictureQuality(features=Wide(), reference=colours(120, 0), name="pixels")
    fid, kid = fid_and_kid(quality, [colours(120, seed) for seed in (1, 2, 3)])
    assert "FID with 36 features needs 180" in str(fid.refused) and kid.value is not None
    with pytest.raises(DataError, match="expected one vector a picture"):
        fid_and_kid(
            PictureQuality(features=nn.Identity(), reference=colours(1, 0), name="x"), [colours(1, 1)] * 3
        )
    audit = audit_pictures(make_cases()[:20], make_ways(make_pipe())[:1], SETTINGS, tmp_path, quality=quality)
    target, ordinary = audit.states[0].groups
    assert target.fid is None and ordinary.fid is not None and "4 pictures" in str(ordinary.fid.refused)
    assert json.loads((tmp_path / "audit.json").read_text())["measures"]["fid"].startswith("Distance to 120")


def test_training_pictures_of_targets_are_no_reference(tmp_path: Path) -> None:
    own, ordinary, other = training_picture(3), training_picture(100), drawing(90, 64)
    large = own.repeat(2, axis=0).repeat(2, axis=1)  # averaged down it is the training picture again
    noisy = own.copy()
    noisy[0, 0] ^= 1
    cases, ways = make_cases()[:20], make_ways(make_pipe())[:1]
    allowed = PictureQuality(features=MeanColour(), reference=[other, ordinary, noisy], name="mean colour")
    audit_pictures(cases, ways, SETTINGS, tmp_path / "allowed", quality=allowed)
    mixed = PictureQuality(features=MeanColour(), reference=[other, own, large], name="mean colour")
    with pytest.raises(
        DataError, match=r"2 of 3 reference pictures are training pictures .*first: number 2\)"
    ):
        audit_pictures(cases, ways, SETTINGS, tmp_path / "mixed", quality=mixed)
    assert not (tmp_path / "mixed").exists()


def test_an_interrupted_run_ends_in_the_files_of_one_that_was_not(tmp_path: Path) -> None:
    cases, settings = small_cases(4), PictureAuditSettings(seeds=SEEDS, batch_size=5, num_resamples=100)
    ways = make_ways(make_pipe())[:2]
    whole = audit_pictures(cases, ways, settings, tmp_path / "whole")

    class Interrupted(StubPipeline):
        def _picture(self, prompt: str, generator: torch.Generator) -> np.ndarray[Any, Any]:
            if prompt == "target 2" and len(self.calls) > 1:
                raise KeyboardInterrupt
            return super()._picture(prompt, generator)

    broken = make_ways(Interrupted(make_pipe().memory))[:2]
    with pytest.raises(KeyboardInterrupt):
        audit_pictures(cases, broken, settings, tmp_path / "parts")
    half = len(list((tmp_path / "parts/pictures/before").glob("*.png")))
    assert half == 5 and not (tmp_path / "parts/audit.json").exists()
    pipe = make_pipe()
    with pytest.raises(RunFolderError, match="pipeline"):
        audit_pictures(cases, make_ways(pipe)[:2], settings, tmp_path / "parts")
    renamed = type("Interrupted", (StubPipeline,), {})(pipe.memory)
    again = audit_pictures(cases, make_ways(renamed)[:2], settings, tmp_path / "parts")
    assert len(renamed.calls) == 2 + 3
    assert again.prompts == whole.prompts
    for path in (path for prompt in whole.prompts for paths in prompt.made.values() for path in paths):
        assert (tmp_path / "parts" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda images: images * np.nan,
            DataError,
            "numbers that are not finite; load it in float32 or bfloat16",
        ),
        (lambda images: images[:1], ModelNotSupported, "made 1 pictures where 6 were asked for"),
    ],
)
def test_pictures_that_are_none_are_refused(
    tmp_path: Path, change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    class Broken(StubPipeline):
        def __call__(self, prompt: Any = None, generator: Any = None, output_type: str = "np") -> Any:  # type: ignore[override]
            made = super().__call__(prompt, generator=generator)
            made.images = change(made.images)
            return made

    with pytest.raises(error, match=message):
        audit_pictures(small_cases(), make_ways(Broken({}))[:1], SETTINGS, tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def similarities(values: np.ndarray[Any, Any]) -> PictureSimilarities:
    return PictureSimilarities(values, None, np.full(len(values), 0.5))


@pytest.mark.parametrize(
    ("num_controls", "num_trained", "expected"),
    [(0, 1, None), (0, 2, 0.6), (19, 2, 0.6), (20, 2, 0.6), (20, 1, 0.4), (98, 2, 0.6), (99, 2, 0.4)],
)
def test_controls_decide_alone_once_there_are_enough(
    num_controls: int, num_trained: int, expected: float | None
) -> None:
    """The best control has 0.4, two training pictures have a similarity of 0.6."""
    blank = np.zeros((8, 8, 3), dtype=np.uint8)
    cases = [
        *(PromptCase(prompt=f"t{n}", group="target", pictures=(blank,)) for n in range(num_trained)),
        *(PromptCase(prompt=f"o{n}", group="ordinary", pictures=(blank,)) for n in range(num_controls)),
        PromptCase(prompt="no picture", group="ordinary"),
    ]
    vectors = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])][:num_trained]
    vectors += [torch.tensor([[1.0, 0.0]])] * num_controls + [torch.zeros(0, 2)]
    values = np.vstack(
        [
            np.full((num_trained, 2), 0.95),
            np.linspace(0.1, 0.4, max(num_controls, 1))[:num_controls, None] - [[0, 0.05]],
            np.full((1, 2), np.nan),
        ]
    )
    measure, settings = structure(), PictureAuditSettings()
    made = np.zeros((len(cases), 2, 2))
    chosen = choose_threshold(measure, cases, settings, vectors, similarities(values), made)
    assert chosen.value == (None if expected is None else pytest.approx(expected))
    named = PictureAuditSettings(copy_thresholds={"structure": 0.3})
    other = choose_threshold(measure, cases, named, vectors, similarities(values), made)
    assert (other.value, other.is_computed) == (0.3, False)
    conventional = choose_threshold(
        replace(measure, copy_threshold=0.7), cases, settings, vectors, similarities(values), made
    )
    assert conventional.value == 0.7


def noise(number: int) -> Picture:
    return np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_pictures_of_noise_set_no_threshold_that_unrelated_pictures_reach(tmp_path: Path) -> None:
    """Two training pictures of noise have a similarity of about 0, and what is made resembles neither."""

    class Noise(StubPipeline):
        def __call__(self, prompt: Any = None, generator: Any = None, output_type: str = "np") -> Any:  # type: ignore[override]
            made = super().__call__(prompt, generator=generator)
            made.images = [
                noise(1000 + one.initial_seed() + len(text)) / 255
                for text, one in zip(prompt, generator, strict=True)
            ]
            return made

    cases = [PromptCase(prompt="n" * n, group="target", pictures=(noise(n),)) for n in range(1, 3)]
    audit = audit_pictures(cases, [Way(state="before", label="b", pipe=Noise({}))], SETTINGS, tmp_path)
    assert audit.copy_thresholds["structure"] == 0.4
    rule = audit.settings["copy_threshold_rules"]["structure"]
    assert rule.startswith("the least that structure calls a copy; computed it would be ")
    free = replace(structure(), name="free", least_threshold=0.0)
    audit = audit_pictures(
        cases, [Way(state="before", label="b", pipe=Noise({}))], SETTINGS, tmp_path / "free", measures=[free]
    )
    assert audit.copy_thresholds == {}
    assert "set copy_thresholds (--copy-threshold)" in audit.verdict
    (limit,) = (one for one in audit.limits if one.startswith("There is no copy threshold of free"))
    assert "pairs of pictures made for one prompt and the picture of another" in limit
    assert limit.endswith("Give one (copy_thresholds, --copy-threshold).")


@pytest.mark.parametrize(("num_mixed_up", "is_given"), [(0, True), (9, True), (10, False)])
def test_a_threshold_holds_although_a_model_mixes_some_prompts_up(num_mixed_up: int, is_given: bool) -> None:
    """Of 14 x 13 pairs 9 are nearly 5 %; a picture that is made for another prompt is a stranger."""
    num, blank = 14, np.zeros((8, 8, 3), dtype=np.uint8)
    cases = [PromptCase(prompt=f"t{n}", group="target", pictures=(blank,)) for n in range(num)]
    references = [torch.eye(num)[n : n + 1] * 0.5 + 0.5 / num**0.5 for n in range(num)]
    references = [nn.functional.normalize(one, dim=1) for one in references]
    made = np.stack([one.numpy() for one in references])
    made[:num_mixed_up] = np.roll(made, 1, axis=0)[:num_mixed_up]
    values = PictureSimilarities(np.ones((num, 1)), None, np.full(num, np.nan))
    chosen = choose_threshold(structure(), cases, PictureAuditSettings(), references, values, made)
    pairs = strangers(made, references, [case.prompt for case in cases])
    assert len(pairs) == num * (num - 1) and (pairs > 0.99).sum() == num_mixed_up
    assert (chosen.value is not None) == is_given
    assert len(strangers(made, references, ["same"] * num)) == 0 and num < MIN_CONTROLS


def test_each_prompt_can_have_a_block_of_its_own(tmp_path: Path) -> None:
    """Its pictures are those of the state with the neurons off; those of the other prompt are untouched."""
    pipe = tiny_pipeline("sd1")
    site = find_sites(pipe)[0]
    chosen = NeuronSet(fingerprint(pipe), {site: tuple(range(site.width))})
    settings = replace(SETTINGS, seeds=(1,), num_steps=2, size_px=64, batch_size=4)
    cases = [PromptCase(prompt=text, group="target") for text in ("a red cat", "the moon")]

    def off() -> Any:
        return gated(denoiser_of(pipe), closed(chosen))

    own = Way(
        state="own",
        label="own",
        pipe=pipe,
        case_context=lambda case: off() if case.prompt == "a red cat" else nullcontext(),
    )
    ways = [
        Way(state="before", label="before", pipe=pipe),
        own,
        Way(state="off", label="off", pipe=pipe, context=off),
    ]
    audit_pictures(cases, ways, settings, tmp_path)
    files = {way.state: sorted((tmp_path / "pictures" / way.state).glob("*.png")) for way in ways}
    pictures = {state: [read_picture(path) for path in paths] for state, paths in files.items()}
    # Batches of one and of two prompts round differently, by one grey level.
    apart = [
        [
            np.abs(one.astype(int) - other.astype(int)).max()
            for one, other in zip(pictures["own"], pictures[state], strict=True)
        ]
        for state in ("off", "before")
    ]
    assert apart[0][0] <= 1 and apart[1][1] <= 1
    assert apart[0][1] > 1 and apart[1][0] > 1
