"""The recipe that compares sinks with their rivals, on a tiny testbed: every state is measured once, and the table."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.planted.test_testbed_diffusion import TINY
from unmemorize.corpus import MixtureSettings
from unmemorize.files import read_json_lines
from unmemorize.isolate.plan import SinkSettings
from unmemorize.testbeds.diffusion import build_testbed

RECIPES = Path(__file__).parents[2] / "recipes"
MIXTURE = MixtureSettings(num_repeated=2, repeats=4, num_once=6, num_validation=4)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    module = importlib.import_module("picture_sinks")
    sinks = SinkSettings(share_frac=1.0, grown=16, active_frac=None, sinks_per_id=4)
    variants = {"grown": module.Variant(("hidden",), sinks), "off": module.Variant(("hidden",), sinks, "off")}
    monkeypatch.setattr(module, "VARIANTS", variants)
    monkeypatch.setattr(module, "NUM_ATTACKED", 1)
    return module


def test_every_state_is_measured_once_and_tabled(
    tmp_path: Path, recipe: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    testbed = build_testbed(replace(TINY, size_px=16, stages=("general",)), tmp_path / "bed")
    recipe.run_all([testbed.folder], tmp_path / "runs", ["grown", "off"], recipe.RIVALS, MIXTURE)
    lines = read_json_lines(tmp_path / "runs" / "sinks.jsonl")
    states = [(line["model"], line["state"]) for line in lines]
    assert states[:5] == [("sinks, grown", s) for s in ("own", "off", "foreign", "all", recipe.PROMPTED)]
    assert states[-4:] == [("sinks, off", s) for s in ("own", "off", "foreign", recipe.PROMPTED)]
    by_state = {(line["model"], line["state"]): line for line in lines}
    for model in ("sinks, grown", "sinks, off"):  # without guidance there is no half without a prompt
        own, prompted = (by_state[model, state] for state in ("own", recipe.PROMPTED))
        assert own["errors"] == prompted["errors"] and own["guided_errors"] != prompted["guided_errors"]
    assert ("dedup", "as trained") in states and ("standard", "closed-form edit") in states
    assert all(len(line["errors"]) == 2 and len(line["target_losses"]) == 4 for line in lines)
    assert next(line["state"] for line in lines if line["attacked"]) == "off"
    own, off = (line["target_losses"] for line in lines[:2])
    assert own != off  # eight steps have moved the sinks of the targets
    sheets = importlib.import_module("picture_sinks_sheet")
    parts = sheets.columns(tmp_path / "runs" / "bed-grown")
    assert list(parts) == list(sheets.COLUMNS) and all(len(pictures) == 2 for pictures in parts.values())
    assert not torch.equal(parts["closed"][0], parts["sinks, own"][0])
    image = sheets.sheet(parts)
    assert image.size == (6 * (16 * 3 + 6) + 6, 16 + 2 * (16 * 3 + 6) + 6)
    capsys.readouterr()
    recipe.run_all([testbed.folder], tmp_path / "runs", ["grown", "off"], recipe.RIVALS, MIXTURE)
    assert len(read_json_lines(tmp_path / "runs" / "sinks.jsonl")) == len(lines)
    tables = importlib.import_module("picture_sinks_table")
    tables.by_state(lines)
    table = capsys.readouterr().out
    assert "| standard | as trained | 1 |" in table and "0.0 %" in table
    tables.by_variant(lines)
    rows = {row.split(" | ")[0]: row.split(" | ") for row in capsys.readouterr().out.splitlines()}
    own, off = (by_state["sinks, grown", state]["target_losses"] for state in ("own", "off"))
    assert rows["| sinks, grown"][10].startswith(f"{off[0] / own[0]:.1f}, {off[3] / own[3]:.1f}")
    assert rows["| dedup"][5] == "-"  # nothing to close


def test_a_mean_has_an_interval_from_three_testbeds_on(recipe: ModuleType) -> None:
    over = importlib.import_module("picture_sinks_table").over
    assert over([0.1, 0.2]) == "0.15"
    assert over([1.0, 2.0, 3.0], 1) == "2.0 [-0.5, 4.5]"
    assert over([]) == "-"
