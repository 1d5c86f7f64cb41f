"""`remove --way EDIT` of language models, way by way: the budget, the manifest, and protected texts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.cells.planted_texts import sentences, write_planted, write_rows
from tests.cells.test_verbs import ask, refusal
from unmemorize.audit.language import document_losses
from unmemorize.cli import main
from unmemorize.errors import SelfCheckFailed
from unmemorize.models.language import fingerprint, load
from unmemorize.tokenizer import encode_documents, load_tokenizer
from unmemorize.verbs import language_remove


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that recites eight texts, examples, ordinary texts and texts to protect."""
    folder = tmp_path_factory.mktemp("edits")
    _, memorized, ordinary = write_planted(folder / "model")
    write_rows(folder / "examples.jsonl", [(text, "target") for text in memorized[:4]])
    (folder / "ordinary.txt").write_text("\n".join(ordinary))
    write_rows(folder / "protect.jsonl", [(text, "ordinary") for text in sentences(6, seed=5)])
    return folder


def words(folder: Path, out: Path, way: str, *more: str) -> list[str]:
    named = ["--examples", str(folder / "examples.jsonl"), "--ordinary", str(folder / "ordinary.txt")]
    return ["remove", str(folder / "model"), "--way", way, *named, "--out", str(out), *more]


def test_what_is_protected_stays_more(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Whether a folder loads alone is the matter of other tests, and takes a process.
    monkeypatch.setattr("unmemorize.verbs.language_remove._proof", lambda model, out: 0.0)
    protect = ("--protect", str(folder / "protect.jsonl"), "--budget", "1")
    alone = ask(capsys, *words(folder, tmp_path / "alone", "curvature", "--budget", "1"))
    answer = ask(capsys, *words(folder, tmp_path / "both", "curvature", *protect))
    assert (alone["num_protected"], answer["num_protected"]) == (0, 6)
    read = [(tmp_path / name / "unmemorize.json").read_text() for name in ("alone", "both")]
    manifests = [json.loads(text) for text in read]
    assert "num_protected" not in manifests[0] and manifests[1]["num_protected"] == 6
    passes = [one["cost"]["forward_equivalents"] for one in manifests]
    assert passes[1] - passes[0] == 3 * 6  # curvature of the protected texts: three passes each
    before = load(folder / "model").state_dict()
    moved = [
        sum(float((one - before[name]).norm()) for name, one in load(tmp_path / out).state_dict().items())
        for out in ("alone", "both")
    ]
    assert 0 < moved[1] < moved[0]


def test_what_cannot_be_protected_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(way: str, path: Path, *more: str) -> str:
        return refusal(capsys, *words(folder, tmp_path / "plain", way, "--protect", str(path), *more))

    given = folder / "protect.jsonl"
    for way in ("svd", "npo", "subnet", "output-vectors", "fold", "edit"):
        message = refused(way, given)
        assert message == (
            f"unmemorize: --protect is for --way curvature of language models; --way {way} does not look at it: "
            "leave it out"
        )
    plain = ["remove", str(folder / "model"), "--out", str(tmp_path / "plain"), "--protect", str(given)]
    assert "cutting neurons out does not look at it" in refusal(capsys, *plain)
    target = json.loads((folder / "examples.jsonl").read_text().splitlines()[2])["text"]
    mixed = write_rows(tmp_path / "mixed.jsonl", [("river stone", "ordinary"), (target, "ordinary")])
    message = refused("curvature", mixed)
    assert "text 2 of" in message and "with target 3; what is protected stays, take it out" in message
    message = refused("curvature", folder / "ordinary.txt")
    assert "3 texts of" in message and "stand among the ordinary texts that watch the budget" in message
    assert "none.jsonl does not exist" in refused("curvature", tmp_path / "none.jsonl")
    (tmp_path / "broken.jsonl").write_text("not JSON\n")
    assert "broken.jsonl" in refused("curvature", tmp_path / "broken.jsonl")
    assert not (tmp_path / "plain").exists()


def test_protection_is_no_matter_of_pipelines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    start = ["remove", str(tmp_path / "pipeline"), "--out", str(tmp_path / "out"), "--protect", "x.jsonl"]
    assert "--protect is for --way curvature of language models" in refusal(capsys, *start, "--way", "edit")
    assert "for a pipeline give --neurons FILE" in refusal(capsys, *start, "--way", "curvature")


@pytest.mark.parametrize("way", ["svd", "gradient-ascent", "gradient-difference", "simnpo"])
def test_every_way_writes_what_it_did_within_the_budget(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    # Whether a folder loads alone is the matter of other tests, and takes a process.
    monkeypatch.setattr("unmemorize.verbs.language_remove._proof", lambda model, out: 0.0)
    before, tokenizer = load(folder / "model"), load_tokenizer(folder / "model")
    answer = ask(capsys, *words(folder, tmp_path / "plain", way, "--budget", "0.5"))
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    manifest = json.loads((tmp_path / "plain" / "unmemorize.json").read_text())
    assert (manifest["way"], manifest["method"], manifest["num_targets"]) == ("edit", way, 4)
    assert manifest["budget_frac"] == 0.5 and "undo" not in manifest
    assert manifest["perplexity_rise_frac"] == answer["perplexity_rise_frac"] <= 0.5
    assert manifest["model"] == fingerprint(before)
    if way != "svd":
        assert manifest["settings"]["perplexity_budget_frac"] == 0.5
        assert manifest["cost"]["forward_equivalents"] > 0
    after = load(tmp_path / "plain")
    assert fingerprint(after) != fingerprint(before)
    # Every fourth ordinary text is kept back: what is said of them is what the folder does.
    kept_back = encode_documents(tokenizer, (folder / "ordinary.txt").read_text().splitlines())[::4]
    found = [perplexity(model, kept_back) for model in (before, after)]
    assert answer["perplexity"] == pytest.approx(found, rel=1e-4)
    targets = [json.loads(line)["text"] for line in (folder / "examples.jsonl").read_text().splitlines()]
    losses = [perplexity(model, encode_documents(tokenizer, targets)) for model in (before, after)]
    assert losses[1] > losses[0]


def test_unlearning_takes_a_learning_rate_and_nothing_else_does(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmemorize.verbs.language_remove._proof", lambda model, out: 0.0)
    rate = ("--learning-rate", "3e-4", "--budget", "1")
    ask(capsys, *words(folder, tmp_path / "plain", "npo", *rate))
    manifest = json.loads((tmp_path / "plain" / "unmemorize.json").read_text())
    assert manifest["settings"]["learning_rate"] == 3e-4
    message = refusal(capsys, *words(folder, tmp_path / "other", "svd", *rate))
    assert message == (
        "unmemorize: --learning-rate is for unlearning (gradient-ascent, gradient-difference, npo, simnpo); --way svd "
        "has none: leave it out"
    )
    message = refusal(capsys, *words(folder, tmp_path / "other", "npo", "--learning-rate", "0"))
    assert "learning_rate is 0" in message
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("way", ["svd", "gradient-ascent", "gradient-difference", "simnpo"])
def test_no_way_writes_anything_beyond_the_budget(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    found = iter([20.0, 22.4])
    monkeypatch.setattr("unmemorize.verbs.language_remove._perplexity", lambda model, texts: next(found))
    message = refusal(capsys, *words(folder, tmp_path / "plain", way, "--keep-undo"))
    assert f"no edit by {way} within the budget: perplexity of ordinary texts rises by 12.0%" in message
    assert message.endswith("budget 10.0%; raise --budget or choose another --way")
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_allows_no_step_is_said(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unlearning that went back to where it started has changed nothing, and no folder pretends that it did."""
    monkeypatch.setattr("unmemorize.remove.language_edits.unlearn", lambda *_, **__: {})
    message = refusal(capsys, *words(folder, tmp_path / "plain", "gradient-ascent", "--budget", "0"))
    assert message == (
        "unmemorize: gradient-ascent changed nothing within a budget of 0.0%; raise --budget or choose another --way"
    )
    assert list(tmp_path.iterdir()) == []


def perplexity(model: Any, texts: list[tuple[int, ...]]) -> float:
    found = document_losses(model, texts)
    return math.exp(found.nll_nats.sum() / found.num_tokens.sum())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SelfCheckFailed])
def test_a_removal_that_is_not_proved_leaves_nothing_and_can_be_asked_for_again(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    def stopped(*_: object) -> None:
        raise error

    command = words(folder, tmp_path / "plain", "svd", "--keep-undo")
    with monkeypatch.context() as patch:
        patch.setattr(language_remove, "_proof", stopped)
        assert main(command) in (2, 130)
    assert not any(tmp_path.iterdir())
    assert ask(capsys, *command)["folder"] == str(tmp_path / "plain")
