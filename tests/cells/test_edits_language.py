"""Weight edits end to end on tiny models: against literal references, as identities, on memory, and undone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.reference import edits as literal
from tests.tiny import FAMILIES, VOCABULARY, tiny_model, tokens
from unmemorize.errors import (
    CheckpointMismatch,
    ConfigError,
    DataError,
    FileFormatError,
    NeuronSetMismatch,
    RunFolderError,
)
from unmemorize.models.language import find_mlps, fingerprint, signature
from unmemorize.neurons import NeuronSet
from unmemorize.remove.changes import changed_values, undo_path
from unmemorize.remove.curvature import collect_factors, drawn_labels, load_factors
from unmemorize.remove.language import fold, prove_plain
from unmemorize.remove.language_edits import edit, export_edit, undone
from unmemorize.remove.matrices import chosen_layers, find_matrices
from unmemorize.remove.settings import (
    METHODS,
    CurvatureSettings,
    FoldSettings,
    OutputVectorSettings,
    SubnetSettings,
    SvdSettings,
    UnlearningSettings,
)
from unmemorize.remove.subnet import initial_scores, subnet_loss

LAYOUTS = (
    "llama",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi3",
    "gemma2",
)  # gated, transposed, plain, with biases, fused
TARGETS = tokens(3, 12).tolist()
RETAIN = [*tokens(5, 14, seed=1).tolist(), *tokens(3, 9, seed=2).tolist()]


def some_neurons(model) -> NeuronSet:
    return NeuronSet(signature(model), {mlp.site: (1, 5) for mlp in find_mlps(model)})


def weak(method: str, model):
    """Settings under which a method changes nothing."""
    return {
        "fold": FoldSettings(neurons=some_neurons(model), scale=1.0),
        "svd": SvdSettings(drop_gate_frac=0.0, drop_up_frac=0.0, drop_down_frac=0.0),
        "curvature": CurvatureSettings(keep_frac=1.0),
        "subnet": SubnetSettings(drop_frac=0.0, epochs=1),
        "output-vectors": OutputVectorSettings(prefix_tokens=4, max_change_frac=0.0),
    }.get(method, UnlearningSettings(epochs=0))


def strong(method: str, model):
    """Settings under which a method changes a tiny model at once."""
    return {
        "fold": FoldSettings(neurons=some_neurons(model)),
        "svd": SvdSettings(layers=(0, 1), drop_gate_frac=0.5, drop_up_frac=0.5, drop_down_frac=0.5),
        "curvature": CurvatureSettings(layers=(0, 1), keep_frac=0.6),
        "subnet": SubnetSettings(drop_frac=0.05, epochs=2, batch_size=2),
        "output-vectors": OutputVectorSettings(
            prefix_tokens=4, position="weakest", max_change_frac=50.0, num_neurons=6
        ),
    }.get(method, UnlearningSettings(epochs=2, batch_size=2, learning_rate=1e-2))


def bits(model) -> str:
    return fingerprint(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_edit_leaves_the_original_and_does_nothing_at_no_strength(method: str, dtype) -> None:
    model = tiny_model("llama").to(dtype)
    before, modes = bits(model), [module.training for module in model.modules()]
    still = edit(model, TARGETS, RETAIN, method, weak(method, model))
    assert bits(still.model) == before
    assert not still.undo
    changed = edit(model, TARGETS, RETAIN, method, strong(method, model))
    assert changed.undo or method == "output-vectors"  # random models may lack a token that wins
    assert bits(model) == before
    assert [module.training for module in model.modules()] == modes
    assert {p.dtype for p in changed.model.parameters()} == {dtype}
    assert all(p.requires_grad and p.grad is None for p in changed.model.parameters())
    assert changed.cost.seconds > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_edit_works_on_every_architecture(family: str) -> None:
    model = tiny_model(family).eval()
    for method in ("svd", "curvature", "subnet", "gradient-difference"):
        edited = edit(model, TARGETS, RETAIN, method, strong(method, model))
        changed = {name.partition("|")[0] for name in edited.undo}
        assert changed, method
        if method != "gradient-difference":
            paths = {matrix.path for matrix in find_matrices(model, (0, 1), ("gate", "up", "down"))}
            assert changed <= {f"{path}.weight" for path in paths}, method
        with torch.no_grad():
            logits = edited.model(torch.tensor(TARGETS)).logits
            assert not torch.equal(logits, model(torch.tensor(TARGETS)).logits), method


@pytest.mark.parametrize("family", LAYOUTS)
def test_factors_equal_a_loop_over_positions(family: str) -> None:
    model = tiny_model(family).eval()
    for labels in ("gold", "sampled"):
        settings = CurvatureSettings(layers=(0,), kinds=("gate", "up", "down"), labels=labels, batch_size=3)
        found = collect_factors(model, RETAIN, settings)
        assert found.num_positions == sum(len(text) - 1 for text in RETAIN)
        for matrix in find_matrices(model, (0,), settings.kinds):
            pairs = []
            for number, text in enumerate(RETAIN):
                truth = text[1:]
                if labels == "sampled":
                    with torch.no_grad():
                        logits = model(torch.tensor([text])).logits.float()
                    truth = drawn_labels(logits, [len(text)], number, settings.seed)[0].tolist()
                linear = model.get_submodule(matrix.path)
                pairs += literal.inputs_and_gradients(model, linear, text, truth)
            inputs, gradients = literal.factors(pairs, slice(matrix.first, matrix.last))
            factors = found.by_matrix[matrix.name]
            torch.testing.assert_close(factors.inputs_II, inputs, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(factors.gradients_OO, gradients, atol=1e-5, rtol=1e-4)


def test_labels_are_drawn_from_the_models_distribution() -> None:
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0]).expand(1, 4000, 4)
    drawn = drawn_labels(logits, [4000], 0, 3)[0]
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, logits[0, 0].softmax(-1), atol=0.025, rtol=0)
    assert torch.equal(drawn_labels(logits[:, :10], [10], 5, 3), drawn_labels(logits[:, :10], [10], 5, 3))


@pytest.mark.parametrize("family", LAYOUTS)
def test_curvature_edit_equals_the_literal_one(family: str) -> None:
    model = tiny_model(family).eval()
    settings = CurvatureSettings(layers=(1,), keep_frac=0.5, protect_frac=0.5)
    factors = collect_factors(model, RETAIN, settings)
    second = collect_factors(model, TARGETS, settings)
    edited = edit(model, [], [], "curvature", settings, factors=factors, protect=second).model
    for matrix in find_matrices(model, (1,), settings.kinds):
        own, theirs = factors.by_matrix[matrix.name], second.by_matrix[matrix.name]
        expected = literal.curvature_edit(
            literal.matrix_of(model.get_submodule(matrix.path), slice(matrix.first, matrix.last)),
            own.inputs_II,
            own.gradients_OO,
            0.5,
            (theirs.inputs_II, theirs.gradients_OO),
            0.5,
        )
        torch.testing.assert_close(matrix.view(edited), expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_singular_edit_equals_the_literal_one(family: str) -> None:
    model = tiny_model(family).eval()
    edited = edit(model, [], [], "svd", strong("svd", model)).model
    for matrix in find_matrices(model, (0, 1), ("gate", "up", "down")):
        linear = model.get_submodule(matrix.path)
        weight = literal.matrix_of(linear, slice(matrix.first, matrix.last))
        expected = literal.singular_edit(weight, 8)  # half of 16 singular values
        torch.testing.assert_close(matrix.view(edited), expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_of_scores_equal_the_literal_ones(family: str) -> None:
    model = tiny_model(family).eval()
    settings = SubnetSettings(drop_frac=0.1, retain_weight=0.4)
    paths = {matrix.path for matrix in find_matrices(model, (0, 1), settings.kinds)}
    weights = {f"{path}.weight": model.get_parameter(f"{path}.weight").detach() for path in sorted(paths)}
    generator = torch.Generator().manual_seed(0)
    scores = {n: initial_scores(w, 16, generator).requires_grad_() for n, w in weights.items()}
    loss = subnet_loss(model, weights, scores, TARGETS, RETAIN[:4], settings)
    found = dict(zip(scores, torch.autograd.grad(loss, list(scores.values())), strict=True))
    plain = {name: score.detach() for name, score in scores.items()}
    expected = literal.subnet_gradient(model, weights, plain, TARGETS, RETAIN[:4], 0.4, 0.1)
    for name in found:
        assert expected[name].abs().max() > 1e-4
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_subnet_zeroes_its_share_and_keeps_every_other_bit(family: str) -> None:
    model = tiny_model(family).eval()
    settings = SubnetSettings(drop_frac=0.05, epochs=3, batch_size=2)
    edited = edit(model, TARGETS, RETAIN, "subnet", settings).model
    for path in {matrix.path for matrix in find_matrices(model, (0, 1), settings.kinds)}:
        old, new = model.get_parameter(f"{path}.weight"), edited.get_parameter(f"{path}.weight")
        is_zero = new == 0
        assert int(is_zero.sum()) == int(0.05 * old.numel())
        assert torch.equal(new[~is_zero], old[~is_zero])


@pytest.mark.parametrize("objective", ["gradient-ascent", "gradient-difference", "npo", "simnpo"])
def test_one_step_of_unlearning_equals_a_literal_one(objective: str) -> None:
    model = tiny_model("llama").eval()
    settings = UnlearningSettings(
        epochs=1,
        batch_size=3,
        micro_size=2,
        learning_rate=1e-3,
        weight_decay=0.1,
        clip_norm=1e9,
        forget_weight=0.7,
        retain_weight=1.5,
        beta=0.4,
        delta=0.1,
        prefix_tokens=5,
        perplexity_budget_frac=None,
    )
    edited = edit(model, TARGETS, RETAIN[:3], objective, settings).model
    forget = torch.stack([literal.text_nll(model, text, 5) for text in TARGETS])
    if objective.startswith("gradient"):
        loss = -0.7 * literal.mean_nll(model, TARGETS, 5)
    elif (
        objective == "npo"
    ):  # at the start the ratio is 1, its slope by the loss is that of 2 / beta log(1 + r^beta)
        loss = 0.7 * (2 / 0.4 * torch.log1p(torch.exp(-0.4 * (forget - forget.detach())))).mean()
    else:
        loss = 0.7 * (2 / 0.4 * torch.log1p(torch.exp(-0.4 * (forget / 7 - 0.1)))).mean()
    if objective != "gradient-ascent":
        loss = loss + 1.5 * literal.mean_nll(model, RETAIN[:3])
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, old, gradient in zip(names, parameters, torch.autograd.grad(loss, parameters), strict=True):
        # The first step of Adam: sign-like, so compare where the gradient is clearly not 0.
        expected = old * (1 - 1e-3 * 0.1) - 1e-3 * gradient / (gradient.abs() + 1e-8)
        is_clear = gradient.abs() > 1e-6
        new = edited.get_parameter(name)
        torch.testing.assert_close(new[is_clear], expected[is_clear], atol=2e-5, rtol=0)


def test_the_budget_of_perplexity_is_kept() -> None:
    model = tiny_model("llama").eval()
    settings = UnlearningSettings(
        epochs=40, batch_size=3, learning_rate=3e-2, perplexity_budget_frac=0.05, num_check=2
    )
    edited = edit(model, TARGETS, RETAIN, "gradient-ascent", settings)
    assert edited.details["is_stopped"]
    assert edited.details["steps"] < 40

    def rise(candidate) -> float:
        with torch.no_grad():
            kept_back = RETAIN[-2:]
            return float(
                (literal.mean_nll(candidate, kept_back) - literal.mean_nll(model, kept_back)).exp() - 1
            )

    assert rise(edited.model) <= 0.05
    assert edited.details["perplexity_rise_frac"] == pytest.approx(rise(edited.model), abs=1e-4)
    free = edit(model, TARGETS, RETAIN, "gradient-ascent", UnlearningSettings(
        epochs=40, batch_size=3, learning_rate=3e-2, perplexity_budget_frac=None))  # fmt: skip
    assert rise(free.model) > 0.05


@pytest.fixture(scope="module")
def memorizing():
    """A gated and an ungated model that recite three texts after four tokens, and learned them in their MLPs alone."""
    torch.set_num_threads(1)
    models = {}
    for family in ("llama", "gpt2"):
        model = tiny_model(family).eval()
        batch = torch.tensor(TARGETS)
        paths = {matrix.path for matrix in find_matrices(model, (0, 1), ("gate", "up", "down"))}
        optimizer = torch.optim.AdamW([model.get_parameter(f"{path}.weight") for path in paths], lr=1e-2)
        with torch.no_grad():  # random heads are too quiet for any confident answer
            model.get_output_embeddings().weight.mul_(10)
        for _ in range(100):
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            optimizer.step()
            model.zero_grad()
        models[family] = model
        assert recited(model) == 3
    return models


@torch.no_grad()
def recited(model, prefix: int = 4) -> int:
    """Number of targets whose suffix the model continues word for word."""
    rows = torch.tensor([text[:prefix] for text in TARGETS])
    for _ in range(len(TARGETS[0]) - prefix):
        rows = torch.cat([rows, model(rows).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return sum(row == text for row, text in zip(rows.tolist(), TARGETS, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["output-vectors", "subnet", "npo", "gradient-ascent", "simnpo"])
def test_edits_remove_what_was_memorized(memorizing, family: str, method: str) -> None:
    model = memorizing[family]
    settings = {
        "output-vectors": OutputVectorSettings(prefix_tokens=4, num_neurons=12, max_change_frac=20.0),
        "subnet": SubnetSettings(drop_frac=0.1, epochs=10, batch_size=3, learning_rate=0.1),
    }.get(
        method,
        UnlearningSettings(
            epochs=40, batch_size=3, learning_rate=3e-3, perplexity_budget_frac=None, beta=1.0
        ),
    )
    edited = edit(model, TARGETS, RETAIN, method, settings)
    assert recited(edited.model) <= 1
    assert recited(model) == 3


def test_an_output_vector_edit_is_of_rank_one_and_makes_one_token_lose(memorizing) -> None:
    model = memorizing["gpt2"]
    settings = OutputVectorSettings(prefix_tokens=4, num_neurons=5, max_change_frac=20.0, margin_nats=0.5)
    edited = edit(model, TARGETS[:1], RETAIN, "output-vectors", settings)
    assert dict(edited.details) == {"num_reached": 1, "num_unreached": 0, "num_edited": 1}
    columns = 0
    for matrix in find_matrices(model, (0, 1), ("down",)):
        change = matrix.view(edited.model) - matrix.view(model)
        if change.any():
            assert torch.linalg.matrix_rank(change, tol=1e-5) == 1
        columns += int(change.any(0).sum())
    assert 1 <= columns <= 5
    with torch.no_grad():
        logits = edited.model(torch.tensor([TARGETS[0][:4]])).logits[0, -1]
    others = logits.clone()
    others[TARGETS[0][4]] = -torch.inf
    assert others.max() - logits[TARGETS[0][4]] >= 0.5


def test_a_capped_output_vector_edit_leaves_the_target_as_it_was(memorizing) -> None:
    model = memorizing["llama"]
    settings = OutputVectorSettings(prefix_tokens=4, max_change_frac=1e-4)
    edited = edit(model, TARGETS, RETAIN, "output-vectors", settings)
    assert edited.details["num_unreached"] == 3
    assert bits(edited.model) == bits(model)


def test_fold_is_the_same_edit_under_the_front(memorizing) -> None:
    model = memorizing["llama"]
    edited = edit(model, [], [], "fold", FoldSettings(neurons=some_neurons(model)))
    assert bits(edited.model) == bits(fold(model, some_neurons(model)))
    with pytest.raises(NeuronSetMismatch, match="was made for"):
        edit(tiny_model("qwen2"), [], [], "fold", FoldSettings(neurons=some_neurons(model)))


@pytest.mark.parametrize("method", ["fold", "svd", "subnet", "npo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_is_undone_bit_for_bit(tmp_path: Path, method: str, dtype) -> None:
    model = tiny_model("llama", tie_word_embeddings=True).to(dtype).eval()
    edited = edit(model, TARGETS, RETAIN, method, strong(method, model))
    folder = export_edit(edited, tmp_path / "plain", manifest={"examples": "abc"})
    manifest = json.loads((folder / "unmemorize.json").read_text())
    assert (manifest["method"], manifest["examples"], manifest["undo"]) == (
        method,
        "abc",
        "plain.undo.safetensors",
    )
    assert manifest["result"] == bits(edited.model) != manifest["model"] == bits(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "plain.undo.safetensors"]
    assert bits(undone(folder)) == bits(model)


def test_an_edited_export_loads_where_the_library_cannot_be_imported(tmp_path: Path) -> None:
    model = tiny_model("gpt2").eval()
    edited = edit(model, [], RETAIN, "curvature", strong("curvature", model))
    folder = export_edit(edited, tmp_path / "plain")
    with torch.no_grad():
        expected = edited.model(torch.tensor(TARGETS)).logits
    assert (prove_plain(folder, torch.tensor(TARGETS)) - expected).abs().max() <= 1e-5


def test_a_few_changed_values_make_a_small_undo_file(tmp_path: Path) -> None:
    model = tiny_model("llama").eval()
    few = edit(model, [], [], "fold", FoldSettings(neurons=some_neurons(model)))
    names = {name.partition("|")[2] for name in few.undo}
    assert names == {"positions", "values"}
    assert sum(t.numel() for n, t in few.undo.items() if n.endswith("values")) == 2 * 2 * 16


def test_undo_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    model = tiny_model("llama").eval()
    first = export_edit(edit(model, [], [], "svd", strong("svd", model)), tmp_path / "first")
    second = export_edit(edit(model, [], [], "fold", strong("fold", model)), tmp_path / "second")
    with pytest.raises(CheckpointMismatch, match="the undo data belong to"):
        undone(first, undo_path(second))
    with pytest.raises(RunFolderError, match="already exists"):
        export_edit(edit(model, [], [], "svd", strong("svd", model)), tmp_path / "first")
    undo_path(first).write_bytes(undo_path(first).read_bytes()[:200])
    with pytest.raises(FileFormatError, match="cannot read undo data"):
        undone(first)
    with pytest.raises(CheckpointMismatch, match="has other tensors than the original"):
        changed_values(model, tiny_model("gpt2"))


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").eval()
    edited = edit(model, [], [], "svd", strong("svd", model))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        export_edit(edited, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_edit_leaves_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = bits(model)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    for method in ("curvature", "subnet", "npo", "output-vectors"):
        with pytest.raises(KeyboardInterrupt):
            edit(model, TARGETS, RETAIN, method, strong(method, model), progress=stop)
    assert bits(model) == before
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_factors_are_saved_and_belong_to_their_model(tmp_path: Path) -> None:
    model = tiny_model("llama").eval()
    settings = CurvatureSettings(layers=(0, 1))
    factors = collect_factors(model, RETAIN, settings)
    loaded = load_factors(factors.save(tmp_path / "factors.safetensors"))
    assert (loaded.model_id, loaded.num_positions) == (fingerprint(model), factors.num_positions)
    once = edit(model, [], [], "curvature", settings, factors=factors).model
    again = edit(model, [], [], "curvature", settings, factors=loaded).model
    assert bits(once) == bits(again)
    with pytest.raises(CheckpointMismatch, match="the factors were collected from"):
        edit(tiny_model("llama", seed=1), [], [], "curvature", settings, factors=loaded)
    with pytest.raises(CheckpointMismatch, match="this edit needs 0.gate, 0.up, 0.down"):
        edit(
            model,
            [],
            [],
            "curvature",
            CurvatureSettings(layers=(0,), kinds=("gate", "up", "down")),
            factors=loaded,
        )
    with pytest.raises(FileFormatError, match="cannot read factors"):
        load_factors(tmp_path / "nowhere.safetensors")


def test_factors_do_not_depend_on_batches() -> None:
    model = tiny_model("qwen2").eval()
    one, many = (
        collect_factors(model, RETAIN, CurvatureSettings(batch_size=size)).by_matrix for size in (1, 8)
    )
    for name in one:
        torch.testing.assert_close(one[name].gradients_OO, many[name].gradients_OO, atol=1e-5, rtol=1e-4)


def test_layers_are_taken_at_the_sources_depth() -> None:
    assert chosen_layers(tiny_model("llama", num_hidden_layers=4), None, (23, 25)) == (3,)
    assert chosen_layers(tiny_model("llama"), None, None) == (0, 1)
    with pytest.raises(ConfigError, match=r"layers \[2\] do not all exist; expected some of 0 to 1"):
        chosen_layers(tiny_model("llama"), (2,), None)


def test_texts_that_cannot_be_used_are_refused() -> None:
    model = tiny_model("llama")
    settings = OutputVectorSettings(prefix_tokens=12)
    cases = [
        (lambda: edit(model, [], RETAIN, "npo"), "there are no target texts"),
        (lambda: edit(model, TARGETS, [], "npo"), "there are no retained texts"),
        (lambda: edit(model, TARGETS, [], "curvature"), "there are no generic texts"),
        (lambda: edit(model, [[3]], RETAIN, "subnet"), "target text 0 has 1 tokens, expected 2 or more"),
        (lambda: edit(model, TARGETS, RETAIN, "output-vectors", settings), "expected 13 or more"),
        (
            lambda: edit(model, [[3, VOCABULARY]], RETAIN, "npo"),
            f"outside the model's vocabulary of {VOCABULARY}",
        ),
        (lambda: edit(model, [[3] * 65], RETAIN, "npo"), "the model's context holds 64"),
    ]
    for make, message in cases:
        with pytest.raises(DataError, match=message):
            make()
