"""The command line end to end: a quick demo, what can be done with its run folder, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from unmemorize.cli import main
from unmemorize.models.language import find_mlps, load
from unmemorize.records import load_audit

pytestmark = pytest.mark.timeout(300)  # the first test pays for a whole demo

GROUPS_OF_A_DELETION = ["target", "neighbour"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "demo"
    assert main(["demo", "--quick", "--out", str(folder)]) == 0
    return folder


def ask(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict:
    """Run a verb with --json and return what it printed."""
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a verb that must be refused, and return its one line."""
    capsys.readouterr()
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    *progress, message = captured.err.strip().splitlines()
    assert captured.out == "" and message.startswith("unmemorize: ")
    assert not any(line.startswith("unmemorize: ") or "Traceback" in line for line in progress)
    return message


def test_demo_leaves_a_complete_run(run: Path) -> None:
    assert {"config.json", "examples.jsonl", "audit.json", "report.html", "models", "plain"} <= {
        path.name for path in run.iterdir()
    }
    audit = load_audit(run / "audit.json")
    assert [m.method for m in audit.methods] == ["standard", "dedup", "cap:8", "sinks"]
    sinks = audit.methods[-1].seeds[0]
    assert [s.state for s in sinks.states] == ["off", "own", "foreign", "all", "exclude", "placebo"]
    assert [g.group for g in sinks.states[-2].groups] == GROUPS_OF_A_DELETION
    assert sinks.curve and sinks.continuations and sinks.documents


def test_the_plain_model_is_the_off_state_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exported model, audited as anyone's model on the run's examples, gives the off state's losses."""
    off = load_audit(run / "audit.json").methods[-1].seeds[0]
    out = run.parent / "plain-audit"
    again = ask(
        capsys, "audit", str(run / "plain"), "--examples", str(run), "--out", str(out), "--length", "128"
    )
    seed = again["methods"][0]["seeds"][0]
    for name in ("validation_loss_nats", "repeated_loss_nats"):
        assert seed[name]["value"] == pytest.approx(getattr(off, name).value, abs=1e-5)
    assert (out / "audit.json").is_file()
    assert main(["report", str(out)]) == 0 and (out / "report.html").is_file()


def test_fold_keeps_the_width_and_excise_does_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = run / "models" / "sinks-seed0"
    folded = ask(capsys, "remove", str(trained), "--out", str(run.parent / "folded"), "--way", "fold")
    assert folded["widths"][0] == folded["widths"][1] and folded["logit_difference"] <= 1e-5
    narrow = find_mlps(load(run / "plain"))[0].site.width
    assert narrow < folded["widths"][0]
    kept_id = json.loads((run / "examples.jsonl").read_text().splitlines()[0])["id"]
    kept = ask(capsys, "remove", str(trained), "--out", str(run.parent / "kept"), "--keep", str(kept_id))
    assert kept["widths"][1] == narrow + 64 and kept["logit_difference"] <= 1e-5


def test_a_bar_that_is_missed_gives_exit_code_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(capsys, "audit", str(run), "--max-extraction", "1.0")
    ask(capsys, "audit", str(run), "--max-extraction", "0.0", code=1)


def test_check_and_plan_answer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = ask(capsys, "check", str(run / "plain"))
    assert checked["passed"] and len(checked["checks"]) == 4
    sizes = ["--pool", "4096", "--sinks", "64", "--sources", "1000", "--deletions", "6"]
    planned = ask(capsys, "plan", *sizes)
    assert planned["forecast"]["shared_sinks"] == pytest.approx(1.0)


def test_a_finished_run_is_not_trained_again_and_has_nothing_to_localize_after_four_steps(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "models" / "standard-seed0" / "model.safetensors").stat().st_mtime_ns
    found = ask(capsys, "demo", "--quick", "--out", str(run))["localized"]
    assert (run / "models" / "standard-seed0" / "model.safetensors").stat().st_mtime_ns == before
    assert len(found) == 1 and found[0].startswith(
        "nothing to localize: the model repeats 0 of 8 target texts"
    )
    assert not (run / "localized").exists()


def test_bad_input_is_refused_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01\x02")
    (tmp_path / "broken.json").write_text("{")
    assert "holds no documents" in refusal(
        capsys, "train", "--corpus", str(tmp_path / "empty.jsonl"), "--out", out
    )
    assert "binary" in refusal(capsys, "train", "--corpus", str(tmp_path / "binary.txt"), "--out", out)
    assert "another run" in refusal(capsys, "train", "--corpus", "python-docs", "--out", str(run))
    assert "unknown method" in refusal(capsys, "train", "--methods", "magic", "--out", out)
    assert "whole numbers" in refusal(capsys, "train", "--seeds", "a,b", "--out", out)
    assert "not a readable JSON file" in refusal(
        capsys, "train", "--config", str(tmp_path / "broken.json"), "--out", out
    )
    assert "give --examples and --out" in refusal(capsys, "audit", str(run / "plain"))
    assert "no config.json" in refusal(capsys, "check", str(tmp_path))
    assert "already holds something" in refusal(
        capsys, "remove", str(run / "models" / "sinks-seed0"), "--out", str(run / "plain")
    )
    assert "an id cannot own" in refusal(capsys, "plan", "--pool", "4", "--sinks", "5", "--sources", "1")
    assert "not a table row" in refusal(capsys, "check", str(run / "plain"), "--row", "{}")
    assert not Path(out).exists()


def test_files_of_another_model_and_torn_files_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(run / "models" / "standard-seed0", copy)
    shutil.copy(run / "models" / "sinks-seed0" / "sinks.json", copy)
    assert "was made for" in refusal(capsys, "remove", str(copy), "--out", str(tmp_path / "out"))
    text = (copy / "sinks.json").read_text()
    (copy / "sinks.json").write_text(text[: len(text) // 2])
    assert "not complete JSON" in refusal(capsys, "remove", str(copy), "--out", str(tmp_path / "out"))
    (copy / "model.safetensors").write_bytes(b"\x00" * 20)
    assert "cannot load" in refusal(capsys, "check", str(copy))
    torn = tmp_path / "run"
    shutil.copytree(run, torn)
    (torn / "audit.json").write_text("{")
    assert "not complete JSON" in refusal(capsys, "report", str(torn))
    assert not (tmp_path / "out").exists()
