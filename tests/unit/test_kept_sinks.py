"""Ids given to `remove --keep`, against what the run beside the model names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unmemorize.errors import IdError, UnmemorizeWarning
from unmemorize.files import write_json, write_json_lines
from unmemorize.verbs.kept_sinks import kept_ids


def made_run(run: Path, data: dict[str, int], **settings: Any) -> Path:
    """Write a run that repeated ids 1 to 5 and kept 9 back; returns the folder of a pipeline in it."""
    rows = [{"id": n, "group": "target", "repeats": 8} for n in range(1, 6)]
    write_json_lines(run / "examples.jsonl", [*rows, {"id": 9, "group": "ordinary", "repeats": 0}])
    head = {"format": "unmemorize.run", "format_version": 1}
    write_json(run / "config.json", head | {"data": data, "settings": {"methods": ["sinks"], **settings}})
    return run / "models" / "sinks-seed0" / "pipeline"


@pytest.mark.parametrize("data", [{"num_repeated": 5, "num_once": 0}, {"num_repeated": 5, "num_trained": 5}])
def test_ids_that_never_trained_are_refused(tmp_path: Path, data: dict[str, int]) -> None:
    model = made_run(tmp_path, data)
    assert kept_ids("2,5", model) == kept_ids("2,5", model.parent) == [2, 5]
    assert kept_ids(None, model) is None
    with pytest.raises(IdError, match=r"--keep 7: nothing was trained .* are 1, 2, 3 and 2 more"):
        kept_ids("2,7", model)


def test_ids_of_documents_seen_once_are_known_where_they_have_no_sinks(tmp_path: Path) -> None:
    model = made_run(tmp_path, {"num_repeated": 5, "num_once": 6}, method={"sinks_for": "all"})
    with pytest.raises(IdError, match="--keep 9: nothing was trained with this id"):
        kept_ids("9", model)
    with pytest.warns(UnmemorizeWarning, match="--keep 7 is none of the ids repeated"):
        assert kept_ids("7", model) == [7]
    made_run(tmp_path, {"num_repeated": 5, "num_once": 6})
    with pytest.raises(IdError, match="--keep 7: nothing was trained"):
        kept_ids("7", model.parent)


def test_a_model_without_its_run_takes_any_id(tmp_path: Path) -> None:
    assert kept_ids("7", tmp_path / "model") == [7]
