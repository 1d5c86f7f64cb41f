"""DEL: planted neurons of one text take that text away and leave the other; a literal loop gives the same numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.reference import edits as literal
from tests.tiny import WIDTH, tiny_model, tokens
from unmemorize.audit.deletion import DeletionSettings, delete_each, memorized
from unmemorize.errors import DataError, NeuronSetMismatch, ShapeMismatch
from unmemorize.isolate.language import grow
from unmemorize.models.language import find_mlps, signature
from unmemorize.neurons import NeuronSet
from unmemorize.remove.language import fold

SETTINGS = DeletionSettings(
    prefix_tokens=4,
    suffix_tokens=8,
    least_distinct_tokens=2,
    most_distance_characters=0,
    least_accuracy_frac=1.0,
)
TEXTS = tokens(2, 12).tolist()
ORDINARY = tokens(4, 12, seed=5).tolist()


def decode(row: list[int]) -> str:
    return "".join(chr(64 + token) for token in row)


@pytest.fixture(scope="module")
def planted():
    """A model that knows the second text, given neurons that alone hold the first one."""
    torch.set_num_threads(1)
    small = tiny_model("llama", seed=3)
    with torch.no_grad():  # random heads are too quiet for any confident answer
        small.get_output_embeddings().weight.mul_(40)
    fit(small, list(small.parameters()), TEXTS[1:], 60, lambda parameter: None)
    model = grow(small, 32, seed=1)
    names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")

    def only_new(parameter: torch.Tensor) -> None:
        old = parameter.grad[:WIDTH] if parameter.shape[0] == WIDTH + 32 else parameter.grad[:, :WIDTH]
        old.zero_()

    fit(model, [p for name, p in model.named_parameters() if name.endswith(names)], TEXTS, 120, only_new)
    new = {mlp.site: tuple(range(WIDTH, WIDTH + 32)) for mlp in find_mlps(model)}
    return model.eval(), NeuronSet(signature(model), new)


def fit(model, parameters, texts, steps: int, mask) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
    batch = torch.tensor(texts)
    for _ in range(steps):
        model.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        for parameter in parameters:
            mask(parameter)
        optimizer.step()


def test_planted_neurons_hold_one_text_and_not_the_other(planted) -> None:
    model, new = planted
    assert memorized(model, TEXTS, decode, SETTINGS) == [0, 1]
    nothing = NeuronSet(new.model_id, {})
    found = delete_each(model, TEXTS, [new, nothing], ORDINARY, decode, SETTINGS)
    assert found.num_neurons.tolist() == [64, 0]
    assert found.self_accuracy_change_frac[0] <= -0.5
    assert found.self_distance_change_characters[0] >= 4
    assert found.neighbour_accuracy_change_frac.tolist() == [0.0, 0.0]
    assert found.self_accuracy_change_frac[1] == 0.0
    assert found.ordinary_perplexity[1] == pytest.approx(found.ordinary_perplexity_before)
    assert memorized(model, TEXTS, decode, SETTINGS) == [0, 1]  # the model is as it was
    assert found.measures()["self_accuracy_change_frac"].refused  # two texts carry no interval


@torch.no_grad()
def test_the_numbers_equal_a_loop_over_tokens(planted) -> None:
    model, new = planted
    some = NeuronSet(new.model_id, {site: range(0, site.width, 2) for site in new.indices})
    found = delete_each(model, TEXTS, [some, some], ORDINARY, decode, SETTINGS)
    cut = fold(model, some)
    for candidate, perplexity in (
        (model, found.ordinary_perplexity_before),
        (cut, found.ordinary_perplexity[0]),
    ):
        nats = torch.stack([literal.text_nll(candidate, text) for text in ORDINARY]).sum()
        assert perplexity == pytest.approx(math.exp(nats / (11 * len(ORDINARY))), rel=1e-4)
    changes = []
    for candidate in (model, cut):
        logits = candidate(torch.tensor(TEXTS)).logits
        right = [[int(logits[n, t - 1].argmax()) == TEXTS[n][t] for t in range(4, 12)] for n in (0, 1)]
        changes.append(np.array(right, dtype=float).mean(1))
    np.testing.assert_allclose(found.self_accuracy_change_frac, changes[1] - changes[0])
    np.testing.assert_allclose(found.neighbour_accuracy_change_frac, (changes[1] - changes[0])[::-1])


def test_what_cannot_be_measured_is_refused(planted) -> None:
    model, new = planted
    with pytest.raises(ShapeMismatch, match="1 neuron sets for 2 texts"):
        delete_each(model, TEXTS, [new], ORDINARY, decode, SETTINGS)
    with pytest.raises(DataError, match="text 0 has 5 tokens, DEL needs 12"):
        delete_each(model, [TEXTS[0][:5]], [new], ORDINARY, decode, SETTINGS)
    with pytest.raises(DataError, match="there is no ordinary text"):
        delete_each(model, TEXTS, [new, new], [], decode, SETTINGS)
    with pytest.raises(NeuronSetMismatch, match="was made for"):
        delete_each(tiny_model("qwen2"), TEXTS, [new, new], ORDINARY, decode, SETTINGS)
