"""A comparison end to end on a tiny corpus: what it leaves, what it refuses, and what each method really trains."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_model
from unmemorize.corpus import MixtureSettings
from unmemorize.errors import ConfigError, DataError, ModelNotSupported, PoolExhausted, RunFolderError
from unmemorize.files import read_json_lines
from unmemorize.isolate import steps
from unmemorize.isolate.initial_model import build_model
from unmemorize.isolate.language import grow, plan_sinks, training_sinks
from unmemorize.isolate.loop import Job, train_method
from unmemorize.isolate.methods import MethodSettings, parse_method
from unmemorize.isolate.packing import pack, to_batch
from unmemorize.isolate.plan import SinkSettings, load_plan
from unmemorize.isolate.run_folder import model_folder
from unmemorize.isolate.runs import read_run, trained_runs
from unmemorize.isolate.settings import (
    CorpusSettings,
    ModelSettings,
    OptimizationSettings,
    RecordSettings,
    TrainSettings,
    demo_settings,
)
from unmemorize.isolate.steps import loss_sum, mean_loss_nats, require_packing
from unmemorize.isolate.train import train
from unmemorize.records import Progress

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
METHODS = (
    "standard",
    "dedup",
    "cap:2",
    "goldfish",
    "sinks",
    "sinks:sinks_for=all,compute=masked",
    "gradient-masking",
)
POOL = SinkSettings(share_frac=1.0, grown=8, active_frac=None, sinks_per_id=3)


def corpus(folder: Path, *, seed: int = 0) -> Path:
    words = [
        "red",
        "blue",
        "green",
        "one",
        "two",
        "three",
        "up",
        "down",
        "left",
        "right",
        "fast",
        "slow",
        "old",
        "new",
        "cat",
        "dog",
        "fish",
        "bird",
    ]
    draw = random.Random(seed)
    path = folder / f"corpus-{seed}.jsonl"
    texts = [" ".join(draw.choices(words, k=draw.randint(4, 9))) for _ in range(60)]
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines))
    return path


def settings(folder: Path, **changes: Any) -> TrainSettings:
    config = folder / "tiny.json"
    config.write_text(json.dumps(TINY))
    made = TrainSettings(
        corpus=CorpusSettings(path=str(corpus(folder))),
        mixture=MixtureSettings(num_repeated=4, repeats=3, num_once=12, num_validation=4),
        model=ModelSettings(model=str(config), vocabulary_size=280, length_tokens=32),
        optimization=OptimizationSettings(batch_rows=2, learning_rate=1e-2),
        method=MethodSettings(sinks=POOL),
        records=RecordSettings(log_every_steps=1),
        methods=METHODS,
        seeds=(0,),
        device="cpu",
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("train")
    train(settings(folder), folder / "run")
    return folder / "run"


def weights(run: Path, method: str) -> dict[str, torch.Tensor]:
    return load_file(model_folder(run, method, 0) / "model.safetensors")


def test_a_run_is_a_folder_of_plain_models(run: Path) -> None:
    names = sorted(path.name for path in run.iterdir())
    assert names == ["config.json", "examples.jsonl", "models", "tokenizer"]
    assert [result.method for result in trained_runs(run)] == list(METHODS)
    for method in METHODS:
        folder = model_folder(run, method, 0)
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.vocab_size == len(tokenizer)
        assert (folder / "sinks.json").exists() == parse_method(method).has_pool
        assert not (folder / "checkpoint").exists()
        assert not list(folder.glob(".*"))


def test_the_plan_beside_a_model_fits_it(run: Path) -> None:
    folder = model_folder(run, "sinks", 0)
    plan = load_plan(folder / "sinks.json")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert [(place.num_shared, place.num_pool, place.num_sinks) for place in plan.sites] == [(24, 8, 3)] * 2
    with training_sinks(model, plan):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), sink_ids=torch.tensor([5]))


def test_metrics_and_training_agree(run: Path) -> None:
    for result in trained_runs(run):
        rows = read_json_lines(result.folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, result.steps + 1))
        assert rows[-1]["tokens"] == result.tokens
        assert rows[-1]["validation_loss_nats"] is not None
        assert rows[-1]["repeated_loss_nats"] is not None
        assert result.num_parameters == sum(t.numel() for t in weights(run, result.method).values())
        assert result.tokens_per_s == pytest.approx(result.tokens / result.train_s)
        assert result.num_ids == {"sinks": 4, METHODS[5]: 16, "gradient-masking": 4}.get(result.method, 0)
    tokens = {result.method: result.tokens for result in trained_runs(run)}
    assert tokens["dedup"] < tokens["cap:2"] < tokens["standard"] == tokens["sinks"]


def test_the_last_metrics_are_those_of_the_saved_model(run: Path) -> None:
    config = read_run(run)
    assert config.settings.methods == METHODS
    assert config.data["num_repeated"] == 4
    for method in ("standard", "sinks", "gradient-masking"):
        folder = model_folder(run, method, 0)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        if method != "standard":
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.data[:, 24:] = 0  # state off, by hand
        examples = [row for row in read_json_lines(run / "examples.jsonl") if row["group"] == "target"]
        assert all(row["repeats"] == 3 for row in examples)
        rows = [
            [((*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id)[:32], 0)] for row in examples
        ]
        assert [len(row[0][0]) for row in rows] == [row["num_tokens"] for row in examples]
        logged = read_json_lines(folder / "metrics.jsonl")[-1]["repeated_loss_nats"]
        assert mean_loss_nats(model, rows) == pytest.approx(logged, rel=1e-5), method


def test_examples_are_repeated_and_unseen_documents(run: Path) -> None:
    rows = read_json_lines(run / "examples.jsonl")
    assert [row["group"] for row in rows] == ["target"] * 4 + ["ordinary"] * 4
    assert len({row["name"] for row in rows}) == len({row["id"] for row in rows}) == 8


def test_finished_models_are_not_trained_again(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    told: list[Progress] = []
    again = train(settings(run.parent), run, told.append)
    assert again == trained_runs(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    assert not [event for event in told if event.unit == "steps"]


def test_seeds_differ_and_methods_share_a_seeds_weights(run: Path) -> None:
    made = settings(run.parent)
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    first, same, other = (build_model(made.model, tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_another_run_is_refused_by_its_first_difference(run: Path) -> None:
    made = settings(run.parent)
    for changed, named in [
        (replace(made, seeds=(0, 1)), r"seeds is \[0\] there and \[0, 1\] here"),
        (
            replace(made, optimization=replace(made.optimization, batch_rows=3)),
            "optimization.batch_rows is 2 there",
        ),
        (replace(made, corpus=CorpusSettings(path=str(corpus(run.parent, seed=1)))), "corpus.path is"),
    ]:
        with pytest.raises(RunFolderError, match=f"holds another run: .*{named}"):
            train(changed, run)


def test_a_changed_corpus_is_noticed(tmp_path: Path) -> None:
    made = settings(tmp_path, methods=("dedup",), optimization=OptimizationSettings(max_steps=1))
    train(made, tmp_path / "run")
    Path(made.corpus.path).write_text(corpus(tmp_path, seed=1).read_text())
    with pytest.raises(RunFolderError, match="trained on another corpus"):
        train(made, tmp_path / "run")


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    made = settings(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file, expected a folder"):
        train(made, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match="is not empty and holds no training run"):
        train(made, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_bad_settings_leave_nothing_behind(tmp_path: Path) -> None:
    made = settings(tmp_path)
    (tmp_path / "bad.json").write_text('{"model_type": "no such thing"}')
    cases: list[tuple[TrainSettings, type[Exception], str]] = [
        (replace(made, corpus=CorpusSettings(path=str(tmp_path / "none.jsonl"))), DataError, "none.jsonl"),
        (replace(made, mixture=MixtureSettings(num_repeated=99)), DataError, "different documents"),
        (replace(made, model=replace(made.model, length_tokens=128)), ConfigError, "context of .* is 64"),
        (
            replace(made, model=replace(made.model, model=str(tmp_path / "bad.json"))),
            ModelNotSupported,
            "no such thing",
        ),
        (
            replace(made, model=replace(made.model, model=str(tmp_path / "gone.json"))),
            ModelNotSupported,
            "gone.json",
        ),
        (replace(made, methods=("sinks:sinks_per_id=9",)), ConfigError, "own 9 sinks of a pool of 8"),
        (replace(made, methods=("sinks:scheme=disjoint",)), PoolExhausted, "4 sources of 3 sinks"),
        (
            replace(made, methods=("sinks:grown=0,layers=[5],share_frac=0.5",)),
            ConfigError,
            "layers .5. do not fit",
        ),
        (
            replace(made, records=RecordSettings(tracker="nothing")),
            ConfigError,
            "tracker 'nothing' cannot be used",
        ),
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            train(wrong, tmp_path / "run")
        assert not (tmp_path / "run").exists(), message


def test_texts_can_be_left_out(tmp_path: Path) -> None:
    made = settings(tmp_path, methods=("dedup",), records=RecordSettings(keep_text=False))
    made = replace(
        made, model=replace(made.model, rows="padded"), optimization=OptimizationSettings(max_steps=1)
    )
    train(made, tmp_path / "run")
    assert all("text" not in row for row in read_json_lines(tmp_path / "run" / "examples.jsonl"))


def test_a_checkpoint_is_trained_on(tmp_path: Path, run: Path) -> None:
    start = model_folder(run, "standard", 0)
    made = settings(
        tmp_path, methods=("dedup",), optimization=OptimizationSettings(max_steps=1, learning_rate=1e-9)
    )
    train(replace(made, model=replace(made.model, model=str(start))), tmp_path / "run")
    before, after = weights(run, "standard"), weights(tmp_path / "run", "dedup")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    made = settings(
        tmp_path, methods=("dedup",), records=RecordSettings(tracker="tensorboard", log_every_steps=1)
    )
    (result,) = train(made, tmp_path / "run")
    events = reader.EventAccumulator(str(tmp_path / "run" / "tracker" / "dedup-seed0"))
    events.Reload()
    rows = read_json_lines(result.folder / "metrics.jsonl")
    logged = [(event.step, event.value) for event in events.Scalars("train_loss_nats")]
    assert logged == [(row["step"], pytest.approx(row["train_loss_nats"], rel=1e-6)) for row in rows]
    assert events.Scalars("validation_loss_nats")[-1].step == result.steps


def documents(seed: int = 0, num: int = 24) -> list[tuple[tuple[int, ...], int]]:
    draw = random.Random(seed)
    lengths = [draw.randint(3, 12) for _ in range(num)]
    return [
        (tuple(draw.randrange(3, 64) for _ in range(length)), number % 5 if number % 2 else 0)
        for number, length in enumerate(lengths)
    ]


def job(folder: Path, method: str = "standard", **changes: Any) -> Job:
    chosen = parse_method(method, MethodSettings(sinks=SinkSettings(share_frac=0.5, active_frac=0.3)))
    model = tiny_model("llama")
    plan = plan_sinks(model, chosen.settings.sinks) if chosen.has_pool else None
    made = Job(
        model=model,
        rows=pack(documents(), 24),
        method=chosen,
        plan=plan,
        optimization=OptimizationSettings(batch_rows=5, learning_rate=1e-2),
        folder=folder,
    )
    return replace(made, **changes)


@pytest.mark.parametrize(
    "method", ["standard", "goldfish", "sinks", "sinks:shared_cap=1", "gradient-masking"]
)
def test_micro_batches_change_nothing_but_rounding(tmp_path: Path, method: str) -> None:
    whole, cut = job(tmp_path / "whole", method), job(tmp_path / "cut", method)
    train_method(whole)
    train_method(replace(cut, optimization=replace(cut.optimization, micro_rows=2)))
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(parameter, dict(cut.model.named_parameters())[name], atol=2e-4, rtol=1e-3)


def test_the_loss_of_a_batch_is_transformers_own() -> None:
    model = tiny_model().eval()
    batch = to_batch(pack(documents(), 24))
    given = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
    expected = model(**given, use_cache=False).loss
    num_labels = (batch["labels"][:, 1:] != -100).sum()
    ours = loss_sum(model, batch, has_sinks=False) / num_labels
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_packed_loss_is_that_of_separate_documents() -> None:
    model = tiny_model().eval()
    packed = loss_sum(model, to_batch(pack(documents(), 24)), has_sinks=False)
    alone = loss_sum(model, to_batch([[document] for document in documents()]), has_sinks=False)
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)


def test_models_that_would_mix_packed_documents_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("llama", "gpt2", "opt"):
        require_packing(tiny_model(family))
    monkeypatch.setattr(steps, "attention_arguments", lambda *_: {"use_cache": False})
    with pytest.raises(
        ConfigError, match="OPTForCausalLM does not keep packed documents apart; set rows to padded"
    ):
        require_packing(tiny_model("opt"))


def test_sinks_that_no_document_owns_do_not_move(tmp_path: Path) -> None:
    for method in ("sinks", "gradient-masking"):
        made = job(tmp_path / method, method, rows=pack([(tokens, 0) for tokens, _ in documents()], 24))
        before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
        train_method(made)
        after = made.model.state_dict()
        for layer in ("model.layers.0.mlp", "model.layers.1.mlp"):
            for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                key = f"{layer}.{name}.weight"
                moved = (before[key] != after[key]).movedim(axis, 0).flatten(1).any(1)
                assert moved.tolist() == [True] * 12 + [False] * 12, (method, key)


def test_gradient_masking_teaches_the_pool_by_repeated_documents_only(tmp_path: Path) -> None:
    made = job(
        tmp_path / "all", "gradient-masking", rows=pack([(tokens, 7) for tokens, _ in documents()], 24)
    )
    made = replace(made, optimization=replace(made.optimization, weight_decay=0.0))
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    train_method(made)
    after = made.model.state_dict()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert (before[gate] != after[gate]).any(1).tolist() == [False] * 12 + [True] * 12


def test_a_grown_model_starts_as_the_same_function() -> None:
    model = tiny_model().eval()
    batch = to_batch(pack(documents(), 24))
    wider = grow(model, 8, seed=3).eval()
    ours, theirs = (loss_sum(m, batch, has_sinks=False) for m in (model, wider))
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-6)


def test_the_callers_random_state_is_untouched(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_method(job(tmp_path / "run"))
    assert torch.equal(torch.rand(3), expected)


def test_bf16_trains_float32_weights(tmp_path: Path) -> None:
    made = job(tmp_path / "run", "sinks")
    train_method(replace(made, optimization=replace(made.optimization, precision="bf16", batch_rows=2)))
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
    rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["train_loss_nats"] < rows[0]["train_loss_nats"]


def test_a_method_needs_its_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method sinks needs a plan"):
        job(tmp_path, method="sinks", plan=None)
    with pytest.raises(ConfigError, match="no rows to train on"):
        job(tmp_path, rows=())


def test_a_diverging_run_stops(tmp_path: Path) -> None:
    made = job(tmp_path / "run")
    wild = OptimizationSettings(batch_rows=2, learning_rate=1e6, clip_norm=None, warmup_frac=0.0)
    with pytest.raises(ConfigError, match="training loss is nan at step .*; lower learning_rate"):
        train_method(replace(made, optimization=wild, records=RecordSettings(log_every_steps=1)))


def test_a_run_whose_evaluation_diverges_stops_before_it_is_logged(tmp_path: Path) -> None:
    made = job(tmp_path / "run", validation=pack(documents(), 24))
    wild = OptimizationSettings(batch_rows=2, learning_rate=1e6, clip_norm=None, warmup_frac=0.0)
    with pytest.raises(ConfigError, match="the validation loss is nan at step 2; lower learning_rate"):
        train_method(replace(made, optimization=wild, records=RecordSettings(evaluate_every_steps=1)))
    assert [row["step"] for row in read_json_lines(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_the_demo_has_what_a_comparison_needs() -> None:
    assert {"standard", "dedup", "sinks"} <= set(demo_settings().methods)
    assert demo_settings(is_quick=True).optimization.max_steps == 4
