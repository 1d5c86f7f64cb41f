"""Localizers of language models: every method equals its definition, on gated and ungated models."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.reference import attribution as reference
from tests.tiny import FAMILIES, VOCABULARY, tiny_model, tokens
from unmemorize.corpus.memorized import MemorizedExample, cut_examples
from unmemorize.errors import ConfigError, DataError, NeuronSetMismatch, RunFolderError
from unmemorize.gates import closed, gated
from unmemorize.localize.language import METHODS, LocalizeSettings, localize, localize_each, localize_into
from unmemorize.localize.masks import MaskSettings
from unmemorize.localize.methods import COMPARED
from unmemorize.localize.neuron_scores import NeuronScores
from unmemorize.localize.neuron_statistics import NeuronStatistics
from unmemorize.localize.ordinary import collect_statistics
from unmemorize.localize.outliers import mean_activations
from unmemorize.localize.suffix import measured
from unmemorize.models.language import find_mlps
from unmemorize.neurons import NeuronSet
from unmemorize.records import Progress

torch.set_num_threads(1)

GATED = ("llama", "qwen2", "gemma2")
UNGATED = ("gpt2", "gpt_neo", "gpt_neox", "opt")
FORCED = LocalizeSettings(is_forced=True)


def example(seed: int = 0, prefix: int = 3, suffix: int = 4) -> MemorizedExample:
    row = tokens(1, prefix + suffix, seed=seed)[0].tolist()
    return cut_examples([row], prefix, suffix, names=[f"text {seed}"])[0]


def parts(family: str) -> tuple[Any, list[torch.nn.Module], MemorizedExample, tuple[tuple[int, ...], ...]]:
    model = tiny_model(family).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # effects of single neurons well above rounding
    one = example()
    return model, [mlp.down for mlp in find_mlps(model)], one, (one.prefix, one.suffix)


def assert_close(scores: NeuronScores, expected: Any, tolerance: float = 1e-5) -> None:
    wanted = torch.stack([torch.as_tensor(row) for row in expected])
    assert torch.stack(scores.values).std() > 0
    scale = float(wanted.abs().max())
    torch.testing.assert_close(torch.stack(scores.values), wanted, rtol=1e-3, atol=tolerance * scale)


# Definitions


@pytest.mark.parametrize("family", GATED + UNGATED)
def test_passes_equal_their_definitions(family: str) -> None:
    model, downs, one, pair = parts(family)
    few = replace(FORCED, num_points=4, batch_size=5)
    for reading in ("absolute", "signed"):
        scores = localize(model, [one], "activations", replace(FORCED, reading=reading))  # type: ignore[arg-type]
        assert_close(scores, reference.activation_scores(model, downs, pair, is_signed=reading == "signed"))
    assert_close(
        localize(model, [one], "gradient", FORCED), reference.gradient_scores(model, downs, pair), 1e-4
    )
    assert_close(localize(model, [one], "zero-out", few), reference.zero_out_scores(model, downs, pair), 1e-4)
    for method in ("integrated-gradients", "integrated-gradients-together"):
        expected = reference.integrated_scores(model, downs, pair, 4, is_together=method.endswith("together"))
        assert_close(localize(model, [one], method, few), expected, 1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2", "opt"))
def test_learned_masks_equal_their_definitions(family: str) -> None:
    model, downs, one, pair = parts(family)
    mask = MaskSettings(price_nats=0.02, learning_rate=0.05, max_steps=12, open_frac=0.45)
    settings = replace(FORCED, slimming=mask, hard_concrete=replace(mask, initial_open_frac=0.6), seed=3)
    common = {"price": 0.02, "rate": 0.05, "steps": 12, "open_frac": 0.45}
    slim = reference.slimming_scores(model, downs, pair, **common)  # type: ignore[arg-type]
    assert_close(localize(model, [one], "slimming", settings), slim, 1e-3)
    hard = reference.hard_concrete_scores(
        model,
        downs,
        pair,
        **common,
        initial=0.6,
        beta=2 / 3,
        seed=3,  # type: ignore[arg-type]
    )
    assert_close(localize(model, [one], "hard-concrete", settings), hard, 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_the_first_order_form_of_zero_out(family: str) -> None:
    model, one = tiny_model(family).eval(), example()
    scores = localize(model, [one], "gradient", FORCED)
    best = scores.top(count=1)
    step = 1e-3
    for site, (index,) in best.indices.items():
        losses = []
        for scale in (1 + step, 1 - step):
            with gated(model, closed(NeuronSet(scores.model_id, {site: (index,)}), scale=scale)):
                losses.append(float(measured(model, [one])[0]))
        slope = (losses[1] - losses[0]) / (2 * step)
        layer = scores.sites.index(site)
        assert slope == pytest.approx(float(scores.values[layer][index]), rel=0.05, abs=2e-3)


def every_kind(model: PreTrainedModel, texts: list[list[int]]) -> dict[str, NeuronStatistics]:
    return {kind: collect_statistics(model, texts, quantity=kind) for kind in COMPARED.values()}


def test_several_examples_are_averaged_and_batches_do_not_matter() -> None:
    model = tiny_model("qwen2")
    examples = [example(seed, prefix, suffix) for seed, prefix, suffix in ((0, 3, 4), (1, 2, 7), (2, 5, 2))]
    statistics = every_kind(model, tokens(5, 9).tolist())
    quick = replace(FORCED, num_points=3)
    for method in METHODS:
        if method in ("random", "magnitude", "slimming", "hard-concrete"):
            continue
        extra = {"statistics": statistics[COMPARED[method]]} if method in COMPARED else {}
        single = list(localize_each(model, examples, method, quick, **extra))
        mean = torch.stack([torch.stack(one.values) for one in single]).mean(0)
        for batch_size in (1, 2, 8):
            together = localize(model, examples, method, replace(quick, batch_size=batch_size), **extra)
            torch.testing.assert_close(torch.stack(together.values), mean, rtol=1e-3, atol=1e-5)
        assert together.cost.forward_equivalents == pytest.approx(
            sum(one.cost.forward_equivalents for one in single)
        )


def test_several_draws_a_step_are_different_masks() -> None:
    model, one = tiny_model("llama"), example()
    mask = MaskSettings(price_nats=0.01, max_steps=3, num_draws=4)
    many = localize(model, [one], "hard-concrete", replace(FORCED, hard_concrete=mask))
    single = localize(
        model, [one], "hard-concrete", replace(FORCED, hard_concrete=replace(mask, num_draws=1))
    )
    assert not torch.equal(many.values[0], single.values[0])
    assert many.cost.forward_equivalents == 4 * single.cost.forward_equivalents == 24


def test_zero_out_of_the_best_candidates_leaves_the_others_unexamined() -> None:
    model, one = tiny_model("gpt2"), example()
    full = localize(model, [one], "zero-out", FORCED)
    part = localize(model, [one], "zero-out", replace(FORCED, num_candidates=7))
    chosen = localize(model, [one], "gradient", FORCED).ranked()[:7]
    assert sorted(part.ranked()) == sorted(chosen)
    for layer, index in chosen:
        assert part.values[layer][index] == pytest.approx(float(full.values[layer][index]), abs=1e-6)
    assert len(part.top(1.0)) == 7
    assert part.cost.forward_equivalents == 2 + 8


def test_excluded_layers_are_left_alone() -> None:
    model, downs, one, pair = parts("llama")
    mask = MaskSettings(price_nats=0.02, learning_rate=0.05, max_steps=12, open_frac=0.45)
    settings = replace(FORCED, slimming=mask, num_points=3, exclude_layers=(0,))
    slim = reference.slimming_scores(model, downs[1:], pair, price=0.02, rate=0.05, steps=12, open_frac=0.45)
    found = localize(model, [one], "slimming", settings)
    torch.testing.assert_close(found.values[1], slim[0], rtol=1e-3, atol=1e-3)
    statistics = every_kind(model, tokens(4, 6).tolist())
    for method in METHODS:
        extra = {"statistics": statistics[COMPARED[method]]} if method in COMPARED else {}
        few = replace(settings, num_candidates=5 if method == "zero-out" else None)
        scores = localize(model, [one], method, few, **extra)
        assert {layer for layer, _ in scores.ranked()} == {1}, method
        if method in ("activations", "gradient", "outliers", "integrated-gradients"):
            whole = localize(model, [one], method, replace(few, exclude_layers=()), **extra)
            assert torch.allclose(whole.values[1], scores.values[1], rtol=1e-4, atol=1e-7)
    for bad in ((2,), (0, 1)):
        with pytest.raises(
            ConfigError, match=r"exclude_layers is \(.*\); expected numbers from 0 to 1, and not all"
        ):
            localize(model, [one], "gradient", replace(FORCED, exclude_layers=bad))


# Dtypes, modes, seeds


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_gives_float32_scores_near_the_full_ones(dtype: torch.dtype) -> None:
    model, one = tiny_model("llama"), example()
    half = copy.deepcopy(model).to(dtype)
    full = {method: localize(model, [one], method, FORCED) for method in ("activations", "gradient")}  # type: ignore[arg-type]
    for method, scores in full.items():
        rough = localize(half, [one], method, FORCED)  # type: ignore[arg-type]
        assert rough.values[0].dtype == torch.float32
        pair = torch.stack([torch.cat(scores.values), torch.cat(rough.values)])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.99
    few = MaskSettings(price_nats=0.01, max_steps=2)
    settings = replace(FORCED, slimming=few, hard_concrete=few, num_candidates=3, num_points=2)
    for method in ("slimming", "hard-concrete", "zero-out", "integrated-gradients-together"):
        assert localize(half, [one], method, settings).values[0].dtype == torch.float32  # type: ignore[arg-type]


def test_the_model_is_left_as_it_was() -> None:
    model, one = tiny_model("llama"), example()
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    few = MaskSettings(price_nats=0.01, max_steps=2)
    settings = replace(FORCED, slimming=few, hard_concrete=few, num_candidates=3, num_points=2)
    statistics = every_kind(model, tokens(3, 5).tolist())
    for method in METHODS:
        extra = {"statistics": statistics[COMPARED[method]]} if method in COMPARED else {}
        localize(model, [one], method, settings, **extra)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_controls_and_seeds() -> None:
    model, one = tiny_model("gpt2"), example()
    few = replace(FORCED, hard_concrete=MaskSettings(price_nats=0.01, max_steps=3))
    for method in ("random", "hard-concrete"):
        first, again, other = (
            localize(model, [one], method, replace(few, seed=seed)).values[0]  # type: ignore[arg-type]
            for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    norms = localize(model, [one], "magnitude", FORCED)
    written = reference.written_vector(find_mlps(model)[1].down, 5)
    assert float(norms.values[1][5]) == pytest.approx(float(written.norm()), rel=1e-5)
    assert norms.cost.forward_equivalents == 0


# Outliers


@pytest.mark.parametrize("family", ("llama", "opt"))
def test_outliers_equal_z_scores_of_each_text_by_itself(family: str) -> None:
    model, one = tiny_model(family).eval(), example()
    downs = [mlp.down for mlp in find_mlps(model)]
    texts = [
        row[:length] for row, length in zip(tokens(6, 9, seed=4).tolist(), (9, 4, 1, 7, 9, 2), strict=True)
    ]
    rows = torch.stack(
        [
            torch.stack([a.abs().mean(0) for a in reference.activations_at(model, downs, text)])
            for text in texts
        ]
    )
    statistics = collect_statistics(model, texts, batch_size=4)
    torch.testing.assert_close(torch.stack(statistics.means).float(), rows.mean(0), rtol=1e-4, atol=1e-6)
    own = torch.stack([a.abs().mean(0) for a in reference.activations_at(model, downs, one.tokens)])
    scores = localize(model, [one], "outliers", FORCED, statistics=statistics)
    expected = ((own - rows.mean(0)) / rows.std(0)).abs()
    is_dead = rows.std(0) == 0  # the definition is silent where ordinary activations do not vary
    expected[is_dead] = torch.where(own == rows.mean(0), 0.0, torch.inf)[is_dead]
    torch.testing.assert_close(torch.stack(scores.values), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_contrast_equals_its_definition(family: str) -> None:
    model, downs, one, pair = parts(family)
    texts = [row[:length] for row, length in zip(tokens(4, 9, seed=4).tolist(), (9, 4, 2, 7), strict=True)]
    statistics = collect_statistics(model, texts, quantity="derivative", batch_size=3)
    scores = localize(model, [one], "contrast", FORCED, statistics=statistics)
    assert_close(scores, reference.contrast_scores(model, downs, pair, texts), 1e-3)
    assert scores.cost.forward_equivalents == 2


def test_statistics_continue_from_their_file_and_refuse_other_texts(tmp_path: Path) -> None:
    model, texts = tiny_model("llama"), tokens(6, 9).tolist()
    path = tmp_path / "statistics.safetensors"
    collect_statistics(model, texts[:4], batch_size=2, path=path)
    whole = collect_statistics(model, texts, batch_size=2, path=path)
    straight = collect_statistics(model, texts, batch_size=3)
    assert (whole.count, whole.digest) == (6, straight.digest)
    torch.testing.assert_close(whole.means[0], straight.means[0], rtol=1e-5, atol=1e-8)
    with pytest.raises(DataError, match="was made from other texts"):
        collect_statistics(model, texts[::-1], path=path)
    with pytest.raises(NeuronSetMismatch, match="was made for activation of .* expected derivative of"):
        collect_statistics(model, texts, quantity="derivative", path=path)
    with pytest.raises(NeuronSetMismatch, match="was made for activation of language/llama"):
        collect_statistics(tiny_model("llama", seed=1), texts, path=path)
    with pytest.raises(DataError, match="1 texts give no standard deviation"):
        collect_statistics(model, texts[:1])
    with pytest.raises(NeuronSetMismatch, match="the activation statistics are for language/llama"):
        other = tiny_model("llama", seed=1)
        localize(other, [example()], "outliers", FORCED, statistics=straight)
    assert mean_activations(model, whole.sites, [texts[0]])[0].shape == (1, whole.sites[0].width)


# Folders, errors, progress


def test_a_run_continues_and_equals_a_straight_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    examples = [example(seed) for seed in range(3)]
    straight = list(localize_each(model, examples, "gradient", FORCED))
    localize_into(tmp_path, model, examples[:2], "gradient", FORCED)
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.glob("scores/*")}
    found = localize_into(tmp_path, model, examples, "gradient", FORCED)
    assert len(stored) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in stored.items())
    for one, other in zip(found, straight, strict=True):
        assert one.examples == other.examples
        assert torch.equal(one.values[1], other.values[1])
    with pytest.raises(RunFolderError, match=r"holds another run \(method differ\)"):
        localize_into(tmp_path, model, examples, "activations", FORCED)
    with pytest.raises(RunFolderError, match=r"holds another run \(model_id differ\)"):
        localize_into(tmp_path, tiny_model("llama", seed=1), examples, "gradient", FORCED)


def test_mistakes_are_explained() -> None:
    model, one = tiny_model("llama"), example()
    with pytest.raises(
        DataError, match=r"recites 0 of 1 examples \(the best goes wrong after \d+% of its suffix\)"
    ):
        localize(model, [one], "gradient")
    with pytest.raises(DataError, match="no examples to localize"):
        localize(model, [], "gradient")
    with pytest.raises(DataError, match="example 0 has 70 tokens, the model's context holds 64"):
        localize(model, [example(prefix=35, suffix=35)], "gradient")
    with pytest.raises(DataError, match=f"example 0 holds token 99, the model's vocabulary has {VOCABULARY}"):
        localize(model, [MemorizedExample(prefix=(3, 99), suffix=(4,))], "gradient")
    with pytest.raises(ConfigError, match="unknown method 'magic'; expected one of random, magnitude"):
        localize(model, [one], "magic")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match="'outliers' compares with ordinary text and got none; pass statistics="
    ):
        localize(model, [one], "outliers", FORCED)
    statistics = collect_statistics(model, tokens(3, 5).tolist())
    with pytest.raises(
        ConfigError, match="'contrast' compares with ordinary text and got statistics of activ"
    ):
        localize(model, [one], "contrast", FORCED, statistics=statistics)
    with pytest.raises(DataError, match="an ordinary text has one token and no loss"):
        collect_statistics(model, [[3], [4, 5]], quantity="derivative")
    with pytest.raises(ConfigError, match="'gradient' takes no statistics"):
        localize(model, [one], "gradient", FORCED, statistics=statistics)
    with pytest.raises(ConfigError, match="batch_size 0 and num_candidates None"):
        LocalizeSettings(batch_size=0)
    with pytest.raises(ConfigError, match="candidate_method is 'zero-out'"):
        LocalizeSettings(candidate_method="zero-out")
    with pytest.raises(ConfigError, match="integrated gradients over 1 points"):
        localize(model, [one], "integrated-gradients", replace(FORCED, num_points=1))
    for bad in (
        {"price_nats": 0.0},
        {"price_nats": 1.0, "max_steps": 0},
        {"price_nats": 1.0, "open_frac": 1.0},
    ):
        with pytest.raises(ConfigError, match="of a mask|a mask of|gates start"):
            MaskSettings(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="gates start open by"):
        MaskSettings(price_nats=1.0, initial_open_frac=1.0)


def test_progress_is_told() -> None:
    model, told = tiny_model("llama"), list[Progress]()
    few = replace(FORCED, num_points=2, slimming=MaskSettings(price_nats=0.01, max_steps=2))
    for method in ("gradient", "zero-out", "integrated-gradients", "slimming"):
        told.clear()
        localize(model, [example()], method, few, progress=told.append)  # type: ignore[arg-type]
        assert told[-1].done == told[-1].total > 0
    told.clear()
    list(localize_each(model, [example(0), example(1)], "magnitude", FORCED, progress=told.append))
    assert [(one.stage, one.done, one.total) for one in told] == [("localize", 1, 2), ("localize", 2, 2)]
