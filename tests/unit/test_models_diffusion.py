"""Sites of every supported denoiser, the self-check, names, and what a pipeline hands its denoiser."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_diffusion import KINDS, tiny_pipeline
from unmemorize.errors import ConfigError, ModelNotSupported, NeuronSetMismatch, SitesNotFound
from unmemorize.gates import capture, closed, gated
from unmemorize.models.denoising import denoiser_of, record
from unmemorize.models.diffusion import (
    ROWS,
    check,
    find_sites,
    fingerprint,
    load,
    require_same_model,
    row_for,
    signature,
    text_values,
)
from unmemorize.neurons import NeuronSet

PROMPT = "a photo of the red cat"


@pytest.mark.parametrize("kind", KINDS)
def test_self_check_holds(kind: str) -> None:
    results = check(tiny_pipeline(kind))
    assert len(results) == 4
    assert all(result.passed for result in results), results


def test_unet_sites_run_down_then_mid_and_up_on_request() -> None:
    pipe = tiny_pipeline("sd1")
    default = [site.path.split(".")[0] for site in find_sites(pipe)]
    assert default == ["down_blocks"] * 6 + ["mid_block"]
    assert len(find_sites(pipe, blocks=("down", "mid", "up"))) == 16
    assert all(site.side == "in" for site in find_sites(pipe, "hidden"))


def test_running_order_is_numeric_not_alphabetic() -> None:
    paths = [site.path for site in find_sites(tiny_pipeline("sdxl"), blocks=("down",))]
    assert paths == sorted(paths)
    assert len(paths) == 8


def test_flux_single_blocks_share_one_projection() -> None:
    (site,) = find_sites(tiny_pipeline("flux"), "hidden", blocks=("single",))
    assert (site.start, site.width) == (32, 128)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "pixart"])
def test_text_values_are_what_the_denoiser_computes(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    sites = find_sites(pipe)
    call = record(pipe, PROMPT)
    with capture(denoiser_of(pipe), sites) as seen:
        call.predict([0])
    values = text_values(pipe, [PROMPT, "a tree"], sites)
    for site in sites:
        assert torch.allclose(seen[site][0][0], values[site][0], atol=1e-6)


def test_joint_values_are_refused() -> None:
    pipe = tiny_pipeline("sd3")
    with pytest.raises(ModelNotSupported, match="capture them during a pass"):
        text_values(pipe, [PROMPT], find_sites(pipe))


@pytest.mark.parametrize("kind", KINDS)
def test_gates_differ_from_sample_to_sample(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    size_px = 64
    sites = find_sites(pipe)
    call = record(pipe, PROMPT, num_samples=2, seeds=(3,), size_px=size_px)
    whole = NeuronSet(signature(pipe), {sites[0]: tuple(range(sites[0].width))})
    gates = {site: torch.stack([torch.ones(site.width), gate]) for site, gate in closed(whole).items()}
    mixed = call.predict([0, 0], gates=gates)[-1]
    plain = call.predict([0, 0])[-1]
    with gated(denoiser_of(pipe), closed(whole)):
        blocked = call.predict([0, 0])[-1]
    assert torch.allclose(mixed[0], plain[0], atol=1e-6)
    assert torch.allclose(mixed[1], blocked[1], atol=1e-6)
    assert not torch.allclose(mixed[1], plain[1], atol=1e-6)


def test_latents_are_one_draw_of_the_seed() -> None:
    call = record(tiny_pipeline("sd1"), PROMPT, num_samples=3, seeds=(1,))
    expected = torch.randn((3, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    assert torch.equal(call.latents, expected)
    one_each = record(tiny_pipeline("sd1"), PROMPT, num_samples=2, seeds=(5, 1))
    assert torch.equal(
        one_each.latents[1], torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))[0]
    )
    with pytest.raises(ConfigError, match="2 seeds for 3 samples"):
        record(tiny_pipeline("sd1"), PROMPT, num_samples=3, seeds=(1, 2))


def test_guidance_adds_the_empty_prompt() -> None:
    pipe = tiny_pipeline("sd1")
    call = record(pipe, PROMPT, num_samples=2, guidance=7.0)
    both = call.predict([0, 1])
    assert both.shape[:2] == (2, 2)
    assert torch.allclose(both[1], record(pipe, PROMPT, num_samples=2).predict([0, 1])[0], atol=1e-6)
    assert not torch.allclose(both[0], both[1], atol=1e-6)


def test_recording_runs_no_denoiser_pass_and_leaves_no_hook() -> None:
    pipe = tiny_pipeline("sd1")
    with capture(pipe.unet, find_sites(pipe)) as seen:
        record(pipe, PROMPT)
    assert not any(seen.values())
    assert not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_directions_have_the_shape_of_the_latent(kind: str) -> None:
    call = record(tiny_pipeline(kind), PROMPT, num_samples=2, size_px=64)
    maps = call.clean_direction(call.predict([0, 1])[-1], [0, 1])
    assert maps.shape == (2, 4, 8, 8)
    assert maps.dtype == torch.float32


def test_names_follow_weights() -> None:
    pipe, same, other = tiny_pipeline("sd1"), tiny_pipeline("sd1"), tiny_pipeline("sd1", seed=1)
    assert fingerprint(pipe) == fingerprint(same) != fingerprint(other)
    assert signature(pipe) == signature(other) != signature(tiny_pipeline("sdxl"))
    require_same_model(NeuronSet(fingerprint(pipe), {}), same)
    with pytest.raises(NeuronSetMismatch, match="use the model it was made for"):
        require_same_model(NeuronSet(fingerprint(pipe), {}), other)


def test_load_checks_a_folder_without_its_safety_checker(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd1")
    pipe.save_pretrained(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    named = json.loads(index.read_text())
    named["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index.write_text(json.dumps(named))
    loaded = load(tmp_path / "model")
    assert fingerprint(loaded) == fingerprint(pipe)
    assert load(pipe) is pipe


def test_incomplete_folders_are_explained(tmp_path: Path) -> None:
    tiny_pipeline("sd1").save_pretrained(tmp_path)
    for part in ("vae", "unet"):
        path = tmp_path / part / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        save_file(
            {k: v for k, v in weights.items() if k != "conv_in.weight" and k != "decoder.conv_in.weight"},
            path,
        )
        with pytest.raises(ModelNotSupported, match=f"lacks 1 weights of its {part} "):
            load(tmp_path)
        save_file(weights, path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    save_file(
        {k: v for k, v in weights.items() if "final_layer_norm" not in k}, path, metadata={"format": "pt"}
    )
    with pytest.raises(ModelNotSupported, match=r"lacks 2 weights of its text_encoder \(.*layer_norm.bias"):
        load(tmp_path)
    save_file(weights, path, metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(ModelNotSupported, match="names tokenizer and holds no such folder"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ModelNotSupported, match="names no pipeline class"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.bin"])
def test_pickled_parts_are_not_opened(file: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd1")
    pipe.save_pretrained(tmp_path)
    part = (tmp_path / file).parent
    next(part.glob("*.safetensors")).unlink()
    torch.save(getattr(pipe, part.name).state_dict(), tmp_path / file)
    with pytest.raises(ModelNotSupported, match=rf"{part.name} holds its weights as a pickle only \("):
        load(tmp_path)


def test_weights_under_the_names_of_the_hub_are_all_there(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd1")
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    weights = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor
        for name, tensor in load_file(path).items()
    }
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, path, metadata={"format": "pt"})
    loaded = load(tmp_path).text_encoder.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in pipe.text_encoder.state_dict().items())


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux", "pixart"])
def test_whole_folders_of_every_text_encoder_load(kind: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    assert type(load(tmp_path, run_check=False)) is type(pipe)


def test_bad_models_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelNotSupported, match=r"holds no model_index\.json"):
        load(tmp_path)
    pipe = tiny_pipeline("sd1")
    with pytest.raises(SitesNotFound, match="no blocks named 'middle'; this denoiser has down, mid, up"):
        find_sites(pipe, blocks=("middle",))
    empty = dataclasses.replace(ROWS["UNet2DConditionModel"], values=("attn9.to_v",))
    with pytest.raises(SitesNotFound, match="has no values sites"):
        find_sites(pipe, row=empty)
    pipe.unet.__class__ = type("StrangeModel", (type(pipe.unet),), {})
    with pytest.raises(ModelNotSupported, match="no site table row for denoiser 'StrangeModel'"):
        row_for(pipe)
    fused = tiny_pipeline("sd1")
    fused.fuse_qkv_projections()
    with pytest.raises(ModelNotSupported, match="call unfuse_qkv_projections"):
        find_sites(fused)
    fused.unfuse_qkv_projections()
    assert len(find_sites(fused)) == 7
