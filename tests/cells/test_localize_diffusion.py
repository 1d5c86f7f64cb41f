"""The cell end to end: planted neurons are found, nothing is found where nothing is, runs continue."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planted.planted_pipeline import ORDINARY, ROW, PlantedPipeline
from tests.tiny_diffusion import KINDS, tiny_pipeline
from unmemorize.errors import ConfigError, DataError, NeuronSetMismatch, RunFolderError, UnmemorizeWarning
from unmemorize.localize.activations import activations_of, collect_statistics, token_positions
from unmemorize.localize.calibration import calibrate, load_calibration
from unmemorize.localize.diffusion import localize, localize_into
from unmemorize.localize.passes import NemoSettings, first_step
from unmemorize.localize.search import SearchSettings
from unmemorize.models.diffusion import find_sites, fingerprint
from unmemorize.neurons import Site, load_neurons
from unmemorize.remove.diffusion import deactivated

MEMORIZED, OTHER = "old zorvex here", "tall lamp there"
CAPTIONS = ["a red cat", "the blue house", "a photo of the moon", "river stone", "tree of the garden"]


@pytest.mark.parametrize("mode", ["fast", "compat", "paper"])
@pytest.mark.parametrize(
    ("planted", "rule"),
    [
        (((1, 3),), "or"),
        (((0, 2), (2, 5)), "or"),
        (((0, 1), (1, 1), (2, 1)), "or"),
        (((0, 2), (2, 5)), "and"),
    ],
)
def test_planted_neurons_are_found(mode: Any, planted: tuple[tuple[int, int], ...], rule: str) -> None:
    pipe: Any = PlantedPipeline(planted, rule=rule)
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    memorized, other = localize(pipe, [MEMORIZED, OTHER], statistics, NemoSettings(mode=mode), row=ROW)
    found = {(layer, index) for layer, chosen in enumerate(memorized.refined) for index in chosen}
    assert found == set(planted) if rule == "or" else len(found) == 1 and found <= set(planted)
    assert memorized.refined_score < 0.428 < memorized.best_pair
    assert not other.is_memorized
    with deactivated(pipe, memorized.neurons(fingerprint(pipe, ROW), statistics.sites), row=ROW):
        (after,) = localize(pipe, [MEMORIZED], statistics, NemoSettings(mode=mode), row=ROW)
    assert not after.is_memorized


def test_fast_asks_for_a_tenth() -> None:
    pipe: Any = PlantedPipeline(((0, 2), (2, 5)))
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    for prompt in (MEMORIZED, OTHER):
        cost = {}
        for mode in ("fast", "compat"):
            (result,) = localize(pipe, [prompt], statistics, NemoSettings(mode=mode), row=ROW)  # type: ignore[arg-type]
            cost[mode] = result.cost.sample_forwards
        assert 10 * cost["fast"] <= cost["compat"]


@pytest.mark.parametrize("mode", ["fast", "compat", "paper"])
def test_nothing_planted_nothing_found(mode: Any) -> None:
    pipe: Any = PlantedPipeline()
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    results = list(localize(pipe, [MEMORIZED, OTHER], statistics, NemoSettings(mode=mode), row=ROW))
    assert not any(result.is_memorized or result.refined for result in results)


def test_compat_counts_what_the_released_code_asks_for_with_and_without_reuse() -> None:
    pipe: Any = PlantedPipeline(((1, 3),))
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    results = []
    for is_reusing in (True, False):
        settings = NemoSettings(mode="compat", num_samples=3, is_reusing=is_reusing)
        results += localize(pipe, [MEMORIZED], statistics, settings, row=ROW)
    lean, literal = results
    assert lean.refined_scores == literal.refined_scores
    assert lean.cost.sample_forwards == literal.cost.sample_forwards == literal.cost.sample_forwards_run
    trials = len(lean.selection), len(lean.layer_trials) + len(lean.neuron_trials)
    assert lean.cost.denoiser_calls == 2 * (4 + sum(trials)) + trials[0] == literal.cost.denoiser_calls_run
    assert lean.cost.sample_forwards_run < lean.cost.sample_forwards / 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pipeline_runs_through(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    statistics = collect_statistics(pipe, CAPTIONS[:3], batch_size=2)
    everything = SearchSettings(gate_threshold=-1.0)  # an untrained model holds nothing: let it through
    settings = NemoSettings(num_samples=2, search=everything)
    (result,) = localize(pipe, ["a red cat house"], statistics, settings)
    assert result.is_memorized
    assert len(result.refined) == len(statistics.sites)
    assert result.cost.sample_forwards >= 2


def test_a_run_continues_where_it_stopped(tmp_path: Path) -> None:
    pipe: Any = PlantedPipeline(((1, 3),))
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    prompts = [OTHER, MEMORIZED, "red cat here"]

    def stop(progress: Any) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        localize_into(tmp_path, pipe, prompts, statistics, row=ROW, progress=stop)
    lines = tmp_path / "localization.jsonl"
    first = lines.read_text().splitlines()
    assert not (tmp_path / "neurons.json").exists()
    lines.write_text(lines.read_text()[:-40])  # torn while appending
    results = localize_into(tmp_path, pipe, prompts, statistics, row=ROW)
    assert [result.prompt for result in results] == prompts
    assert lines.read_text().splitlines()[0] == first[0]
    assert len(load_neurons(tmp_path / "neurons.json")) == 1
    rows = list(csv.DictReader((tmp_path / "localization.csv").read_text().splitlines()))
    assert [row["refined"] for row in rows] == ["", "1:3", ""]
    again = localize_into(tmp_path, pipe, prompts, statistics, row=ROW)
    assert again == results
    with pytest.raises(RunFolderError, match=r"holds another run \(settings differ\)"):
        localize_into(tmp_path, pipe, prompts, statistics, NemoSettings(seed=2), row=ROW)


def test_compat_results_survive_their_file(tmp_path: Path) -> None:
    pipe: Any = PlantedPipeline(((1, 3),))
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    settings = NemoSettings(mode="compat", num_samples=2, search=SearchSettings(initial_theta=float("inf")))
    first = localize_into(tmp_path, pipe, [MEMORIZED], statistics, settings, row=ROW)
    assert localize_into(tmp_path, pipe, [MEMORIZED], statistics, settings, row=ROW) == first


def test_statistics_continue_and_refuse_other_captions(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd1")
    path = tmp_path / "statistics.safetensors"
    collect_statistics(pipe, CAPTIONS[:2], path=path, batch_size=2)
    resumed = collect_statistics(pipe, CAPTIONS, path=path, batch_size=2)
    whole = collect_statistics(pipe, CAPTIONS, batch_size=5)
    assert (resumed.count, resumed.digest) == (5, whole.digest)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(resumed.stds, whole.stds, strict=True))
    with pytest.raises(DataError, match="was made from other captions"):
        collect_statistics(pipe, CAPTIONS[::-1], path=path)
    with pytest.raises(NeuronSetMismatch, match="choose a new file"):
        collect_statistics(tiny_pipeline("sd1", seed=1), CAPTIONS, path=path)
    with pytest.raises(DataError, match="1 captions give no standard deviation"):
        collect_statistics(pipe, CAPTIONS[:1])


def test_positions_split_the_prompt() -> None:
    pipe = tiny_pipeline("sd1")
    kinds = {kind: token_positions(pipe, CAPTIONS, kind) for kind in ("start", "words", "end", "padding")}
    assert torch.equal(sum(part.int() for part in kinds.values()), torch.ones(5, 77, dtype=torch.int32))
    assert kinds["start"][:, 0].all()
    assert kinds["end"].sum() == 5
    assert torch.equal(token_positions(pipe, CAPTIONS, "tail"), kinds["end"] | kinds["padding"])
    sites = find_sites(pipe)
    whole = activations_of(pipe, CAPTIONS[:1], sites)[0][0]
    parts = sum(
        activations_of(pipe, CAPTIONS[:1], sites, kind)[0][0] * part[0].sum() / 77
        for kind, part in kinds.items()
    )
    assert torch.allclose(whole, torch.as_tensor(parts), atol=1e-5)
    with pytest.raises(ConfigError, match="unknown positions 'middle'"):
        token_positions(pipe, CAPTIONS, "middle")
    with pytest.raises(ConfigError, match="use positions='all'"):
        activations_of(tiny_pipeline("sd3"), CAPTIONS, find_sites(tiny_pipeline("sd3")), "words")


def test_calibration_is_mean_plus_one_standard_deviation(tmp_path: Path) -> None:
    pipe: Any = PlantedPipeline()
    found = calibrate(pipe, ORDINARY[:4], row=ROW)
    assert found.threshold == pytest.approx(found.mean + found.std)
    assert 0 < found.threshold < 0.428
    assert load_calibration(found.save(tmp_path / "calibration.json")) == found
    assert json.loads((tmp_path / "calibration.json").read_text())["num_prompts"] == 4
    path = tmp_path / "calibration.json"
    assert calibrate(pipe, ORDINARY[:4], path=path, row=ROW) == found
    with pytest.raises(RunFolderError, match="calibrated with another num_prompts and digest; choose a new"):
        calibrate(pipe, ORDINARY[:3], path=path, row=ROW)
    with pytest.raises(DataError, match="1 prompts give no threshold"):
        calibrate(pipe, ORDINARY[:1], row=ROW)


def test_memory_that_runs_out_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = PlantedPipeline()
    passes = first_step(pipe, MEMORIZED, find_sites(pipe, row=ROW), NemoSettings())
    expected = passes.maps([(sample, frozenset()) for sample in range(4)])
    whole = type(pipe.unet).forward

    def small(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sample) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, sample, *args, **kwargs)

    limited = first_step(pipe, MEMORIZED, find_sites(pipe, row=ROW), NemoSettings())
    monkeypatch.setattr(pipe.unet, "forward", small.__get__(pipe.unet))
    with pytest.warns(UnmemorizeWarning, match="out of memory with 10 samples a pass; going on with 2"):
        found = limited.maps([(sample, frozenset()) for sample in range(4)])
    assert torch.allclose(found, expected, atol=1e-6)
    assert limited.batch_size == 2


def test_bad_input_is_explained() -> None:
    pipe = tiny_pipeline("sd1")
    statistics = collect_statistics(pipe, CAPTIONS)
    for prompts in ([], ["a cat", " "]):
        with pytest.raises(DataError, match="pass at least one prompt with words"):
            localize(pipe, prompts, statistics)
    with pytest.raises(NeuronSetMismatch, match="collect them on this model"):
        localize(tiny_pipeline("sd1", seed=1), ["a cat"], statistics)
    stray = dataclasses.replace(statistics, sites=(Site("nowhere.to_v", "out", 8), *statistics.sites[1:]))
    with pytest.raises(NeuronSetMismatch, match=r"for site nowhere.to_v of width 8, which this model"):
        localize(pipe, ["a cat"], stray)
    with pytest.raises(ConfigError, match="unknown mode 'quick'"):
        NemoSettings(mode="quick")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="samples are compared in pairs"):
        NemoSettings(num_samples=1)
