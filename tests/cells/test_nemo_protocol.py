"""The recipe for the published protocol, on a tiny pipeline with few prompts: every stage, and again without work."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from tests.tiny_diffusion import tiny_pipeline
from unmemorize.records import PictureAudit, load_any_audit

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("nemo_protocol")


def test_the_protocol_runs_and_continues(
    tmp_path: Path, recipe: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline("sd1").save_pretrained(tmp_path / "pipe")
    (tmp_path / "memorized.csv").write_text(
        "caption,type,mean_sscd\na photo of the lighthouse,VM,0.8\nstone garden,TM,\n"
    )
    (tmp_path / "ordinary.csv").write_text("caption\na red cat\nthe blue house\nriver stone\n")
    words = [str(tmp_path / "pipe"), "--memorized", str(tmp_path / "memorized.csv"), "--ordinary"]
    words += [str(tmp_path / "ordinary.csv"), "--out", str(tmp_path / "run"), "--rivals", "placebo tokens:1"]
    words += ["--num-seeds", "2", "--num-steps", "2", "--size-px", "64", "--device", "cpu"]
    path = recipe.main(words)
    table = path.read_text()
    assert "Gate 0.428: " in table and "AUC: 2 memorized and 3 ordinary prompts" in table
    assert "No target is memorized: nothing was removed." in table
    rows = [
        line.split(" | ") for line in table.splitlines() if line.startswith(("| VM", "| TM", "| ordinary"))
    ]
    audit = load_any_audit(tmp_path / "run" / "audit.json")
    assert isinstance(audit, PictureAudit)
    kinds = [row[0].removeprefix("| ") for row in rows if row[1] == "before"]
    assert kinds[:3] == ["VM", "VM, one a cluster", "VM, strict"] and "TM, strict" not in kinds
    assert [row[1] for row in rows if row[0] == "| VM"] == [state.label for state in audit.states]
    assert "mended" in [state.state for state in audit.states]
    assert rows[0][3] == "1.00 ± 0.00" and rows[0][2] == ""
    capsys.readouterr()
    assert recipe.main(words).read_text() == table
    assert "pictures" not in capsys.readouterr().err
