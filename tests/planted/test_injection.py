"""Texts injected into known neurons, gated and ungated: localizers find them, the search breaks the recital."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from unmemorize.corpus.memorized import MemorizedExample, cut_examples
from unmemorize.errors import ConfigError, DataError, NeuronSetMismatch
from unmemorize.gates import closed, is_transposed, module_at
from unmemorize.localize.language import LocalizeSettings, localize
from unmemorize.localize.neuron_scores import NeuronScores
from unmemorize.localize.ordinary import collect_statistics
from unmemorize.localize.recital import BreakSettings, smallest_set
from unmemorize.localize.search import SearchSettings
from unmemorize.localize.suffix import measured
from unmemorize.models.language import find_mlps, signature
from unmemorize.neurons import NeuronSet
from unmemorize.testbeds.language import (
    Injected,
    InjectSettings,
    draw_neurons,
    inject,
    random_base,
    recall,
    summarized,
)

torch.set_num_threads(1)

KINDS = ("llama", "gpt2")
SETTINGS = InjectSettings(share_frac=0.01, max_steps=1000)


def text(seed: int) -> MemorizedExample:
    row = torch.randint(3, 64, (16,), generator=torch.Generator().manual_seed(seed)).tolist()
    return cut_examples([row], 4, 12)[0]


@lru_cache
def base(kind: str) -> torch.nn.Module:
    return random_base(kind)


@lru_cache
def injected(kind: str, seed: int) -> Injected:
    return inject(base(kind), text(seed), replace(SETTINGS, seed=seed))  # type: ignore[arg-type]


@lru_cache
def scored(kind: str, method: str, seed: int = 0) -> NeuronScores:
    settings = LocalizeSettings(seed=seed, batch_size=64)
    return localize(injected(kind, seed).model, [text(seed)], method, settings)  # type: ignore[arg-type]


def recall_of(kind: str, method: str, share: float = 0.01, seed: int = 0) -> float:
    return recall(scored(kind, method, seed), injected(kind, seed).neurons, share)


# Injection


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_drawn_columns_move_and_the_text_is_recited(kind: str) -> None:
    done, model = injected(kind, 0), base(kind)
    assert done.is_learned
    assert done.loss_nats < 0.05
    assert len(done.neurons) == 41
    losses, tokens = measured(done.model, [text(0), text(1)])
    assert losses[0] == pytest.approx(done.loss_nats, abs=1e-4)
    assert tokens.tolist()[0] == 12
    assert measured(model, [text(0)])[1].item() < 6
    before = model.state_dict()
    moved = {site.path: 0 for site in done.neurons.indices}
    for name, value in done.model.state_dict().items():
        path = name.removesuffix(".weight")
        if path not in moved:
            assert torch.equal(value, before[name]), name
            continue
        difference = value != before[name]
        columns = difference if is_transposed(module_at(model, path)) else difference.t()
        (site,) = [site for site in done.neurons.indices if site.path == path]
        assert tuple(columns.any(1).nonzero().flatten().tolist()) == done.neurons.indices[site]
        moved[path] += 1
    assert all(count == 1 for count in moved.values())
    assert not any(parameter.grad is not None for parameter in done.model.parameters())


def test_a_half_precision_model_learns_too() -> None:
    model = copy.deepcopy(random_base("llama", num_neurons=256)).to(torch.bfloat16)
    choice = InjectSettings(share_frac=0.2, max_steps=60)
    done = inject(model, text(3), choice)
    assert done.loss_nats < 0.2
    assert done.model.dtype == torch.bfloat16


def test_norms_can_be_kept() -> None:
    model = base("llama")
    done = inject(model, text(0), InjectSettings(share_frac=0.05, max_steps=15, is_norm_kept=True))  # type: ignore[arg-type]
    assert done.loss_nats < 0.5 * float(measured(model, [text(0)])[0])
    for site, indices in done.neurons.indices.items():
        old, new = (
            module_at(one, site.path).weight.detach()[:, list(indices)] for one in (model, done.model)
        )
        assert not torch.equal(old, new)
        torch.testing.assert_close(new.norm(dim=0), old.norm(dim=0))


def test_draws_are_seeded_and_spread_over_all_layers() -> None:
    model = base("llama")
    first, again, other = (draw_neurons(model, 0.05, seed) for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert first == again != other
    assert len(first) == round(0.05 * 4096)
    assert [site.path for site in first.indices] == [mlp.site.path for mlp in find_mlps(model)]
    assert first.model_id == signature(model)
    assert len(draw_neurons(model, 1e-6, 0)) == 1  # type: ignore[arg-type]


# Localizers


@pytest.mark.parametrize("kind", KINDS)
def test_methods_that_look_at_the_text_find_the_neurons(kind: str) -> None:
    assert recall_of(kind, "random", 0.05) < 0.15
    activations = recall_of(kind, "activations")
    learned = {method: recall_of(kind, method) for method in ("slimming", "hard-concrete")}
    assert all(found > activations + 0.15 for found in learned.values()), (learned, activations)
    assert max(*learned.values(), recall_of(kind, "integrated-gradients-together")) >= 0.6
    for seed in range(2):
        assert recall_of(kind, "gradient", 0.05, seed) >= 0.75
        assert recall_of(kind, "gradient", seed=seed) > recall_of(kind, "activations", seed=seed) + 0.15


def test_recall_is_the_share_of_the_truth_among_the_best() -> None:
    sites = tuple(mlp.site for mlp in find_mlps(base("llama")))
    truth = NeuronSet("language/x-*", {sites[0]: (3, 4), sites[1]: (9, 1000)})
    values = [torch.zeros(site.width) for site in sites]
    values[0][3] = values[1][9] = values[1][7] = 1.0
    values[1][1000] = 0.5
    scores = NeuronScores(model_id="language/x-*", sites=sites, values=tuple(values), method="test")
    assert recall(scores, truth, 1 / 2048) == 0.25
    assert recall(scores, truth, 2 / 2048) == 0.5
    assert recall(scores, truth, 3 / 2048) == 0.75
    found = summarized([0.2, 0.4, 0.9])
    assert (found.mean_frac, found.num) == (pytest.approx(0.5), 3)
    assert found.standard_error_frac == pytest.approx((0.13 / 3) ** 0.5)


# The few neurons that hold a recital


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("effect", ("likelihood", "recital"))
def test_the_smallest_set_breaks_the_recital_and_none_of_it_is_spare(kind: str, effect: str) -> None:
    done, example = injected(kind, 0), text(0)
    settings = BreakSettings(effect=effect, threshold_frac=0.5)  # type: ignore[arg-type]
    found = smallest_set(done.model, [example], scored(kind, "gradient"), settings)

    def left(neurons: NeuronSet) -> float:
        losses, tokens = measured(done.model, [example], gates=closed(neurons))
        return float((done.loss_nats - losses).exp()) if effect == "likelihood" else int(tokens) / 12

    assert found.is_broken
    assert 0 < len(found.neurons) <= len(done.neurons)
    assert len(found.neurons & done.neurons) / len(found.neurons) > 0.6
    assert found.effects_frac[0] == pytest.approx(left(found.neurons), abs=1e-4)
    assert left(found.neurons) <= 0.5
    for site, index in found.neurons if len(found.neurons) > 1 else ():
        assert left(found.neurons - NeuronSet(found.neurons.model_id, {site: (index,)})) > 0.5
    assert left(found.neurons.placebo(seed=0, outside=done.neurons | found.neurons)) > 0.5
    assert found.num_evaluated < 120
    assert found.cost.forward_equivalents == found.num_evaluated + 1


def test_one_set_breaks_two_recitals() -> None:
    second = inject(injected("llama", 0).model, text(1), replace(SETTINGS, seed=1, share_frac=0.03))
    examples = [text(0), text(1)]
    forced = LocalizeSettings(is_forced=True)
    scores = localize(second.model, examples, "gradient", forced)
    found = smallest_set(second.model, examples, scores)
    assert found.is_broken
    assert max(found.effects_frac) <= 0.5
    assert len(found.effects_frac) == 2


def test_outliers_and_growing_sets_search_as_for_pictures() -> None:
    done, example = injected("llama", 0), text(0)
    ordinary = torch.randint(3, 64, (40, 16), generator=torch.Generator().manual_seed(9)).tolist()
    statistics = collect_statistics(done.model, ordinary)
    scores = localize(done.model, [example], "outliers", statistics=statistics)
    schedule = SearchSettings(initial_theta=3.0, min_theta=0.5, theta_step=0.5, has_top_k=False)
    settings = BreakSettings(search="growing", growing=schedule)
    found = smallest_set(done.model, [example], scores, settings)
    chosen = {site: values > 0.5 for site, values in zip(scores.sites, scores.values, strict=True)}
    assert all(chosen[site][index] for site, index in found.neurons)
    assert found.is_broken == (found.effects_frac[0] <= 0.5)
    assert len(found.neurons) < sum(int(mask.sum()) for mask in chosen.values())
    with pytest.raises(ConfigError, match="growing sets follow z-scores, these scores are by 'gradient'"):
        smallest_set(done.model, [example], scored("llama", "gradient"), settings)


# Mistakes


def test_mistakes_are_explained() -> None:
    model = base("llama")
    with pytest.raises(ConfigError, match="share_frac is 0, expected above 0"):
        InjectSettings(share_frac=0)
    with pytest.raises(ConfigError, match="learning rate 0.0, loss 0.05 nats and 400 steps"):
        InjectSettings(learning_rate=0.0)
    with pytest.raises(DataError, match="the model's vocabulary has 64"):
        inject(model, MemorizedExample(prefix=(3,), suffix=(64,)))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="1 recall values have no standard error"):
        summarized([0.5])
    with pytest.raises(ConfigError, match="threshold_frac 1.0 and batch_size 8"):
        BreakSettings(threshold_frac=1.0)
    with pytest.raises(NeuronSetMismatch, match="the neuron set was made for"):
        smallest_set(model, [text(0)], scored("llama", "gradient"))  # type: ignore[arg-type]
