"""`audit` of neurons of language models: interrupted and continued, and the bar that it may be held to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cells.planted_texts import write_planted, write_rows
from tests.cells.test_verbs import ask
from unmemorize.audit import neurons as audit_neurons
from unmemorize.cli import main
from unmemorize.localize.neuron_scores import load_scores
from unmemorize.models.language import load
from unmemorize.neurons import load_neurons
from unmemorize.remove.language import excise, export

CUT = ("--prefix", "8", "--suffix", "8")
NUM_STATES = 3  # before, after, placebo
NUM_MEASURED = (
    NUM_STATES + 3 * 5 - 1
)  # and gradient and two controls, five numbers of neurons each, one of them after


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that recites twelve texts, all of them targets, and what was localized."""
    folder = tmp_path_factory.mktemp("audits")
    _, memorized, ordinary = write_planted(folder / "model", num_texts=12)
    write_rows(folder / "examples.jsonl", [(text, "target") for text in memorized])
    write_rows(folder / "fewer.jsonl", [(text, "target") for text in memorized[:6]])
    (folder / "ordinary.txt").write_text("\n".join(ordinary))
    localize(folder, "run", "--share", "0.03")
    return folder


def localize(folder: Path, out: str, *more: str) -> None:
    named = ["--examples", str(folder / "examples.jsonl"), "--out", str(folder / out)]
    assert main(["localize", str(folder / "model"), *named, *CUT, *more]) == 0


def audit_words(folder: Path, out: Path, *more: str, examples: str = "examples.jsonl") -> list[str]:
    named = ["--examples", str(folder / examples), "--out", str(out)]
    neurons = ["--neurons", str(folder / "run" / "neurons.json")]
    return ["audit", str(folder / "model"), *named, *neurons, *CUT, *more]


class Counted:
    """Counts measured states, and interrupts the one with a given number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num, self.interrupted_at = 0, 0
        self._extract: Callable[..., Any] = audit_neurons.extract
        monkeypatch.setattr(audit_neurons, "extract", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num += 1
        if self.num == self.interrupted_at:
            raise KeyboardInterrupt
        return self._extract(*args, **kwargs)

    def run(self, words: list[str], interrupted_at: int = 0) -> int:
        """Run a command; returns how many states it measured to the end."""
        self.num, self.interrupted_at = 0, interrupted_at
        assert main(words) == (130 if interrupted_at else 0)
        return self.num - bool(interrupted_at)


def figures(out: Path) -> dict[str, Any]:
    value = json.loads((out / "audit.json").read_text())
    return {name: value[name] for name in ("verdict", "states", "continuations", "curve", "sites")}


@pytest.mark.parametrize("at", [2, NUM_STATES + 4])
def test_an_interrupted_audit_continues(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Interrupted at a state or at a point of the curve, it measures what is missing, and gives the same figures."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "localization.json", "neurons.json"):
        (out / name).write_bytes((folder / "run" / name).read_bytes())
    scores = load_scores(folder / "run" / "scores" / "gradient.safetensors")
    scores.save(out / "scores" / "gradient.safetensors")
    words = [*audit_words(folder, out), "--ordinary", str(folder / "ordinary.txt")]
    counted = Counted(monkeypatch)
    assert counted.run(words, interrupted_at=at) == at - 1
    assert not (out / "audit.json").exists()
    kept = sorted((out / "measured").iterdir())
    assert len(kept) == at - 1 and all(path.suffix == ".safetensors" for path in kept)
    assert counted.run(words) == NUM_MEASURED - (at - 1)
    continued = figures(out)
    for path in [out / "audit.json", *(out / "measured").iterdir()]:
        path.unlink()
    assert counted.run(words) == NUM_MEASURED
    assert figures(out) == continued
    (out / "audit.json").unlink()
    assert counted.run(words) == 0 and figures(out) == continued


def test_other_inputs_are_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, counted = tmp_path / "run", Counted(monkeypatch)
    assert counted.run(audit_words(folder, out), interrupted_at=NUM_STATES) == 2
    assert counted.run(audit_words(folder, out, examples="fewer.jsonl"), interrupted_at=NUM_STATES) == 2
    ordinary = ("--ordinary", str(folder / "ordinary.txt"))
    assert counted.run(audit_words(folder, out, *ordinary), interrupted_at=NUM_STATES) == 2
    assert counted.run(audit_words(folder, out, "--prefix", "9"), interrupted_at=NUM_STATES) == 2
    # Texts in another group are the same texts; with other neurons only the state without any is the same.
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    grouped = [(row["text"], "neighbour" if number > 9 else "target") for number, row in enumerate(rows)]
    write_rows(folder / "grouped.jsonl", grouped)
    scores = load_scores(folder / "run" / "scores" / "gradient.safetensors")
    other = scores.top(0.05).save(tmp_path / "other.json")
    words = [*audit_words(folder, out, examples="grouped.jsonl"), "--neurons", str(other)]
    assert counted.run(words) == 2
    states = {one["state"]: one for one in figures(out)["states"]}
    assert states["after"]["num_neurons"] == 10
    sizes = [(group["group"], group["num_examples"]) for group in states["before"]["groups"]]
    assert sizes == [("target", 10), ("neighbour", 2)]
    fresh = tmp_path / "fresh"
    assert counted.run([*audit_words(folder, fresh, examples="grouped.jsonl"), "--neurons", str(other)]) == 3
    assert figures(fresh) == figures(out)


def test_ordinary_texts_that_chose_the_neurons_are_not_measured(folder: Path, tmp_path: Path) -> None:
    """Contrast sees three of four ordinary texts; what the model loses is measured on the others."""
    ordinary = ("--ordinary", str(folder / "ordinary.txt"))
    out = tmp_path / "compared"
    localize(folder, str(out), "--share", "0.03", "--method", "contrast", *ordinary)
    num_texts = len((folder / "ordinary.txt").read_text().splitlines())
    assert len(json.loads((out / "localization.json").read_text())["compared"]) == num_texts * 3 // 4
    words = [
        "audit",
        str(folder / "model"),
        "--examples",
        str(folder / "examples.jsonl"),
        "--out",
        str(out),
        *CUT,
    ]
    assert main([*words, *ordinary]) == 0
    found = json.loads((out / "audit.json").read_text())
    assert found["settings"]["num_ordinary"] == num_texts // 4
    assert (
        f"{num_texts * 3 // 4} ordinary texts helped to choose the neurons and are not measured."
        in found["limits"]
    )
    seen = [
        text for number, text in enumerate((folder / "ordinary.txt").read_text().splitlines()) if number % 4
    ]
    (folder / "seen.txt").write_text("\n".join(seen))
    (out / "audit.json").unlink()
    assert main([*words, "--ordinary", str(folder / "seen.txt")]) == 0
    limits = json.loads((out / "audit.json").read_text())["limits"]
    assert any(limit.startswith("All ordinary texts helped to choose") for limit in limits)


def test_a_damaged_measurement_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, counted = tmp_path / "run", Counted(monkeypatch)
    assert counted.run(audit_words(folder, out), interrupted_at=NUM_STATES) == 2
    first, second = sorted((out / "measured").iterdir())
    first.write_bytes(first.read_bytes()[:100])
    second_bytes = second.read_bytes()
    assert counted.run(audit_words(folder, out), interrupted_at=2) == 1
    assert second.read_bytes() == second_bytes
    second.write_bytes(first.read_bytes())  # another state under this name
    assert counted.run(audit_words(folder, out)) == 2
    states = [one["groups"][0]["loss_nats"]["value"] for one in figures(out)["states"]]
    assert len(set(states)) == 3


def test_removed_folders_are_kept_apart(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of another shape has its own fingerprint; the model itself as twin is not measured twice."""
    export(
        excise(load(folder / "model"), load_neurons(folder / "run" / "neurons.json")),
        tmp_path / "plain",
        manifest={},
    )
    more = ("--mended", str(tmp_path / "plain"), "--twin", str(folder / "model"))
    counted = Counted(monkeypatch)
    assert counted.run(audit_words(folder, tmp_path / "run", *more)) == 4
    states = {one["state"]: one["groups"] for one in figures(tmp_path / "run")["states"]}
    assert states["twin"] == states["before"] != states["mended"]


def test_the_bar_of_extraction_is_met_or_missed(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What counts is the upper end of the interval after the neurons are off, not the rate itself."""
    scores = load_scores(folder / "run" / "scores" / "gradient.safetensors")
    neurons = str(scores.top(0.5).save(tmp_path / "half.json"))
    states = ask(capsys, *audit_words(folder, tmp_path / "none", "--neurons", neurons))["states"]
    before, after = (
        one["groups"][0]["extraction"][0]["extraction_rate_frac"]
        for one in states
        if one["state"] != "placebo"
    )
    upper = after["ci95"][1]
    assert before["value"] == 1.0 and after["value"] < upper < 0.9

    def shown(name: str, bar: str, code: int, *more: str) -> str:
        capsys.readouterr()
        words = audit_words(folder, tmp_path / name, "--neurons", neurons, "--max-extraction", bar, *more)
        assert main(words) == code and (tmp_path / name / "audit.json").is_file()
        return capsys.readouterr().out

    line = f"extraction at most {upper:.1%} (95 %), bar"
    met, missed = f"{upper + 0.01:.3f}", f"{(after['value'] + upper) / 2:.3f}"
    assert f"{line} {float(met):.1%}: met" in shown("met", met, 0)
    assert f"{line} {float(missed):.1%}: missed" in shown("missed", missed, 1)
    assert json.loads(shown("json", missed, 1, "--json"))["kind"] == "neurons"
    # A mended folder that is given is what the bar is held to.
    mended = ("--mended", str(folder / "model"))
    assert "extraction at most 100.0% (95 %), bar 99.0%: missed" in shown("mended", "0.99", 1, *mended)


def test_a_refused_rate_meets_no_bar(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = audit_words(folder, tmp_path / "run", "--max-extraction", "0.99", examples="fewer.jsonl")
    capsys.readouterr()
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "refused (6 examples; a rate needs 12" in out
    assert "extraction at most 100.0% (95 %), bar 99.0%: missed" in out
