"""Verbs for text-to-image models, on tiny random pipelines: what they write, print and refuse."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from tests.cells.test_verbs import ask, refusal
from tests.tiny_diffusion import tiny_clip, tiny_pipeline
from unmemorize.audit import picture_quality
from unmemorize.audit.pictures import write_picture
from unmemorize.cli import main
from unmemorize.models.diffusion import fingerprint, load
from unmemorize.neurons import load_neurons
from unmemorize.remove.diffusion import undone

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
    answer = ask(capsys, *words(folder, "run", "--threshold=-1"))
    run = folder / "run"
    assert answer["num_targets"] == 2 and answer["neurons"] == str(run / "neurons.json")
    names = {"localization.json", "localization.jsonl", "localization.csv", "neurons.json", "gate.jsonl"}
    assert names | {"statistics.safetensors"} == {path.name for path in run.iterdir()}
    assert [json.loads(line)["group"] for line in (run / "gate.jsonl").read_text().splitlines()] == [
        "neighbour"
    ]
    load_neurons(run / "neurons.json")
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.suffix == ".jsonl"}
    again = ask(capsys, *words(folder, "run", "--threshold=-1"))
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
    assert "--calibrate is -5, expected 0" in refusal(capsys, *words(folder, "refused", "--calibrate=-5"))
    assert "num_samples 0, gate_samples 2" in refusal(capsys, *words(folder, "refused", "--num-samples", "0"))
    assert not (folder / "refused").exists()
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


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run in which every target is taken for memorized."""
    assert main(words(folder, "found", "--threshold=-1")) == 0
    return folder / "found"


QUICK = ("--num-seeds", "1", "--num-steps", "2", "--size-px", "64", "--guidance", "2")


def test_audit_compares_states_and_report_shows_them(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rivals = "placebo first-layer padding:z tokens:2 adjusted"
    start = ["audit", str(folder / "pipe"), "--examples", str(folder / "prompts.csv"), "--out", str(run)]
    answer = ask(capsys, *start, *QUICK, "--rivals", rivals, "--twin", str(folder / "pipe"))
    names = ["before", "after", "own", "twin", "placebo", "first-layer", "padding", "tokens-2", "adjusted"]
    assert [state["state"] for state in answer["states"]] == names
    assert [(row["prompt"], row["group"]) for row in answer["localized"]] == [
        ("a photo of the lighthouse", "target"),
        ("stone garden", "target"),
        ("a lamp", "neighbour"),
    ]
    assert [len(prompt["made"]["after"]) for prompt in answer["prompts"]] == [1, 1, 1]
    assert sum(len(site["indices"]) for site in answer["sites"]) == len(load_neurons(run / "neurons.json"))
    assert main(["report", str(run)]) == 0
    assert "a photo of the lighthouse" in (run / "report.html").read_text()
    assert ask(capsys, *start, *QUICK, "--max-extraction", "0.5", code=1)["kind"] == "pictures"


def drawn(folder: Path, number: int) -> Path:
    pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return write_picture(folder / f"{number}.png", pixels)


def test_audit_measures_the_quality_of_ordinary_pictures(
    folder: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, out = drawn(tmp_path / "own", 0), tmp_path / "run"
    for number in range(1, 7):
        drawn(tmp_path / "real", number)
    prompts, texts = tmp_path / "prompts.csv", tmp_path / "texts.csv"
    texts.write_text(f"prompt,group,picture\na lamp,target,{own}\n")
    prompts.write_text(texts.read_text() + "".join(f"{text},ordinary,\n" for text in CAPTIONS))
    clip = str(tiny_clip(tmp_path / "clip"))
    start = ["audit", str(folder / "pipe"), "--out", str(out), "--neurons", str(run / "neurons.json"), *QUICK]
    start += ["--num-seeds", "3", "--num-steps", "1", "--examples", str(prompts)]
    real = ["--reference", str(tmp_path / "real")]
    assert "by the features of a CLIP model; name one with --clip" in refusal(capsys, *start, *real)
    start += ["--clip", clip]
    message = refusal(capsys, *start, *real, "--examples", str(texts))
    assert "none of the prompts is in group ordinary; add some" in message
    message = refusal(capsys, *start, "--reference", str(tmp_path))
    assert f"1 of 7 reference pictures are training pictures of the audited prompts (first: {own})" in message
    assert "nowhere holds no pictures or does not exist" in refusal(capsys, *start, "--reference", "nowhere")
    assert not out.exists()

    monkeypatch.setattr(picture_quality, "MIN_PICTURES", 5)
    assert main([*start, *real]) == 0
    printed = capsys.readouterr().out
    named = [line for line in printed.splitlines() if ": on ordinary prompts alignment " in line]
    assert len(named) == 3 and all(", KID " in line and "[" in line for line in named)
    assert "FID refused (5 pictures in the smallest sample; FID with 8 features needs 40)" in named[0]
    audit = json.loads((out / "audit.json").read_text())
    for state in audit["states"]:
        target, ordinary = state["groups"]
        assert target["kid"] is None and ordinary["kid"]["num"] == 3
        assert f"KID {ordinary['kid']['value']:.4g} [" in printed
    assert audit["measures"]["kid"] == (
        f"Distance to 6 reference pictures by the features of CLIP {clip}; 0 is best."
    )
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "FID with 8 features needs 40" in page and ">KID<" in page and "Distance to 6 reference" in page


@pytest.mark.parametrize("way", ["fold", "edit"])
def test_remove_writes_a_plain_pipeline(
    folder: Path, run: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / way
    named = ["--neurons", str(run / "neurons.json"), "--way", way]
    prompts = ["--examples", str(folder / "prompts.csv"), "--ordinary", str(folder / "ordinary.txt")]
    answer = ask(capsys, "remove", str(folder / "pipe"), "--out", str(out), *named, *prompts, "--keep-undo")
    assert answer["num_neurons"] == len(load_neurons(run / "neurons.json"))
    before, after = fingerprint(load(folder / "pipe")), fingerprint(load(out))
    assert before != after and fingerprint(undone(out)) == before
    manifest = json.loads((out / "unmemorize.json").read_text())
    assert (manifest["way"], manifest["model"], manifest["result"]) == (way, before, after)


def test_an_edit_without_neurons_changes_the_searched_layers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--way",
        "edit",
        "--examples",
        str(folder / "prompts.csv"),
        "--ordinary",
        str(folder / "ordinary.txt"),
    ]
    ask(capsys, "remove", str(folder / "pipe"), "--out", str(folder / "layers"), *words)
    assert fingerprint(load(folder / "layers")) != fingerprint(load(folder / "pipe"))


def test_refusals_of_audit_and_remove(folder: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, prompts = str(folder / "pipe"), str(folder / "prompts.csv")
    assert "give --examples FILE (prompts) and --out RUN" in refusal(capsys, "audit", pipe)
    assert "is the model's own folder" in refusal(
        capsys, "audit", pipe, "--examples", prompts, "--out", f"{pipe}/audit"
    )
    start = ["audit", pipe, "--examples", prompts, "--out", str(folder / "nothing")]
    assert "neurons.json does not exist" in refusal(capsys, *start)
    start = [*start, "--neurons", str(run / "neurons.json"), *QUICK]
    assert "unknown rival 'magic'; expected placebo" in refusal(capsys, *start, "--rivals", "magic")
    message = refusal(capsys, *start, "--size-px", "63")
    assert "size_px is 63; pictures of state 'before' need a multiple of 8 pixels" in message
    message = refusal(capsys, *start, "--sscd", "model.pt")
    assert "the name of model.pt tells no SSCD variant" in message
    assert "give --neurons FILE, or --way edit" in refusal(capsys, "remove", pipe, "--out", str(folder / "x"))
    tiny_pipeline("sd1", seed=1).save_pretrained(folder / "other")
    named = ["--neurons", str(run / "neurons.json"), "--out", str(folder / "x")]
    assert "use the model it was made for" in refusal(capsys, "remove", str(folder / "other"), *named)
    message = refusal(capsys, "remove", pipe, *named, "--way", "edit")
    assert "an edit needs the prompts it is to quiet" in message
    assert not (folder / "x").exists()


def test_long_prompts_are_named_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "long.txt"
    path.write_text("photo " * 90 + "lighthouse\n")
    named = [
        "--examples",
        str(path),
        "--ordinary",
        str(folder / "ordinary.txt"),
        "--out",
        str(folder / "long"),
    ]
    capsys.readouterr()
    assert main(["localize", str(folder / "pipe"), *named, "--threshold", "0.9999"]) == 0
    err = capsys.readouterr().err
    assert err.count("unmemorize: warning: ") == 1 and "lighthouse" in err and "UserWarning" not in err
    assert "[transformers]" not in err and "was truncated because" not in err


def test_clusters_share_one_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "alike.txt"
    path.write_text("a photo of the red cat\na photo of the blue cat\nstone garden\n")
    named = [
        "--examples",
        str(path),
        "--ordinary",
        str(folder / "ordinary.txt"),
        "--out",
        str(folder / "alike"),
    ]
    answer = ask(capsys, "localize", str(folder / "pipe"), *named, "--threshold=-1", "--clusters")
    assert answer["num_targets"] == 3 and answer["num_memorized"] == 2
    assert answer["results"][0]["refined"] == answer["results"][1]["refined"]
