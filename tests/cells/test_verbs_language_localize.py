"""Verbs for neurons of language models, on a small model that recites eight texts: what they write, print, refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

from tests.cells.planted_texts import sentences, write_planted, write_rows
from tests.cells.test_verbs import ask, refusal
from unmemorize.cli import main
from unmemorize.localize.methods import COMPARED
from unmemorize.localize.neuron_scores import load_scores
from unmemorize.localize.neuron_statistics import load_statistics
from unmemorize.models.language import fingerprint, load
from unmemorize.neurons import load_neurons
from unmemorize.records import NeuronAudit, load_any_audit
from unmemorize.remove.language_edits import undone

CUT = ("--prefix", "8", "--suffix", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, examples in groups, and ordinary texts."""
    folder = tmp_path_factory.mktemp("texts")
    _, memorized, ordinary = write_planted(folder / "model")
    rows = [(text, "target") for text in memorized[:6]] + [(text, "neighbour") for text in memorized[6:]]
    write_rows(folder / "examples.jsonl", rows + [(text, "ordinary") for text in ordinary[:6]])
    (folder / "ordinary.txt").write_text("\n".join(ordinary[6:]))
    return folder


def words(folder: Path, out: str, *more: str, examples: str = "examples.jsonl") -> list[str]:
    named = ["--examples", str(folder / examples), "--out", str(folder / out)]
    return ["localize", str(folder / "model"), *named, *CUT, "--share", "0.05", *more]


def test_localize_writes_a_run_and_continues_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(capsys, *words(folder, "run"))
    run = folder / "run"
    assert (answer["num_targets"], answer["num_memorized"]) == (6, 6)
    names = {"config.json", "examples.jsonl", "localization.json", "neurons.json", "scores"}
    assert names == {path.name for path in run.iterdir()}
    neurons = load_neurons(run / "neurons.json")
    scores = load_scores(run / "scores" / "gradient.safetensors")
    assert neurons == scores.top(0.05) and len(scores.examples) == 6
    assert answer["methods"][0]["neurons_per_layer"] == [5, 5] and len(neurons) == 10
    before = (run / "scores" / "gradient.safetensors").stat().st_mtime_ns
    more = ("--method", "gradient activations,random", "--ordinary", str(folder / "ordinary.txt"))
    again = refusal(capsys, *words(folder, "run", *more))
    assert "holds another run (ordinary differ); choose a new folder" in again
    found = ask(capsys, *words(folder, "run", "--method", "gradient activations,random"))
    assert [one["method"] for one in found["methods"]] == ["gradient", "activations", "random"]
    pairs = [(one["first"], one["second"]) for one in found["agreement"]]
    assert pairs == [("gradient", "activations"), ("gradient", "random"), ("activations", "random")]
    assert before == (run / "scores" / "gradient.safetensors").stat().st_mtime_ns


def test_sets_of_sequences_are_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        json.loads(line)["tokens"] for line in (folder / "run" / "examples.jsonl").read_text().splitlines()
    ]
    path = folder / "sequences.jsonl"
    path.write_text("".join(json.dumps({"prefix": row[:8], "suffix": row[8:16]}) + "\n" for row in rows[:2]))
    answer = ask(capsys, *words(folder, "sequences", examples="sequences.jsonl"))
    assert (answer["num_targets"], answer["num_memorized"]) == (2, 2)
    cost = {}
    for method in ("outliers", "contrast"):
        found = ask(
            capsys, *words(folder, method, "--method", method, "--ordinary", str(folder / "ordinary.txt"))
        )
        assert found["method"] == method
        cost[method] = found["methods"][0]["forward_equivalents"]
        kept = load_statistics(folder / method / "scores" / f"{method}.statistics.safetensors")
        assert kept.count > 1 and kept.quantity == COMPARED[method]
    # Passes over ordinary texts count too, a backward pass as much as a forward one.
    assert cost["contrast"] == 2 * cost["outliers"] > 2 * found["num_memorized"]


def test_tables_arrays_and_run_folders_are_read_and_lengths_carried_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (folder / "run" / "examples.jsonl").read_text().splitlines()]
    table = "".join(f"{row['text']},{row['group']}\n" for row in rows)
    (folder / "table.csv").write_text(f"text,group\n{table}")
    numpy.save(folder / "array.npy", numpy.array([row["tokens"][:16] for row in rows[:2]]))
    for name, examples, count in (("csv", "table.csv", 6), ("npy", "array.npy", 2), ("again", "run", 6)):
        answer = ask(capsys, *words(folder, name, "--length", "20", examples=examples))
        assert (answer["num_targets"], answer["num_memorized"], answer["length_tokens"]) == (count, count, 20)
    audit = [
        "audit",
        str(folder / "model"),
        "--examples",
        str(folder / "table.csv"),
        "--out",
        str(folder / "csv"),
    ]
    assert ask(capsys, *audit)["settings"]["length_tokens"] == 20
    (folder / "broken").mkdir()
    (folder / "broken" / "examples.jsonl").write_text('{"tokens": "abc"}\n')
    message = refusal(capsys, *words(folder, "nothing", examples="broken"))
    assert "row 1: tokens is not a list of token ids; expected integers of 0 or more" in message
    assert not (folder / "nothing").exists()


def test_refusals_of_localize(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for inside in ("model", "model/run"):
        before = sorted((folder / "model").rglob("*"))
        assert "is the model's own folder, or inside it; choose" in refusal(capsys, *words(folder, inside))
        audited = ["--examples", str(folder / "examples.jsonl"), "--out", str(folder / inside)]
        message = refusal(capsys, "audit", str(folder / "model"), *audited)
        assert "is the model's own folder" in message
        assert sorted((folder / "model").rglob("*")) == before

    def refused(rows: list[tuple[str, str]], *more: str) -> str:
        examples = write_rows(tmp_path / "rows.jsonl", rows)
        start = [
            "localize",
            str(folder / "model"),
            "--examples",
            str(examples),
            "--out",
            str(tmp_path / "run"),
        ]
        return refusal(capsys, *start, *CUT, *more)

    strange, short = sentences(3, seed=9), "river stone"
    message = refused([(text, "target") for text in strange])
    assert "the model repeats 0 of 3 target texts verbatim (0% to 56%) after 8 tokens" in message
    assert message.endswith("to localize; give --force to go on")
    message = refused([(short, "target")])
    assert "expected at least 8 + 8; drop it or shorten prefix and suffix" in message
    message = refused([(strange[0], "target"), (strange[0], "ordinary")])
    assert "is both target and ordinary" in message
    assert "names no text of group target" in refused([(strange[0], "neighbour")])
    (tmp_path / "ordinary.txt").write_text(f"And {strange[0]} again\n")
    message = refused([(strange[0], "target")], "--ordinary", str(tmp_path / "ordinary.txt"))
    assert "1 of 1 ordinary texts share a passage with a target (numbers 1; 1 shares " in message
    assert "with target 1); take them out" in message
    one = [(strange[0], "target")]
    assert "unknown method 'magic' for a language model; expected one or more of" in refused(
        one, "--method", "magic"
    )
    assert "outliers compares with ordinary texts" in refused(one, "--method", "outliers")
    assert "share is 0.0, expected a fraction above 0" in refused(one, "--share", "0")
    assert "cannot use device 'cuda'" in refused(one, "--device", "cuda")
    assert "device 'meta' holds no numbers" in refused(one, "--device", "meta")
    message = refused(one, "--threshold", "0.3", "--clusters", "--blocks", "up")
    assert "--clusters, --threshold, --blocks: for pipelines" in message
    assert "length are 8, 8 and 0 tokens; expected 1 or more" in refused(one, "--length", "0")
    assert not (tmp_path / "run").exists()
    write_rows(tmp_path / "rows.jsonl", one)
    start = ["localize", str(folder / "model"), "--examples", str(tmp_path / "rows.jsonl")]
    assert ask(capsys, *start, "--out", str(tmp_path / "run"), *CUT, "--force")["num_memorized"] == 0


def test_a_tokenizer_without_an_end_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "eos_token"}))
    (tmp_path / "model" / "special_tokens_map.json").unlink(missing_ok=True)
    named = ["--examples", str(folder / "examples.jsonl"), "--out", str(tmp_path / "run")]
    message = refusal(capsys, "localize", str(tmp_path / "model"), *named)
    assert "has no end-of-text token; set eos_token and save it again" in message


def audit_words(folder: Path, out: str, *more: str) -> list[str]:
    named = ["--examples", str(folder / "examples.jsonl"), "--out", str(folder / out)]
    return ["audit", str(folder / "model"), *named, "--ordinary", str(folder / "ordinary.txt"), *more]


def test_audit_compares_states(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(capsys, *words(folder, "audited", "--method", "gradient activations"))
    answer = ask(capsys, *audit_words(folder, "audited", "--max-extraction", "0.001"), code=1)
    states = {one["state"]: one for one in answer["states"]}
    assert list(states) == ["before", "after", "placebo"]
    targets = {name: one["groups"][0] for name, one in states.items()}
    rates = {name: one["extraction"][0]["matched_prefix_tokens"] for name, one in targets.items()}
    assert rates["before"]["value"] == 8.0 if rates["before"]["value"] else rates["before"]["refused"]
    assert states["after"]["num_neurons"] == states["placebo"]["num_neurons"] == 10
    assert {point["method"] for point in answer["curve"]} == {
        "gradient",
        "activations",
        "random",
        "magnitude",
    }
    assert all(point["ordinary_perplexity"]["value"] > 1 for point in answer["curve"])
    assert answer["continuations"][0]["generated"].keys() == states.keys()
    assert isinstance(load_any_audit(folder / "audited" / "audit.json"), NeuronAudit)
    assert main(["report", str(folder / "audited")]) == 0
    page = (folder / "audited" / "report.html").read_text()
    assert "Agreement between methods" in page and "magnitude (control)" in page
    assert "random neurons off" in page and "Marked tokens" in page
    message = refusal(capsys, *audit_words(folder, "audited"))
    assert "already holds an audit; choose another folder" in message


def test_neurons_of_another_model_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder / "other.json"
    value = json.loads((folder / "run" / "neurons.json").read_text())
    other.write_text(json.dumps({**value, "model_id": "llama-0000"}))
    message = refusal(capsys, *audit_words(folder, "none", "--neurons", str(other), *CUT))
    assert "use the model it was made for" in message
    message = refusal(capsys, *audit_words(folder, "none", "--twin", str(folder / "model")))
    assert "give --neurons FILE, or localize first" in message
    assert not (folder / "none").exists()


def test_edits_stay_within_a_budget(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def start(way: str, *more: str) -> list[str]:
        named = ["--ordinary", str(folder / "ordinary.txt"), "--way", way, "--out", str(tmp_path / "plain")]
        return ["remove", str(folder / "model"), *named, *more]

    examples = ("--examples", str(folder / "examples.jsonl"))
    message = refusal(capsys, *start("subnet"))
    assert message == "unmemorize: subnet needs --examples FILE: the texts that are to go"
    message = refusal(capsys, *start("svd", "--budget", "2"))
    assert "budget is 2.0, expected a rise of perplexity from 0 to 1" in message
    message = refusal(capsys, *start("npo", *examples, "--budget", "0", "--neurons", "x.json"))
    assert "edits weights without neurons; leave out --neurons" in message
    with pytest.MonkeyPatch.context() as patch:
        found = iter([20.0, 26.0])
        patch.setattr("unmemorize.verbs.language_remove._perplexity", lambda model, texts: next(found))
        message = refusal(capsys, *start("curvature", *examples))
    assert (
        "perplexity of ordinary texts rises by 30.0% (20.00 to 26.00), budget 10.0%; raise --budget"
        in message
    )
    assert list(tmp_path.iterdir()) == []
    answer = ask(capsys, *start("curvature", *examples, "--budget", "1", "--keep-undo"))
    assert answer["logit_difference"] < 1e-4 and answer["perplexity_rise_frac"] <= 1
    assert fingerprint(undone(tmp_path / "plain")) == fingerprint(load(folder / "model"))
    assert json.loads((tmp_path / "plain" / "unmemorize.json").read_text())["method"] == "curvature"


@pytest.mark.parametrize("way", ["output-vectors", "npo"])
def test_an_edit_leaves_a_plain_folder_and_nothing_of_what_it_removed(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, way: str
) -> None:
    words = ["remove", str(folder / "model"), "--way", way, "--examples", str(folder / "examples.jsonl")]
    words += ["--ordinary", str(folder / "ordinary.txt"), "--budget", "1", "--out", str(tmp_path / "plain")]
    answer = ask(capsys, *words, "--prefix", "8")
    assert answer["undo"] is None and answer["logit_difference"] < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    manifest = json.loads((tmp_path / "plain" / "unmemorize.json").read_text())
    assert manifest["method"] == way and "undo" not in manifest
    assert fingerprint(load(tmp_path / "plain")) != fingerprint(load(folder / "model"))
