"""Isolation in text-to-image models from the command line: train, audit in every state, take the pool out, report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from torch import Tensor

from tests.tiny_diffusion import WORDS, tiny_clip, tiny_pipeline
from unmemorize.audit import picture_quality
from unmemorize.audit.pictures import write_picture
from unmemorize.cli import main
from unmemorize.isolate.plan import SinkPlan
from unmemorize.records import Measure, PictureAudit, load_any_audit

NUM_PICTURES = 12
SETTING = "sinks-sinks_per_id-3"  # the states of method sinks:sinks_per_id=3
STATES = ["before", "dedup", "sinks-off", "sinks-own", "sinks-foreign", "sinks-all", "placebo-sinks"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    tiny_pipeline("sd1").save_pretrained(folder / "pipe")
    generator = np.random.default_rng(0)
    lines = ["file_name,caption"]
    for number, word in enumerate(WORDS[-NUM_PICTURES:]):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        write_picture(folder / "pictures" / f"{number}.png", pixels)
        lines.append(f"{number}.png,a {word}")
    (folder / "pictures" / "metadata.csv").write_text("\n".join(lines) + "\n")
    config = {
        "mixture": {"num_repeated": 5, "repeats": 3, "num_once": 2, "num_validation": 5},
        "method": {
            "sinks": {"share_frac": 1.0, "grown": 16, "active_frac": None, "sinks_per_id": 4},
            "compute": "masked",
        },
        "optimization": {"batch_rows": 4, "learning_rate": 0.01},
        "device": "cpu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def words(material: Path, out: Path) -> list[str]:
    start = ["train", "--out", str(out), "--pipeline", str(material / "pipe"), "--pictures"]
    start += [str(material / "pictures"), "--config", str(material / "config.json"), "--size-px", "64"]
    return [*start, "--methods", "standard dedup sinks", "--seeds", "0"]


def values(measure: Measure | None) -> float:
    assert measure is not None and measure.value is not None
    return measure.value


def test_train_audit_remove_report(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(words(material, run)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: unmemorize audit {run}"
    audit = ["audit", str(run), "--num-seeds", "1", "--num-steps", "1", "--guidance", "3", "--device", "cpu"]
    assert main(audit) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"next: unmemorize report {run}"
    found = load_any_audit(run / "audits" / "seed0" / "audit.json")
    assert isinstance(found, PictureAudit)
    assert [state.state for state in found.states] == STATES
    closed = found.states[2]
    assert closed.num_neurons > 0 and not closed.is_rival
    for state, name in ((found.states[0], "standard"), (closed, "sinks")):
        logged = json.loads((run / f"models/{name}-seed0/metrics.jsonl").read_text().splitlines()[-1])
        losses = {group.group: group.denoising_loss for group in state.groups}
        assert values(losses["target"]) == pytest.approx(logged["repeated_loss"], rel=1e-4)
        assert values(losses["ordinary"]) == pytest.approx(logged["validation_loss"], rel=1e-4)
    target = {state.state: values(state.groups[0].denoising_loss) for state in found.states}
    assert len({target[name] for name in STATES}) == len(STATES)
    ordinary = {state.state: values(state.groups[1].denoising_loss) for state in found.states}
    assert ordinary["sinks-off"] == ordinary["sinks-own"] == ordinary["sinks-foreign"]
    assert len({ordinary[name] for name in ("sinks-off", "sinks-all", "placebo-sinks")}) == 3
    assert "copies refused (5 examples; a rate needs 12" in printed
    assert printed.count("; validation loss 0.") + printed.count("; validation loss 1.") == len(STATES)
    made = {
        state: [(run / "audits" / "seed0" / path).read_bytes() for path in found.prompts[0].made[state]]
        for state in STATES
    }
    assert made["sinks-own"] != made["sinks-off"] != made["sinks-foreign"]
    placebo = found.states[-1]
    assert placebo.is_rival and placebo.num_neurons == 4 * closed.num_neurons // 16
    assert made["sinks-own"] != made["placebo-sinks"] != made["sinks-off"]
    figures = {group.group: group.similarities[0] for group in closed.groups}
    assert figures["ordinary"].kept_beyond_placebo is not None
    model = run / "models" / "sinks-seed0"
    assert main(["remove", str(model), "--out", str(tmp_path / "plain")]) == 0
    assert "loads without unmemorize" in capsys.readouterr().out
    assert DiffusionPipeline.from_pretrained(str(tmp_path / "plain")) is not None
    kept = str(json.loads((run / "examples.jsonl").read_text().splitlines()[0])["id"])
    assert main(["remove", str(model), "--out", str(tmp_path / "kept"), "--keep", kept]) == 0
    printed = capsys.readouterr().out
    assert f"removed {closed.num_neurons * 12 // 16} neurons, kept {placebo.num_neurons} of 1 ids" in printed
    assert "loads without unmemorize, grown sinks closed; load_with_sinks opens them" in printed
    assert json.loads((tmp_path / "kept" / "unmemorize.json").read_text())["kept_ids"] == [int(kept)]
    assert (tmp_path / "kept" / "sinks.json").is_file() and not (tmp_path / "plain" / "sinks.json").exists()
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "sinks, own" in page and "all sinks closed" in page and "sinks, placebo" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--corpus", "texts.jsonl"], "--corpus, --model and --text-column are for texts"),
        (
            ["--pictures", "nowhere"],
            "nowhere does not exist; expected a .npz archive or a folder of pictures",
        ),
        (["--ids", "index"], "setting ids cannot be used"),
        (["--methods", "goldfish"], "method goldfish is for language models"),
    ],
)
def test_mistakes_are_explained_and_write_nothing(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    assert main([*words(material, tmp_path / "run"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pictures_need_a_pipeline_and_an_audit_finished_models(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), "--pictures", str(material / "pictures")]) == 2
    assert "give --pipeline FOLDER" in capsys.readouterr().err
    (tmp_path / "settings.json").write_text(json.dumps({"pipeline": str(material / "pipe")}))
    assert main(["train", "--out", str(tmp_path / "run"), "--config", str(tmp_path / "settings.json")]) == 2
    assert "give --pictures FOLDER" in capsys.readouterr().err
    run = tmp_path / "half"
    run.mkdir()
    head = {"format": "unmemorize.run", "format_version": 1, "kind": "training", "family": "diffusion"}
    settings = {"methods": ["standard"], "seeds": [0]}
    (run / "config.json").write_text(json.dumps(head | {"settings": settings}))
    (run / "examples.jsonl").write_text("")
    assert main(["audit", str(run)]) == 2
    assert "is not trained yet; run unmemorize train again" in capsys.readouterr().err
    assert main(["audit", str(run), "--copy-threshold", "2"]) == 2
    assert "--copy-threshold is 2.0, expected above 0 and at most 1" in capsys.readouterr().err
    assert main(["audit", str(run), "--rivals", "padding", "--twin", str(material / "pipe")]) == 2
    assert "--twin, --rivals: for a pipeline; a run is audited with its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "code", "message"),
    [
        ("sinks", 1, "copies of targets with sinks closed at most 100.0% (95 %), bar 0.0%: missed"),
        ("standard dedup", 2, "--max-extraction is about closed sinks, and"),
    ],
)
def test_a_bar_is_never_met_by_what_was_not_measured(
    material: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    methods: str,
    code: int,
    message: str,
) -> None:
    run = tmp_path / "run"
    assert main([*words(material, run), "--methods", methods]) == 0
    bar = ["--num-seeds", "1", "--num-steps", "1", "--device", "cpu", "--max-extraction", "0"]
    assert main(["audit", str(run), *bar]) == code
    printed = capsys.readouterr()
    assert message in printed.out + printed.err


def test_quality_on_ordinary_prompts_stands_beside_every_state(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = tmp_path / "run", tmp_path / "real.npz"
    assert main([*words(material, run), "--methods", "standard dedup"]) == 0
    pixels = np.random.default_rng(1).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    np.savez(real, images=pixels)
    audit = ["audit", str(run), "--num-seeds", "3", "--num-steps", "1", "--device", "cpu"]
    capsys.readouterr()
    assert main([*audit, "--reference", str(real)]) == 2
    assert "name one with --clip" in capsys.readouterr().err
    audit += ["--clip", str(tiny_clip(tmp_path / "clip")), "--reference"]
    assert main([*audit, str(material / "pictures")]) == 2
    assert "5 of 12 reference pictures are training pictures of the audited" in capsys.readouterr().err
    assert not (run / "audits").exists()

    assert main([*audit, str(real)]) == 0
    small = "5 pictures in the smallest sample; KID needs 100, FID more"
    printed = capsys.readouterr().out
    assert printed.count("; on ordinary prompts alignment ") == 2
    assert printed.count(f", KID and FID refused ({small})") == 2
    monkeypatch.setattr(picture_quality, "MIN_PICTURES", 5)
    assert main([*audit, str(real), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    found = load_any_audit(run / "audits" / "seed0" / "audit.json")
    assert isinstance(found, PictureAudit)
    for state in found.states:
        ordinary = next(group for group in state.groups if group.group == "ordinary")
        for name in ("alignment", "kid"):
            assert answer[name][state.state] == [values(getattr(ordinary, name))]
        assert answer["fid"][state.state] == []
        assert answer["refused"]["fid"][state.state].endswith("FID with 8 features needs 40")
    assert "kid" not in answer["refused"]


def test_a_language_model_has_no_pictures_to_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(tmp_path), "--reference", "real", "--clip", "clip", "--size-px", "64"]) == 2
    message = "--clip, --reference, --size-px: for pipelines and runs on pictures, without effect on a language model"
    assert message in capsys.readouterr().err


def test_foreign_sinks_are_those_of_another_repeated_picture(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, opened = tmp_path / "run", []
    assert main([*words(material, run), "--methods", "sinks"]) == 0
    own_choice = SinkPlan.foreign_ids

    def noted(plan: SinkPlan, ids: Tensor, candidates: Tensor | None = None) -> Tensor:
        chosen = own_choice(plan, ids, candidates)
        opened.extend(zip(ids.tolist(), chosen.tolist(), strict=True))
        return chosen

    monkeypatch.setattr(SinkPlan, "foreign_ids", noted)
    audit = ["audit", str(run), "--num-seeds", "1", "--num-steps", "1", "--device", "cpu"]
    assert main(audit) == 0
    rows = [json.loads(line) for line in (run / "examples.jsonl").read_text().splitlines()]
    repeated = {row["id"] for row in rows if row["group"] == "target"}
    asked = [(own, other) for own, other in opened if own in repeated]
    assert {own for own, _ in asked} == repeated
    assert all(other in repeated - {own} for own, other in asked)


def test_pictures_that_share_a_caption_are_each_measured_with_their_own_sinks(
    material: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main([*words(material, run), "--methods", "standard sinks:sinks_per_id=3"]) == 0
    rows = [json.loads(line) for line in (run / "examples.jsonl").read_text().splitlines()]
    for row in (rows[0], rows[1], rows[5]):  # two repeated pictures and an ordinary one
        row["caption"] = "a red cat"
    (run / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    audit = ["audit", str(run), "--num-seeds", "1", "--num-steps", "1", "--device", "cpu"]
    assert main([*audit, "--copy-threshold", "0.25"]) == 0
    found = load_any_audit(run / "audits" / "seed0" / "audit.json")
    assert isinstance(found, PictureAudit)
    assert found.copy_thresholds == {"structure": 0.25}
    first, second, *others = found.prompts
    assert [one.prompt for one in (first, second)] == ["a red cat", "a red cat"]
    assert [one.name for one in (first, second, others[0])] == ["target-0000", "target-0001", ""]
    assert len(others) == 3 + 4 and all(one.prompt != "a red cat" for one in others)
    folder = run / "audits" / "seed0"
    for state, is_equal in (("before", True), (f"{SETTING}-off", True), (f"{SETTING}-own", False)):
        one, other = ((folder / made.made[state][0]).read_bytes() for made in (first, second))
        assert (one == other) == is_equal, state
    assert first.copy_similarity[f"{SETTING}-off"] != second.copy_similarity[f"{SETTING}-off"]
    assert any(
        limit.startswith("1 ordinary pictures have the caption of a repeated") for limit in found.limits
    )
    assert any(limit.startswith("2 pictures share their caption") for limit in found.limits)


def test_plans_with_an_owner_for_every_sink_and_lone_methods_can_be_audited(
    material: Path, tmp_path: Path
) -> None:
    config = json.loads((material / "config.json").read_text())
    config["method"]["sinks"] |= {"scheme": "disjoint", "grown": 64}
    (tmp_path / "disjoint.json").write_text(json.dumps(config))
    disjoint = ["--methods", "sinks", "--config", str(tmp_path / "disjoint.json")]
    for name, change in (("disjoint", disjoint), ("standard", ["--methods", "standard"])):
        run = tmp_path / name
        assert main([*words(material, run), *change]) == 0
        audit = ["audit", str(run), "--num-seeds", "1", "--num-steps", "1", "--device", "cpu"]
        assert main(audit) == 0
