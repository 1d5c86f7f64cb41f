"""Grown sinks in denoisers: the function is unchanged, the pool travels beside a plain folder, and comes out again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_diffusion import denoiser_arguments, tiny_pipeline
from unmemorize.errors import (
    ConfigError,
    FileFormatError,
    IdError,
    ModelNotSupported,
    NeuronSetMismatch,
    RunFolderError,
)
from unmemorize.isolate.diffusion import grow, plan_sinks, pool_slices, sink_state, training_sinks
from unmemorize.isolate.optimizer import isolated_optimizer
from unmemorize.isolate.plan import SinkPlan, SinkSettings
from unmemorize.isolate.sink_files import load_with_sinks, save_with_sinks
from unmemorize.models.denoiser_layers import find_places, has_plain_widths, resized
from unmemorize.models.denoising import denoiser_of
from unmemorize.models.diffusion import DenoiserRow, fingerprint
from unmemorize.neurons import NeuronSet
from unmemorize.remove.diffusion import excise, export, export_with_sinks, fold, keep_sinks, prove_plain

DENOISERS = ("sd1", "pixart", "sd3", "flux")
NUM = 6
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}


HEAD = 8  # divides by the sizes of all heads of the tiny denoisers (UNets 4 and 8, PixArt 8)
BOTH = ("hidden", "values")


def grown(kind: str, kinds: Any = ("hidden",)) -> tuple[Any, SinkPlan]:
    """A pipeline whose grown columns are no longer zero, as after training, and its plan."""
    num = NUM if kinds == ("hidden",) else HEAD
    pipe = grow(tiny_pipeline(kind), num, kinds=kinds)
    settings = SinkSettings(share_frac=1.0, grown=num, active_frac=None, sinks_per_id=2)
    plan = plan_sinks(pipe, settings, kinds=kinds)
    with torch.no_grad():
        for parameter, axis, pool in pool_slices(pipe, plan):
            part = parameter.narrow(axis, pool.start, pool.stop - pool.start)
            part.add_(torch.randn(part.shape, generator=torch.Generator().manual_seed(1)))
    return pipe, plan


def prediction(pipe: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = denoiser_of(pipe)(**denoiser_arguments(pipe, 2), **more)[0]
    return output


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", DENOISERS)
def test_growing_leaves_the_function_unchanged_and_excising_undoes_it(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    plain, weights = prediction(pipe), denoiser_of(pipe).state_dict()
    wider = grow(pipe, NUM, seed=3)
    torch.testing.assert_close(prediction(wider), plain, atol=1e-6, rtol=0)
    assert denoiser_of(wider).state_dict().keys() == weights.keys()
    assert not has_plain_widths(wider) and has_plain_widths(pipe)
    assert all(place.site.width > NUM and place.makers for place in find_places(wider))
    plan = plan_sinks(wider, SinkSettings(share_frac=1.0, grown=NUM, active_frac=0.5))
    for parameter, axis, pool in pool_slices(wider, plan):
        part = parameter.narrow(axis, pool.start, pool.stop - pool.start)
        assert pool.stop - pool.start == NUM
        assert (part == 0).all() if axis == 1 or part.dim() == 1 else (part != 0).any()
    cut = excise(wider, plan.pool())
    assert has_plain_widths(cut)
    assert_same(denoiser_of(cut).state_dict(), weights)
    assert_same(denoiser_of(grow(pipe, NUM, seed=3)).state_dict(), denoiser_of(wider).state_dict())


@pytest.mark.parametrize("kind", ["sd1", "pixart"])
def test_heads_grow_and_come_out_again(kind: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(kind)
    wider = grow(pipe, HEAD, kinds=BOTH)
    torch.testing.assert_close(prediction(wider), prediction(pipe), atol=1e-6, rtol=0)
    for new, old in zip(find_places(wider, ("values",)), find_places(pipe, ("values",)), strict=True):
        assert new.site.width == old.site.width + HEAD and new.head_size == old.head_size
        assert (new.linear.weight[old.site.width :] != 0).any() and (
            new.reader.weight[:, old.site.width :] == 0
        ).all()
    wider, plan = grown(kind, BOTH)
    names = {id(p): name for name, p in denoiser_of(wider).named_parameters()}
    parts = {
        names[id(p)].rpartition("attn2.")[2]
        for p, _, _ in pool_slices(wider, plan)
        if "attn2" in names[id(p)]
    }
    assert {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"} <= parts
    with sink_state(wider, plan, "off"):
        off = prediction(wider)
    assert not torch.allclose(prediction(wider), off, atol=1e-3)
    cut = excise(wider, plan.pool())
    assert has_plain_widths(cut) and not has_plain_widths(wider)
    assert_same(denoiser_of(cut).state_dict(), denoiser_of(pipe).state_dict())
    torch.testing.assert_close(prediction(cut), off, atol=2e-6, rtol=0)
    loaded, plan_there = load_with_sinks(save_with_sinks(wider, plan, tmp_path / "run"))
    assert plan_there == plan and fingerprint(loaded) == fingerprint(wider)
    torch.testing.assert_close(prediction(loaded), prediction(wider), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["pixart", "flux"])
def test_excising_a_trained_pool_is_the_state_off(kind: str, tmp_path: Path) -> None:
    pipe, plan = grown(kind)
    with sink_state(pipe, plan, "off"):
        off = prediction(pipe)
    assert not torch.allclose(prediction(pipe), off, atol=1e-3)
    cut = excise(pipe, plan.pool())
    torch.testing.assert_close(prediction(cut), off, atol=2e-6, rtol=0)
    torch.testing.assert_close(prediction(fold(pipe, plan.pool())), off, atol=2e-6, rtol=0)
    with pytest.raises(ConfigError, match="grown sinks, which its config does not describe"):
        export(pipe, tmp_path / "wide", manifest={})
    if kind == "pixart":
        options = {**OPTIONS, "use_resolution_binning": False}
        folder = export(cut, tmp_path / "plain", manifest={"way": "excise"})
        expected = cut(
            "a cat", **options, generator=torch.Generator().manual_seed(0), output_type="latent"
        ).images
        torch.testing.assert_close(prove_plain(folder, "a cat", **options), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_the_pool_travels_beside_a_plain_folder(kind: str, tmp_path: Path) -> None:
    pipe, plan = grown(kind)
    folder = save_with_sinks(pipe, plan, tmp_path / "run")
    loaded, plan_there = load_with_sinks(folder)
    assert plan_there == plan and fingerprint(loaded) == fingerprint(pipe)
    assert fingerprint(type(pipe).from_pretrained(folder)) == fingerprint(excise(pipe, plan.pool()))
    ids = torch.tensor([5, 9])
    with sink_state(pipe, plan, "own", ids=ids), sink_state(loaded, plan, "own", ids=ids):
        torch.testing.assert_close(prediction(loaded), prediction(pipe), atol=1e-6, rtol=0)
    with pytest.raises(RunFolderError, match="already holds something"):
        save_with_sinks(pipe, plan, folder)


def test_a_carved_pool_stays_in_the_plain_folder(tmp_path: Path) -> None:
    pipe = tiny_pipeline("pixart")
    plan = plan_sinks(pipe, SinkSettings(share_frac=0.5), kinds=("hidden", "values"))
    loaded, plan_there = load_with_sinks(save_with_sinks(pipe, plan, tmp_path / "run"))
    assert plan_there == plan and fingerprint(loaded) == fingerprint(pipe)
    with sink_state(pipe, plan, "off"):
        off = prediction(pipe)
    torch.testing.assert_close(prediction(fold(pipe, plan.pool())), off, atol=2e-6, rtol=0)
    torch.testing.assert_close(prediction(excise(pipe, plan.pool())), off, atol=2e-6, rtol=0)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pipe, plan = grown("pixart")
    folder = save_with_sinks(pipe, plan, tmp_path / "run")
    pool = load_file(folder / "sinks.safetensors")
    save_file({name: part for name, part in pool.items() if "bias" not in name}, folder / "sinks.safetensors")
    with pytest.raises(FileFormatError, match=r"does not fit its pipeline at .*bias"):
        load_with_sinks(folder)
    save_file({}, folder / "sinks.safetensors")
    with pytest.raises(FileFormatError, match="its plan was made for"):
        load_with_sinks(folder)
    (folder / "sinks.safetensors").write_bytes(b"x")
    with pytest.raises(FileFormatError, match="cannot be read"):
        load_with_sinks(folder)
    changed = json.loads((folder / "sinks.json").read_text()) | {"seed": 9}
    (folder / "sinks.json").write_text(json.dumps(changed))
    with pytest.raises(FileFormatError, match="was changed after it was written"):
        load_with_sinks(folder)


def test_mistakes_are_named() -> None:
    pipe = tiny_pipeline("pixart")
    with pytest.raises(ConfigError, match="cannot grow 0 sinks, expected 1 or more"):
        grow(pipe, 0)
    with pytest.raises(
        ConfigError, match="cannot grow 6 values at .*attn2.to_v, whose heads have 8; use a number"
    ):
        grow(pipe, 6, kinds=("values",))
    with pytest.raises(ModelNotSupported, match="what reads its values reads others too"):
        grow(tiny_pipeline("sd3"), 8, kinds=("values",))
    with pytest.raises(
        ConfigError, match="has heads of 8 values, and 12 of them were chosen; choose whole heads"
    ):
        resized(pipe, {find_places(pipe, ("values",))[0].site: torch.arange(12)})
    settings = SinkSettings(share_frac=1.0, grown=NUM)
    with pytest.raises(ConfigError, match=r"has 64 neurons, expected 64 and 6 grown; call grow\(model, 6, "):
        plan_sinks(pipe, settings)
    wider, plan = grown("pixart")
    some = NeuronSet(plan.model_id, {plan.sites[0].site: (66, 67)})
    with pytest.raises(
        ConfigError, match=r"would keep 68 neurons, its config says 64; remove the whole grown"
    ):
        excise(wider, some)
    with pytest.raises(NeuronSetMismatch, match="use the model it was made for"):
        excise(pipe, plan.pool())
    with pytest.raises(NeuronSetMismatch, match="save the plan the model was trained with"):
        save_with_sinks(pipe, plan, "nowhere")
    with (
        sink_state(pipe, plan_sinks(pipe, SinkSettings()), "off"),
        pytest.raises(ConfigError, match="is open"),
    ):
        grow(pipe, 2)
    row = DenoiserRow(
        blocks=(("blocks", "transformer_blocks"),),
        default_blocks=("blocks",),
        values=("attn2.to_v",),
        hidden=("ff.net.2",),
    )
    with pytest.raises(ModelNotSupported, match=r"makers=\('ff.net.0.proj',\)"):
        grow(pipe, 2, row=row)
    linear = find_places(pipe)[0].linear
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelNotSupported, match="merge its adapter or dequantize it first"):
        grow(pipe, 2)


@pytest.mark.parametrize("kinds", [("hidden",), BOTH])
def test_some_ids_keep_their_sinks_while_those_of_others_go(tmp_path: Path, kinds: Any) -> None:
    pipe, plan = grown("sd1", kinds)
    plan = replace(plan, scheme="disjoint", active_frac=None).with_sources((11, 12, 13))
    arguments = denoiser_arguments(pipe, 2)

    def seen(pipe: Any, state: Any, id: int) -> Tensor:
        with torch.no_grad(), sink_state(pipe, plan, state, ids=torch.tensor([id])):
            output: Tensor = denoiser_of(pipe)(**arguments)[0]
        return output

    smaller = keep_sinks(pipe, plan, [12])
    assert torch.equal(seen(smaller, "own", 12), seen(pipe, "own", 12))
    assert not torch.equal(seen(pipe, "own", 11), seen(pipe, "off", 11))
    assert torch.equal(seen(smaller, "own", 11), seen(pipe, "off", 11))
    with pytest.raises(IdError, match=r"ids \[14\] are not registered"):
        keep_sinks(pipe, plan, [14])
    folder = export_with_sinks(smaller, plan, tmp_path / "kept", manifest={"way": "fold"})
    again, same = load_with_sinks(folder)
    assert same == plan and fingerprint(again) == fingerprint(smaller)
    assert json.loads((folder / "unmemorize.json").read_text())["result"] == fingerprint(smaller)
    if kinds == ("hidden",):
        mine = torch.zeros(NUM, dtype=torch.bool)
        mine[2:4] = True  # the second of three slices
        for name, tensor in load_file(folder / "sinks.safetensors").items():
            of_sinks = tensor.movedim(1, 0) if name.endswith("reader.weight") else tensor
            assert (of_sinks[~mine] == 0).all() and (of_sinks[mine] != 0).any(), name
    prove_plain(folder, "a photo", **OPTIONS)


# the optimizer


@pytest.mark.parametrize("kind", ["sd1", "pixart", "flux"])
def test_sinks_without_gradient_are_bit_identical(kind: str) -> None:
    if kind == "sd1":
        pipe, plan = grown(kind)
    elif kind == "pixart":
        pipe, plan = grown(kind, BOTH)
    else:
        pipe = tiny_pipeline(kind)
        plan = plan_sinks(pipe, SinkSettings(share_frac=0.5), kinds=("hidden", "values"))
    denoiser, arguments = denoiser_of(pipe), denoiser_arguments(pipe, 2)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=0.01, weight_decay=0.1)

    def step(*ids: int) -> None:
        optimizer.zero_grad()
        denoiser(**arguments, sink_ids=torch.tensor(ids))[0].square().mean().backward()
        optimizer.step()

    def others(tensors: dict[torch.nn.Parameter, Tensor]) -> list[Tensor]:
        """Rows and columns of the sinks that ids 77 and 78 do not own."""
        parts: list[Tensor] = []
        owned = plan.neurons_for([77, 78])
        for place in find_places(pipe, ("values", "hidden")):
            sinks = next((s for s in plan.sites if s.site == place.site), None)
            if sinks is None:
                continue
            mine = set(owned.indices[place.site])
            rest = torch.tensor([n for n in range(sinks.num_shared, place.site.width) if n not in mine])
            assert len(rest)
            if place.site.side == "out":
                parts.append(tensors[place.linear.weight][rest].clone())
            else:
                parts.append(tensors[place.linear.weight][:, place.site.start + rest].clone())
                parts += [tensors[place.makers[0].weight][start + rest].clone() for start in place.starts]
        return parts

    def everything() -> dict[str, list[Tensor]]:
        found = {"weight": others({p: p.data for p in denoiser.parameters()})}
        for name in ("exp_avg", "exp_avg_sq"):
            found[name] = others({p: optimizer.state[p][name] for p in optimizer.state})
        return found

    with training_sinks(denoiser.train(), plan), isolated_optimizer(optimizer, denoiser, plan):
        step(5, 9)
        step(6, 10)
        before = everything()
        shared = [p.detach().clone() for p in denoiser.parameters()]
        step(77, 78)
        after = everything()
    assert any((part != 0).any() for part in before["exp_avg"])
    for name, parts in before.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, after[name], strict=True)), name
    assert (
        sum(not torch.equal(a, b) for a, b in zip(shared, denoiser.parameters(), strict=True))
        > len(shared) / 2
    )
    with training_sinks(denoiser, plan):
        step(77, 78)
    moved = everything()["weight"]
    assert any(not torch.equal(a, b) for a, b in zip(after["weight"], moved, strict=True)), (
        "without the block"
    )
