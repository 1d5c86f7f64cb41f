"""A search for few neurons that is interrupted measures no set twice and ends as one that was not interrupted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.planted.test_injection import injected, scored, text
from unmemorize.corpus.memorized import MemorizedExample
from unmemorize.localize.recital import BreakSettings, Broken, smallest_set
from unmemorize.localize.search import SearchSettings
from unmemorize.localize.suffix import measured
from unmemorize.models.language import fingerprint
from unmemorize.records import Progress


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every call of the model by the search from here on, as its number of examples."""
    calls: list[int] = []

    def count(model: torch.nn.Module, examples: list[MemorizedExample], **more: object) -> object:
        calls.append(len(examples))
        return measured(model, examples, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("unmemorize.localize.recital.measured", count)
    return calls


def stop_after(num_sets: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.done == num_sets:
            raise KeyboardInterrupt

    return stop


def told(found: Broken) -> tuple[object, ...]:
    """Everything but the seconds."""
    cost = found.cost.forward_equivalents
    return (found.neurons, found.effects_frac, found.threshold_frac, found.num_evaluated, cost)


@pytest.mark.parametrize("effect", ("likelihood", "recital"))
def test_an_interrupted_search_continues_and_ends_as_one_that_was_not(
    effect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, scores = injected("llama", 0), scored("llama", "gradient")
    settings, path = BreakSettings(effect=effect), tmp_path / "search.jsonl"  # type: ignore[arg-type]
    whole = smallest_set(done.model, [text(0)], scores, settings)
    calls = counted(monkeypatch)
    for num_sets in (1, 5, 6):
        with pytest.raises(KeyboardInterrupt):
            smallest_set(done.model, [text(0)], scores, settings, path=path, progress=stop_after(num_sets))
    assert len(calls) == 1 + 6  # the model as it is, and each of six sets once
    with path.open("ab") as stream:
        stream.write(path.read_bytes().splitlines()[-1][:40])  # a crash while a line was written
    heard: list[int] = []
    found = smallest_set(
        done.model, [text(0)], scores, settings, path=path, progress=lambda one: heard.append(one.done)
    )
    assert told(found) == told(whole)
    assert len(calls) == 1 + whole.num_evaluated
    assert heard == list(range(1, whole.num_evaluated + 1))
    assert len(path.read_bytes().splitlines()) == 1 + len(calls)  # the first line says what all are of
    assert max(map(len, path.read_bytes().splitlines()[1:])) < 250
    again = smallest_set(done.model, [text(0)], scores, settings, path=path)
    assert told(again) == told(whole) and len(calls) == 1 + whole.num_evaluated
    assert again.cost.seconds > sum(json.loads(row)["seconds"] for row in path.read_text().splitlines()[2:])


def test_two_texts_and_growing_sets_continue_too(tmp_path: Path) -> None:
    done, examples = injected("llama", 0), [text(0), text(3)]
    scores = replace(scored("llama", "gradient"), method="outliers")
    schedule = SearchSettings(initial_theta=0.02, min_theta=0.005, theta_step=0.005, has_top_k=False)
    for settings in (BreakSettings(), BreakSettings(search="growing", growing=schedule)):
        path = tmp_path / f"{settings.search}.jsonl"
        whole = smallest_set(done.model, examples, scores, settings)
        with pytest.MonkeyPatch.context() as patch:
            calls = counted(patch)
            with pytest.raises(KeyboardInterrupt):
                smallest_set(done.model, examples, scores, settings, path=path, progress=stop_after(4))
            found = smallest_set(done.model, examples, scores, settings, path=path)
            assert told(found) == told(whole)
            assert sum(calls) == whole.cost.forward_equivalents > 4


def test_a_search_of_other_weights_or_texts_or_a_damaged_file_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, scores, path = injected("llama", 0), scored("llama", "gradient"), tmp_path / "search.jsonl"
    first = smallest_set(done.model, [text(0)], scores, path=path)
    calls = counted(monkeypatch)
    other = copy.deepcopy(done.model)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1.0
    scores_there = replace(scores, model_id=fingerprint(other))
    found = smallest_set(other, [text(0)], scores_there, path=path)  # type: ignore[arg-type]
    assert len(calls) == 1 + found.num_evaluated
    calls.clear()
    found = smallest_set(other, [text(3)], scores_there, path=path)  # type: ignore[arg-type]
    assert len(calls) == 1 + found.num_evaluated
    calls.clear()
    smallest_set(done.model, [text(0)], scores, BreakSettings(batch_size=2), path=path)
    assert len(calls) == 1 + first.num_evaluated
    for damage in (b"no JSON\n", b'{"off": "a"}\n', b"[]\n"):
        calls.clear()
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([lines[0], damage, *lines[1:]]))
        assert told(smallest_set(done.model, [text(0)], scores, path=path)) == told(first)
        assert len(calls) == 1 + first.num_evaluated
