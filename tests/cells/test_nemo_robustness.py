"""What follows the published protocol, on a tiny pipeline: every section, its controls, and again without work."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.tiny_diffusion import tiny_clip, tiny_pipeline
from unmemorize.audit.pictures import write_picture
from unmemorize.records import PictureAudit, load_any_audit
from unmemorize.verbs import diffusion, picture_localize

# Euler's schedule in diffusers converts tensors in a way that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("nemo_robustness")


def write_table(path: Path, captions: list[str], *, group: str) -> Path:
    generator = np.random.default_rng(len(group))
    lines = ["caption,picture,group"]
    for number, caption in enumerate(captions):
        name = f"{path.stem}-{number}.png"
        write_picture(path.parent / name, generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        lines.append(f"{caption},{name},{group}")
    path.write_text("\n".join(lines) + "\n")
    return path


def run_folder(folder: Path) -> Path:
    """Localize with a threshold that everything passes, and fold: what the protocol leaves behind."""
    tiny_pipeline("sd1").save_pretrained(folder / "pipe")
    run = folder / "run"
    run.mkdir()
    table = write_table(run / "prompts.csv", ["a photo of the lighthouse", "stone garden"], group="target")
    (folder / "ordinary.csv").write_text("caption\na red cat\nthe blue house\nriver stone\n")
    options = picture_localize.NemoOptions(threshold=-1.0, num_samples=2)
    loading = diffusion.Loading(device="cpu")

    def tell(_: object) -> None: ...

    pipe = str(folder / "pipe")
    picture_localize.localize(tell, pipe, table, run, folder / "ordinary.csv", options, loading)
    diffusion.remove(tell, pipe, run / "plain", run / "neurons.json", "fold", False, None, None, None)
    return run


def test_every_section_is_measured_beside_its_control(
    tmp_path: Path,
    recipe: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recipe, "STEPS", (3,))
    monkeypatch.setattr(recipe, "GUIDANCE", (12.0,))
    monkeypatch.setattr(recipe, "SCHEDULERS", ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"))
    monkeypatch.setattr(recipe, "SEEDS", (1000, 1001, 1002))
    run = run_folder(tmp_path)
    coco = write_table(tmp_path / "coco.csv", ["a green boat", "the moon"], group="ordinary")
    controls = write_table(tmp_path / "controls.csv", ["an old tree", "the small sea"], group="ordinary")
    words = [str(tmp_path / "pipe"), str(run), "--num-steps", "1", "--size-px", "64", "--device", "cpu"]
    text = recipe.main(words).read_text()
    assert "Not measured: it needs training pictures of the targets, and --controls" in text
    assert "Not measured: give --coco" in text and not (run / "attacks.jsonl").exists()
    words += ["--coco", str(coco), "--controls", str(controls), "--budgets", "1,2", "--num-attacked", "1"]
    words += ["--clip", str(tiny_clip(tmp_path / "clip"))]
    text = recipe.main(words).read_text()
    assert text.index("## Locality") < text.index("## Permanence") < text.index("## Quality")
    assert "2 memorized prompts in 2 groups" in text
    audit = load_any_audit(run / "permanence" / "audit.json")
    assert isinstance(audit, PictureAudit)
    states = {state.state for state in audit.states}
    assert {"before", "mended", "steps-3-before", "guidance-12-mended"} < states
    assert {"dpmsolvermultistep-mended", "unipcmultistep-mended"} < states
    pictures = {row.state: row.seconds for row in audit.states}
    assert all(seconds > 0 for seconds in pictures.values())
    attacks = [json.loads(line) for line in (run / "attacks.jsonl").read_text().splitlines()]
    assert len(attacks) == 2 * 3 * 2  # pictures, starts, budgets
    assert {row["kind"] for row in attacks} == {"target", "control"}
    assert all(row["passes"] == 8 * row["num_steps"] for row in attacks)
    assert "| Gaussian | 2 |" in text
    capsys.readouterr()
    assert recipe.main(words).read_text() == text
    assert "pictures:" not in capsys.readouterr().err
    assert len((run / "attacks.jsonl").read_text().splitlines()) == len(attacks)


def test_excess_is_the_difference_of_the_means(recipe: ModuleType) -> None:
    attacks = importlib.import_module("embedding_attack")
    found = attacks.excess([0.9, 0.8, 0.9, 0.8, 0.9, 0.8], [0.3, 0.2, 0.3, 0.2, 0.3, 0.2])
    assert found.value == pytest.approx(0.6) and found.ci95[0] > 0.5
    rows = [
        {"start": "Gaussian", "num_steps": 50, "kind": kind, "best_similarity": value}
        for kind, value in [("target", 0.9), ("control", 0.2)] * 6
    ]
    assert (
        "| Gaussian | 50 | 0.90 [0.90, 0.90] | 0.20 [0.20, 0.20] | 0.70 [0.70, 0.70] |"
        in attacks.attack_table(rows, "structure")
    )
