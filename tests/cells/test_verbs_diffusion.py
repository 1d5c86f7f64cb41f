"""Verbs for text-to-image models, on tiny random pipelines: what they write, print and refuse."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.cells.test_verbs import ask, refusal
from tests.tiny_diffusion import tiny_pipeline
from unmemorize.models.diffusion import fingerprint, load
from unmemorize.neurons import load_neurons

CAPTIONS = ["a red cat", "the blue house", "a photo of the moon", "river stone", "tree of the garden"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, a table of prompts and ordinary captions."""
    folder = tmp_path_factory.mktemp("verbs")
    tiny_pipeline("sd1").save_pretrained(folder / "pipe")
    (folder / "ordinary.txt").write_text("\n".join(CAPTIONS))
    with (folder / "prompts.csv").open("w", newline="") as stream:
        rows = [("a photo of the lighthouse", "target"), ("a lamp", "neighbour"), ("stone garden", "target")]
        csv.writer(stream).writerows([("prompt", "group"), *rows])
    return folder


def words(folder: Path, out: str, *more: str) -> list[str]:
    named = ["--examples", str(folder / "prompts.csv"), "--ordinary", str(folder / "ordinary.txt")]
    return ["localize", str(folder / "pipe"), *named, "--out", str(folder / out), *more]


def test_check_knows_the_family(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(capsys, "check", str(folder / "pipe"))
    assert answer["passed"] and answer["model"] == fingerprint(load(folder / "pipe", run_check=False))


def test_localize_writes_a_run_and_continues_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(capsys, *words(folder, "run", "--threshold", "0.0001"))
    run = folder / "run"
    assert answer["num_targets"] == 2 and answer["neurons"] == str(run / "neurons.json")
    names = {"localization.json", "localization.jsonl", "localization.csv", "neurons.json", "gate.jsonl"}
    assert names | {"statistics.safetensors"} == {path.name for path in run.iterdir()}
    assert [json.loads(line)["group"] for line in (run / "gate.jsonl").read_text().splitlines()] == [
        "neighbour"
    ]
    load_neurons(run / "neurons.json")
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.suffix == ".jsonl"}
    again = ask(capsys, *words(folder, "run", "--threshold", "0.0001"))
    assert [r["refined"] for r in again["results"]] == [r["refined"] for r in answer["results"]]
    assert before["gate.jsonl"] == (run / "gate.jsonl").stat().st_mtime_ns


def test_no_prompt_passes_the_gate_is_a_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(capsys, *words(folder, "none", "--threshold", "0.9999"))
    assert answer["num_memorized"] == 0
    assert len(load_neurons(folder / "none" / "neurons.json")) == 0


def test_the_threshold_is_calibrated_on_ordinary_prompts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = ask(capsys, *words(folder, "calibrated", "--calibrate", "3"))
    stored = json.loads((folder / "calibrated" / "calibration.json").read_text())
    assert stored["num_prompts"] == 3 and answer["gate_threshold"] == stored["threshold"]
    message = refusal(capsys, *words(folder, "calibrated", "--calibrate", "4"))
    assert "was calibrated with another num_prompts and digest; choose a new folder" in message
    assert ask(capsys, *words(folder, "published", "--calibrate", "0"))["gate_threshold"] == 0.428


def test_bad_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pipe, examples = str(folder / "pipe"), str(folder / "prompts.csv")
    start = ["localize", pipe, "--examples", examples, "--out", str(tmp_path / "run")]
    assert "give --ordinary FILE" in refusal(capsys, *start)
    mixed = tmp_path / "mixed.txt"
    mixed.write_text("a red cat\na lamp\n")
    assert "stands among the examples and among the ordinary" in refusal(
        capsys, *start, "--ordinary", str(mixed)
    )
    none = tmp_path / "none.csv"
    none.write_text("prompt,group\na cat,ordinary\n")
    message = refusal(capsys, "localize", pipe, "--examples", str(none), "--out", str(tmp_path / "run"))
    assert "names no prompt of group target" in message
    message = refusal(capsys, *words(folder, "blocks", "--blocks", "side"))
    assert "no blocks named 'side'; this denoiser has down, mid, up" in message
    assert "cannot use device 'cuda'" in refusal(capsys, *words(folder, "device", "--device", "cuda"))
    assert not (tmp_path / "run").exists()
