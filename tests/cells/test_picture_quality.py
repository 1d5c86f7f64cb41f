"""The judge of drawings and the table of what removal costs ordinary prompts."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.synthetic_audit import measure
from tests.unit.synthetic_picture_audit import synthetic_picture_audit
from unmemorize.audit.prompt_alignment import ClipAlignment
from unmemorize.records import PictureAudit
from unmemorize.testbeds.drawings import COLOURS, draw_pictures

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(RECIPES))
    return {name: importlib.import_module(name) for name in ("judge", "picture_quality_table")}


def test_the_judge_learns_drawings_and_is_a_clip_that_audits_load(
    recipes: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "judge",
        "--size-px",
        "12",
        "--num-drawings",
        "60",
        "--steps",
        "60",
        "--batch-size",
        "20",
        "--out",
    ]
    monkeypatch.setattr("sys.argv", [*words, str(tmp_path / "judge")])
    monkeypatch.setattr(recipes["judge"], "NUM_TEST", 10)
    recipes["judge"].main()
    assert "right caption among all: " in capsys.readouterr().out
    judge = ClipAlignment.load(tmp_path / "judge")
    drawings = draw_pictures(70, seed=99, size_px=12)[10:]
    pixels = [drawing.pixels for drawing in drawings]
    own = judge.scores([drawing.caption for drawing in drawings], pixels)
    other = judge.scores([drawing.caption for drawing in drawings[::-1]], pixels)
    assert (own > other).mean() > 0.9


def test_rewordings_change_one_colour_each(recipes: dict[str, ModuleType]) -> None:
    caption = "a small red bar above a large blue square on white"
    found = recipes["judge"].reworded(caption)
    assert len(found) == len(set(found)) == 3 * (len(COLOURS) - 3)
    assert all(sum(a != b for a, b in zip(one.split(), caption.split(), strict=True)) == 1 for one in found)


def test_states_are_tabled_over_audits_as_their_own_figures_say(
    recipes: dict[str, ModuleType], tmp_path: Path
) -> None:
    audits = [_with_losses(synthetic_picture_audit(tmp_path / str(n)), n) for n in range(3)]
    lines = recipes["picture_quality_table"].table(audits)
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    rows = {line.split(" | ")[0].strip("| "): line.strip("|").split("|") for line in lines[2:]}
    assert list(rows) == [state.label for state in audits[0].states]
    losses = rows["Neurons off"][heads.index("validation loss")].strip()
    assert losses == "11.0 % [8.5, 13.5]"  # 10, 11 and 12 percent of the loss before
    assert rows["Before"][heads.index("validation loss")].strip() == "-"


def _with_losses(audit: PictureAudit, number: int) -> PictureAudit:
    change = 0.02 + 0.002 * number
    losses = {
        "denoising_loss": measure(0.2 + change, 0.1, 6),
        "denoising_loss_change": measure(change, 0.1, 6),
    }
    before, after, *others = audit.states
    groups = [group.model_copy(update=losses) for group in after.groups]
    return audit.model_copy(update={"states": [before, after.model_copy(update={"groups": groups}), *others]})
