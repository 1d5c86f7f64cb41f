"""The closed-form edit of a pipeline: exact, narrow, tied to its model, exported and undone bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_diffusion import tiny_pipeline
from unmemorize.errors import (
    CheckpointMismatch,
    ConfigError,
    DataError,
    FileFormatError,
    ModelNotSupported,
    NeuronSetMismatch,
)
from unmemorize.gates import closed, gated
from unmemorize.models.denoising import denoiser_of
from unmemorize.models.diffusion import find_sites, fingerprint, load, text_values
from unmemorize.neurons import NeuronSet, Site
from unmemorize.remove.changes import undo_path
from unmemorize.remove.diffusion import export, fold, prove_plain, undone
from unmemorize.remove.diffusion_edits import edit_figures, edit_values
from unmemorize.remove.diffusion_moments import collect_second_moments, text_states
from unmemorize.remove.edits import Memorized, correction
from unmemorize.remove.moments import SecondMoments

MEMORIZED = ["the moon of the stone garden", "a blue river"]
CAPTIONS = [
    "a photo of the red cat",
    "the lighthouse",
    "a house of stone",
    "the blue lamp",
    "a tree",
    "red moon",
]
OPTIONS: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 4.0, "height": 64, "width": 64}
CROSS = ("sd1", "sdxl", "pixart")


def latents(pipe: Any, prompt: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    found: Tensor = pipe(prompt, **OPTIONS, generator=generator, output_type="latent").images
    return found


def moments(pipe: Any) -> SecondMoments:
    return collect_second_moments(pipe, CAPTIONS, batch_size=4)


def some_rows(pipe: Any) -> NeuronSet:
    return NeuronSet(fingerprint(pipe), {site: (0, 3) for site in find_sites(pipe)[1:]})


def weights(pipe: Any) -> dict[str, Tensor]:
    return dict(denoiser_of(pipe).state_dict())


@pytest.mark.parametrize("kind", CROSS)
def test_only_the_named_rows_change_and_they_equal_those_of_the_full_edit(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    before = {name: tensor.clone() for name, tensor in weights(pipe).items()}
    neurons, ordinary = some_rows(pipe), moments(pipe)
    narrow = weights(edit_values(pipe, MEMORIZED, ordinary, neurons=neurons))
    full = weights(edit_values(pipe, MEMORIZED, ordinary))
    chosen = {f"{site.path}.weight": list(rows) for site, rows in neurons.indices.items()}
    after = weights(pipe)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name])
        rows = chosen.get(name)
        if rows is None:
            assert torch.equal(narrow[name], tensor)
            continue
        changed = (narrow[name] != tensor).any(1).nonzero()[:, 0].tolist()
        assert changed == rows
        torch.testing.assert_close(narrow[name][rows], full[name][rows], rtol=0, atol=1e-7)
    everywhere = {f"{site.path}.weight" for site in find_sites(pipe)}
    assert {name for name in before if not torch.equal(full[name], before[name])} == everywhere


def test_the_edit_is_that_of_the_memorized_tokens() -> None:
    pipe = tiny_pipeline("sd1")
    ordinary = moments(pipe)
    states, _ = text_states(pipe, MEMORIZED)
    ends = [7, 4]
    tokens = torch.cat([states[i, end:] for i, end in enumerate(ends)])
    solved = correction(Memorized.of(tokens), ordinary.mean_product, strength=2.0, ridge_frac=1e-2)
    options: dict[str, Any] = {"positions": ("end", "padding"), "target": "zero", "ridge_frac": 1e-2}
    edited = edit_values(pipe, MEMORIZED, ordinary, strength=2.0, **options)
    for site in find_sites(pipe):
        name = f"{site.path}.weight"
        torch.testing.assert_close(
            weights(edited)[name], solved.applied(weights(pipe)[name]), rtol=0, atol=1e-7
        )
    assert set(weights(edited)) == set(weights(pipe))


def test_no_strength_is_the_identity_and_a_constraint_is_met() -> None:
    pipe = tiny_pipeline("sdxl")
    ordinary, prompt = moments(pipe), "a red lamp"
    same = edit_values(pipe, MEMORIZED, ordinary, strength=0.0)
    before = weights(pipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(same).items())
    assert torch.equal(latents(same, prompt), latents(pipe, prompt))
    sites = find_sites(pipe)
    options: dict[str, Any] = {"positions": ("end",), "target": "zero", "strength": math.inf}
    silent = edit_values(pipe, [prompt], ordinary, **options)
    then, now = (text_values(p, [prompt], sites) for p in (pipe, silent))
    for site in sites:
        assert now[site][0, 4].abs().max() < 1e-5 * then[site][0, 4].abs().max()
        assert now[site][0, 0].abs().max() > 0.5 * then[site][0, 0].abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_full_and_rounded_once(dtype: torch.dtype) -> None:
    pipe = tiny_pipeline("sd1")
    ordinary = moments(pipe)
    pipe.unet.to(dtype)
    edited = edit_values(pipe, MEMORIZED, ordinary, target="zero", strength=1.0)
    pipe.unet.float()
    exact = edit_values(pipe, MEMORIZED, ordinary, target="zero", strength=1.0)
    for site in find_sites(pipe):
        found = weights(edited)[f"{site.path}.weight"]
        assert found.dtype == dtype
        torch.testing.assert_close(found, weights(exact)[f"{site.path}.weight"].to(dtype))


def test_figures_compare_an_edit_with_a_fold() -> None:
    pipe = tiny_pipeline("sdxl")
    neurons, ordinary = some_rows(pipe), moments(pipe)
    edited = edit_values(pipe, MEMORIZED, ordinary, neurons=neurons)
    gone = edit_figures(pipe, fold(pipe, neurons), MEMORIZED, ordinary)
    kept = edit_figures(pipe, edited, MEMORIZED, ordinary)
    assert (gone.num_rows, gone.num_zero_rows, gone.num_sites) == (
        len(neurons),
        len(neurons),
        len(neurons.indices),
    )
    assert (gone.kept_frac, gone.drift_frac) == (pytest.approx(0.0), pytest.approx(1.0))
    assert (kept.num_rows, kept.num_zero_rows) == (len(neurons), 0)
    assert kept.rank <= 2 and kept.excess_frac < 0.5 < 1.0 > kept.drift_frac
    nothing = edit_figures(pipe, pipe, MEMORIZED, ordinary).manifest()
    assert nothing["num_rows"] == 0 and nothing["kept_frac"] == 1.0 and nothing["drift_frac"] == 0.0


def test_moments_continue_from_a_file_and_belong_to_a_text_encoder(tmp_path: Path) -> None:
    pipe, path = tiny_pipeline("sd1"), tmp_path / "moments.safetensors"
    whole = moments(pipe)
    collect_second_moments(pipe, CAPTIONS[:3], batch_size=2, path=path)
    seen: list[int] = []
    again = collect_second_moments(pipe, iter(CAPTIONS), path=path, progress=lambda p: seen.append(p.done))
    assert seen == [6] and again.digest == whole.digest
    torch.testing.assert_close(again.products, whole.products, rtol=1e-6, atol=1e-6)
    with pytest.raises(DataError, match="made from other captions"):
        collect_second_moments(pipe, CAPTIONS[::-1], path=path)
    other = tiny_pipeline("sd1", seed=1)
    with pytest.raises(NeuronSetMismatch, match="collect them on this model"):
        collect_second_moments(other, CAPTIONS, path=path)
    with pytest.raises(NeuronSetMismatch, match="collect them on this model"):
        edit_values(other, MEMORIZED, whole)
    with pytest.raises(DataError, match="no captions"):
        collect_second_moments(pipe, [])


def test_padding_that_is_not_attended_to_does_not_count() -> None:
    pipe = tiny_pipeline("pixart")
    found = moments(pipe)
    num_words = sum(len(caption.split()) + 1 for caption in CAPTIONS)
    assert found.num_tokens == num_words
    assert found.products.shape == (16, 16)  # behind the text projection
    with pytest.raises(DataError, match="no tokens at positions padding"):
        edit_values(pipe, MEMORIZED, found, positions=("padding",))


def test_bad_input_is_refused() -> None:
    pipe = tiny_pipeline("sd1")
    ordinary, neurons = moments(pipe), some_rows(pipe)
    with pytest.raises(NeuronSetMismatch, match="use the model it was made for"):
        edit_values(pipe, MEMORIZED, ordinary, neurons=some_rows(tiny_pipeline("sd1", seed=1)))
    for prompts in ([], ["a cat", " "]):
        with pytest.raises(DataError, match="prompt list is empty"):
            edit_values(pipe, prompts, ordinary)
    with pytest.raises(DataError, match="hold no captions"):
        edit_values(pipe, MEMORIZED, SecondMoments.empty(ordinary.text_id))
    with pytest.raises(ConfigError, match="pass one of them"):
        edit_values(pipe, MEMORIZED, ordinary, neurons=neurons, sites=find_sites(pipe))
    hidden: tuple[Site, ...] = find_sites(pipe, "hidden")
    with pytest.raises(ConfigError, match="is not a value site"):
        edit_values(pipe, MEMORIZED, ordinary, sites=hidden)
    with pytest.raises(ConfigError, match="no neurons to edit"):
        edit_values(pipe, MEMORIZED, ordinary, neurons=NeuronSet(neurons.model_id, {}))
    options: dict[str, Any] = {"positions": "padding"}
    with pytest.raises(ConfigError, match="expected a sequence of start"):
        edit_values(pipe, MEMORIZED, ordinary, **options)
    with pytest.raises(ConfigError, match="unknown positions 'middle'"):
        edit_values(pipe, MEMORIZED, ordinary, positions=("middle",))
    options = {"target": "none"}
    with pytest.raises(ConfigError, match="expected zero or ordinary"):
        edit_values(pipe, MEMORIZED, ordinary, **options)
    with pytest.raises(ConfigError, match="close it before making a folded copy"):
        with gated(pipe.unet, closed(neurons)):
            edit_values(pipe, MEMORIZED, ordinary)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_joint_attention_is_refused(kind: str) -> None:
    with pytest.raises(ModelNotSupported, match="depend on the picture too.*use fold"):
        moments(tiny_pipeline(kind))


def test_an_exported_edit_is_the_edit_and_can_be_undone(tmp_path: Path) -> None:
    tiny_pipeline("sd1").save_pretrained(tmp_path / "original")
    pipe = load(tmp_path / "original", run_check=False)
    pipe.set_progress_bar_config(disable=True)
    ordinary = moments(pipe)
    edited = edit_values(pipe, MEMORIZED, ordinary, neurons=some_rows(pipe), strength=1.0)
    figures = edit_figures(pipe, edited, MEMORIZED, ordinary).manifest()
    folder = export(edited, tmp_path / "edited", manifest={"method": "edit", **figures}, original=pipe)
    again = load(folder, run_check=False)
    assert fingerprint(again) == fingerprint(edited) != fingerprint(pipe)
    plain = prove_plain(folder, MEMORIZED[0], **OPTIONS)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(plain, latents(again, MEMORIZED[0]))
    torch.testing.assert_close(plain, latents(edited, MEMORIZED[0]))
    assert not torch.allclose(plain, latents(pipe, MEMORIZED[0]))
    restored = undone(folder)
    assert fingerprint(restored) == fingerprint(pipe)
    assert undo_path(folder).stat().st_size < 40_000
    assert not list(folder.rglob("*undo*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fold_can_be_undone_too(tmp_path: Path, dtype: torch.dtype) -> None:
    pipe = tiny_pipeline("pixart")
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        part.to(dtype)
    folder = export(fold(pipe, some_rows(pipe)), tmp_path / "folded", manifest={}, original=pipe)
    assert fingerprint(undone(folder)) == fingerprint(pipe)
    with pytest.raises(CheckpointMismatch, match="the edited model has other tensors than the original"):
        export(pipe, tmp_path / "wrong", manifest={}, original=tiny_pipeline("sd1"))
    assert not (tmp_path / "wrong").exists()


def test_what_cannot_be_undone_says_so(tmp_path: Path) -> None:
    pipe = tiny_pipeline("pixart")
    neurons = some_rows(pipe)
    folder = export(fold(pipe, neurons), tmp_path / "folded", manifest={})
    with pytest.raises(FileFormatError, match="cannot read undo data"):
        undone(folder)
    kept = export(fold(pipe, NeuronSet(neurons.model_id, {})), tmp_path / "kept", manifest={}, original=pipe)
    undo = undo_path(kept).read_bytes()
    undo_path(folder).write_bytes(undo[:50])
    with pytest.raises(FileFormatError, match="cannot read undo data"):
        undone(folder)
    undo_path(folder).write_bytes(undo)
    with pytest.raises(CheckpointMismatch, match="export the removal again"):
        undone(folder)
