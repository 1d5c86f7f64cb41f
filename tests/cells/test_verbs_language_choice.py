"""`localize` of language models: layers together or apart, layers left out, and the search for few neurons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cells.planted_texts import write_planted, write_rows
from tests.cells.test_verbs import ask, refusal
from unmemorize.cli import main
from unmemorize.localize.neuron_scores import load_scores
from unmemorize.localize.suffix import measured
from unmemorize.neurons import load_neurons
from unmemorize.records import TextLocalization

CUT = ("--prefix", "8", "--suffix", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two layers of 96 neurons, and texts that it recites."""
    folder = tmp_path_factory.mktemp("choice")
    _, memorized, ordinary = write_planted(folder / "model")
    rows = [(text, "target") for text in memorized[:6]] + [(text, "ordinary") for text in ordinary[:8]]
    write_rows(folder / "examples.jsonl", rows)
    write_rows(folder / "few.jsonl", rows[:2])
    return folder


def words(folder: Path, out: str, *more: str, examples: str = "examples.jsonl") -> list[str]:
    named = ["--examples", str(folder / examples), "--out", str(folder / out)]
    return ["localize", str(folder / "model"), *named, *CUT, *more]


def test_layers_compete_when_told_to(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(capsys, *words(folder, "global", "--share", "0.024", "--select", "global"))
    scores = load_scores(folder / "global" / "scores" / "gradient.safetensors")
    neurons = load_neurons(folder / "global" / "neurons.json")
    assert neurons == scores.top(0.024, per_layer=False) and len(neurons) == 5
    assert len(scores.top(0.024)) == 4
    assert (answer["selection"], answer["skipped_layers"], answer["search"]) == ("global", [], None)
    assert sum(answer["methods"][0]["neurons_per_layer"]) == 5
    audit = ["audit", str(folder / "model"), "--examples", str(folder / "examples.jsonl")]
    found = ask(capsys, *audit, "--out", str(folder / "global"))
    assert found["settings"]["selection"] == "global"
    points = [point for point in found["curve"] if point["method"] == "gradient"]
    by_share = {point["share_frac"]: point["num_neurons"] for point in points}
    assert by_share[0.01] == 2 and by_share[0.002] == 1  # of 192 neurons; per layer it would be at least 2
    assert main(["report", str(folder / "global")]) == 0
    assert "of all layers" in (folder / "global" / "report.html").read_text()


def test_layers_are_left_out_by_choice_scores_and_curve(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--share", "0.05", "--skip-layers", "0", "--method", "gradient,random")
    answer = ask(capsys, *words(folder, "skipped", *more))
    assert answer["skipped_layers"] == [0]
    assert [one["neurons_per_layer"] for one in answer["methods"]] == [[0, 5], [0, 5]]
    scores = load_scores(folder / "skipped" / "scores" / "gradient.safetensors")
    assert scores.values[0].max() == -float("inf") and scores.values[1].isfinite().all()
    audit = ["audit", str(folder / "model"), "--examples", str(folder / "examples.jsonl")]
    curve = ask(capsys, *audit, "--out", str(folder / "skipped"))["curve"]
    assert {point["num_neurons"] for point in curve if point["share_frac"] == 0.1} == {10}
    assert {point["method"] for point in curve} == {"gradient", "random", "magnitude"}


def test_zero_out_tries_the_best_of_the_gradient_when_told_to(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--method", "zero-out,gradient", "--candidates", "12", "--select", "global", "--share", "0.03")
    answer = ask(capsys, *words(folder, "candidates", *more))
    zero_out, gradient = (
        load_scores(folder / "candidates" / "scores" / f"{name}.safetensors")
        for name in ("zero-out", "gradient")
    )
    assert set(zero_out.ranked()) == set(gradient.ranked()[:12])
    assert answer["methods"][0]["forward_equivalents"] < 6 * 20  # six texts; all 192 neurons would be 6 * 193
    assert "(candidates differ)" in refusal(capsys, *words(folder, "candidates", *more[:2], *more[4:]))
    for wrong in (("--candidates", "0", "--method", "zero-out"), ("--candidates", "5")):
        message = refusal(capsys, *words(folder, "none", *wrong))
        assert "expected 1 or more, and zero-out among the methods" in message
    assert not (folder / "none").exists()


def test_choices_are_shown_and_another_choice_is_another_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(words(folder, "shown", "--skip-layers", "0", "--select", "global", "--share", "0.02")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "chosen: the best 0.02 of all layers together, layer 0 left out"
    assert lines[2].startswith("gradient: 2 neurons in 1 layer; ")
    settings = json.loads((folder / "shown" / "config.json").read_text())["settings"]
    assert (settings["select"], settings["skip_layers"], settings["leave"]) == ("global", [0], None)
    start = words(folder, "shown", "--share", "0.02")
    assert "holds another run (select, skip_layers differ); choose" in refusal(capsys, *start)
    start += ["--skip-layers", "0", "--select", "global"]
    assert "holds another run (leave differ); choose" in refusal(capsys, *start, "--search")


def test_a_run_from_before_these_choices_is_continued(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(capsys, *words(folder, "old"))
    config = folder / "old" / "config.json"
    value = json.loads(config.read_text())
    for name in ("select", "skip_layers", "leave"):
        del value["settings"][name]
    config.write_text(json.dumps(value))
    stored = json.loads((folder / "old" / "localization.json").read_text())
    for name in ("selection", "skipped_layers", "search"):
        del stored[name]
    assert TextLocalization.model_validate(stored).selection == "per-layer"
    assert ask(capsys, *words(folder, "old", "--method", "gradient,random"))["selection"] == "per-layer"
    assert "(select differ)" in refusal(capsys, *words(folder, "old", "--select", "global"))
    del value["settings"]
    config.write_text(json.dumps(value))
    message = refusal(capsys, *words(folder, "old"))
    assert "config.json holds no settings; localize into a new folder" in message


def search_words(folder: Path, out: str, *more: str) -> list[str]:
    return words(folder, out, "--search", *more, examples="few.jsonl")


def test_search_finds_few_neurons_and_remembers_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = ask(capsys, *search_words(folder, "searched", "--leave", "0.4"))
    found = answer["search"]
    assert found["left_frac"] <= found["leave_frac"] == 0.4 and found["num_texts"] == 2
    # No text keeps more than 0.4 of its likelihood, so neither does the mean over texts of equal length.
    assert 0 < found["likelihood_after_frac"] <= 0.4 * found["likelihood_before_frac"] + 1e-6
    assert found["likelihood_before_frac"] > 0.5
    neurons = load_neurons(folder / "searched" / "neurons.json")
    assert len(neurons) == found["num_neurons"] == sum(found["neurons_per_layer"]) < 192
    assert answer["methods"][0]["num_neurons"] == 2  # the share stays what methods are compared by
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmemorize.localize.recital.smallest_set", None)
        more = ("--leave", "0.4", "--method", "gradient,random")
        again = ask(capsys, *search_words(folder, "searched", *more))
    assert again["search"] == found and load_neurons(folder / "searched" / "neurons.json") == neurons
    capsys.readouterr()
    assert main(search_words(folder, "searched", "--leave", "0.4")) == 0
    shown = (
        f"search along gradient: {found['num_neurons']} neurons off leave at most {found['left_frac']:.2g} of"
    )
    assert any(line.startswith(shown) for line in capsys.readouterr().out.splitlines())
    audit = ["audit", str(folder / "model"), "--examples", str(folder / "few.jsonl")]
    audited = ask(capsys, *audit, "--out", str(folder / "searched"))
    assert audited["states"][1]["num_neurons"] == found["num_neurons"]
    assert audited["settings"]["search"]["leave_frac"] == 0.4
    assert main(["report", str(folder / "searched")]) == 0
    assert "searched for along the ranking by gradient" in (folder / "searched" / "report.html").read_text()


def test_an_interrupted_search_measures_no_set_twice(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = ask(capsys, *search_words(folder, "whole", "--leave", "0.4"))["search"]
    num_calls, stops_before = 0, 6

    def count(*words: object, **more: object) -> object:
        nonlocal num_calls
        if num_calls == stops_before:
            raise KeyboardInterrupt
        num_calls += 1
        return measured(*words, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmemorize.localize.recital.measured", count)
        assert main(search_words(folder, "stopped", "--leave", "0.4")) == 130
        assert capsys.readouterr().err.endswith("interrupted; run the same command again to continue\n")
        kept = (folder / "stopped" / "search.jsonl").read_bytes()
        assert len(kept.splitlines()) == 1 + 6 and not (folder / "stopped" / "neurons.json").exists()
        stops_before = -1
        found = ask(capsys, *search_words(folder, "stopped", "--leave", "0.4"))["search"]
    assert {**found, "seconds": 0} == {**whole, "seconds": 0}
    names = ("neurons.json", "examples.jsonl")
    for name in names:
        assert (folder / "stopped" / name).read_bytes() == (folder / "whole" / name).read_bytes()

    def without_seconds(out: str) -> list[dict]:
        lines = (folder / out / "search.jsonl").read_text().splitlines()
        return [{**json.loads(line), "seconds": 0} for line in lines]

    assert without_seconds("stopped") == without_seconds("whole")
    assert num_calls == len(without_seconds("whole")) - 1


def test_a_search_that_reaches_nothing_says_so_and_may_be_asked_for_less(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, *search_words(folder, "hard", "--leave", "0"))
    assert message.startswith("unmemorize: no set along the ranking by gradient leaves 0 of the likelihood")
    assert "with all 192 neurons off" in message and message.endswith("raise --leave, or skip fewer layers")
    left = {path.name for path in (folder / "hard").iterdir()}
    assert left == {"config.json", "examples.jsonl", "scores", "search.jsonl"}
    scores = folder / "hard" / "scores" / "gradient.safetensors"
    before = scores.stat().st_mtime_ns
    message = refusal(capsys, *search_words(folder, "hard", "--select", "global"))
    assert "holds another run (select, leave differ); choose" in message
    message = refusal(capsys, *search_words(folder, "hard", "--leave", "0", "--share", "0.02"))
    assert "holds another run (share differ); choose" in message
    answer = ask(capsys, *search_words(folder, "hard"))
    assert answer["search"]["leave_frac"] == 0.5 and before == scores.stat().st_mtime_ns
    assert "(leave differ)" in refusal(capsys, *search_words(folder, "hard", "--leave", "0.1"))


def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def refused(*more: str) -> str:
        return refusal(capsys, *words(folder, "none", *more))

    assert "--skip-layers names layer 2; expected numbers from 0 to 1, and not all" in refused(
        "--skip-layers", "2"
    )
    assert "--skip-layers names layer -1;" in refused("--skip-layers=-1")
    assert "--skip-layers leaves no layer; expected" in refused("--skip-layers", "0,1")
    assert "'a' is not a list of whole numbers" in refused("--skip-layers", "a")
    assert "leave is 1.0, expected a fraction from 0 to below 1" in refused("--search", "--leave", "1")
    assert "--leave says when --search ends; give --search too" in refused("--leave", "0.5")
    assert not (folder / "none").exists()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    start = ["localize", str(tmp_path / "pipeline"), "--examples", str(tmp_path / "prompts.txt")]
    for more in (
        ["--select", "per-layer"],
        ["--skip-layers", "0"],
        ["--search"],
        ["--leave", "0.5"],
        ["--share", "0.5"],
        ["--force"],
        ["--prefix", "8"],
    ):
        message = refusal(capsys, *start, "--out", str(tmp_path / "run"), *more)
        assert f"{more[0]}: for language models, without effect on a pipeline; leave out" in message
    assert not (tmp_path / "run").exists()
