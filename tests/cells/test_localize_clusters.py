"""Clusters of prompts: grouped by words or pictures, one set found together, kept in a folder."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from tests.planted.planted_pipeline import ORDINARY, ROW, PlantedPipeline
from unmemorize.errors import ConfigError, DataError, FileFormatError, RunFolderError, ShapeMismatch
from unmemorize.localize.activations import collect_statistics
from unmemorize.localize.clusters import describe_cluster, localize_clusters, localize_clusters_into
from unmemorize.localize.diffusion import localize
from unmemorize.localize.grouping import clusters
from unmemorize.localize.passes import NemoSettings
from unmemorize.models.diffusion import fingerprint
from unmemorize.neurons import load_neurons
from unmemorize.remove.diffusion import deactivated

FIRST, SECOND, OTHER = "old zorvex lamp here", "old zorvex lamp there", "tall tree there"


def test_near_duplicates_are_grouped_in_order() -> None:
    prompts = [OTHER, FIRST, "Old zorvex, lamp there!", FIRST, "red cat"]
    assert clusters(prompts) == [(OTHER,), (FIRST, "Old zorvex, lamp there!"), ("red cat",)]
    assert len(clusters(prompts, threshold_frac=1.0)) == 4
    assert len(clusters([FIRST, SECOND], shingle_words=3)) == 2
    assert clusters(["a b c d", "c d e f", "e f a b"], threshold_frac=0.33) == [
        ("a b c d", "c d e f", "e f a b")
    ]
    assert clusters(["!!", "??"]) == [("!!",), ("??",)]


def test_prompts_of_one_picture_are_grouped_whatever_their_words() -> None:
    prompts = ["red cat", "tall lamp", "old tree"]
    alike = [[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]]
    assert clusters(prompts, picture_similarity=alike) == [("red cat", "old tree"), ("tall lamp",)]
    assert clusters(prompts, picture_hashes=[0b1111, 0b1110, 0xFFFF0000], hash_bits=1) == [
        ("red cat", "tall lamp"),
        ("old tree",),
    ]
    with pytest.raises(ShapeMismatch, match="picture_similarity is not 3 x 3"):
        clusters(prompts, picture_similarity=alike[:2])
    with pytest.raises(ShapeMismatch, match="2 picture_hashes for 3 prompts"):
        clusters(prompts, picture_hashes=[1, 2])
    with pytest.raises(ConfigError, match=r"threshold_frac 0\.0"):
        clusters(prompts, threshold_frac=0.0)


@pytest.mark.parametrize("ranking", ["unusual", "gradient"])
@pytest.mark.parametrize("planted", [((1, 3),), ((0, 2), (2, 5))])
def test_one_set_breaks_every_member(planted: tuple[tuple[int, int], ...], ranking: Any) -> None:
    pipe: Any = PlantedPipeline(planted)
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    settings = NemoSettings(ranking=ranking)
    (result,) = localize_clusters(pipe, [(FIRST, SECOND, OTHER)], statistics, settings, row=ROW)
    assert {(layer, i) for layer, some in enumerate(result.refined) for i in some} == set(planted)
    assert [bool(kept) for kept in result.kept] == [True, True, False]
    assert result.refined_score == max(result.refined_scores) < 0.428
    assert result.refined_scores[2] == 0.0
    alone = [
        next(localize(pipe, [one], statistics, settings, row=ROW)).cost for one in (FIRST, SECOND, OTHER)
    ]
    assert result.cost.sample_forwards <= sum(cost.sample_forwards for cost in alone)
    with deactivated(pipe, result.neurons(fingerprint(pipe, ROW), statistics.sites), row=ROW):
        after = list(localize(pipe, [FIRST, SECOND], statistics, row=ROW))
    assert not any(one.is_memorized for one in after)


def test_a_cluster_of_one_is_its_prompt() -> None:
    pipe: Any = PlantedPipeline(((0, 2), (2, 5)))
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    (cluster,) = localize_clusters(pipe, [(FIRST,)], statistics, row=ROW)
    (prompt,) = localize(pipe, [FIRST], statistics, row=ROW)
    for name in ("initial", "refined", "refined_score", "threshold", "initial_score"):
        assert getattr(cluster, name) == getattr(prompt, name)
    assert (cluster.kept, cluster.best_pairs) == ((prompt.kept,), (prompt.best_pair,))
    assert cluster.cost.sample_forwards == prompt.cost.sample_forwards


def test_a_run_over_clusters_continues(tmp_path: Path) -> None:
    pipe: Any = PlantedPipeline(((1, 3),))
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    groups = [(FIRST, SECOND), (OTHER,)]

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        localize_clusters_into(tmp_path, pipe, groups, statistics, row=ROW, progress=stop)
    lines = tmp_path / "localization.jsonl"
    first = lines.read_text().splitlines()
    results = localize_clusters_into(tmp_path, pipe, groups, statistics, row=ROW)
    assert lines.read_text().splitlines()[0] == first[0]
    assert [result.members for result in results] == groups
    assert localize_clusters_into(tmp_path, pipe, groups, statistics, row=ROW) == results
    assert len(load_neurons(tmp_path / "neurons.json")) == 1
    rows = list(csv.DictReader((tmp_path / "localization.csv").read_text().splitlines()))
    assert [(row["members"], row["refined"]) for row in rows] == [(f"{FIRST} | {SECOND}", "1:3"), (OTHER, "")]
    assert describe_cluster(results[0]).startswith(f"'{FIRST}' and 1 more like it: 1 neuron at 1 site breaks")
    assert describe_cluster(results[1]).startswith(f"'{OTHER}': not memorized")
    with pytest.raises(RunFolderError, match=r"holds another run \(clusters differ\)"):
        localize_clusters_into(tmp_path, pipe, groups[:1], statistics, row=ROW)
    lines.write_text('{"members": ["x"]}\n')
    with pytest.raises(FileFormatError, match="does not fit"):
        localize_clusters_into(tmp_path, pipe, groups, statistics, row=ROW)


def test_bad_clusters_are_refused() -> None:
    pipe: Any = PlantedPipeline()
    statistics = collect_statistics(pipe, ORDINARY, row=ROW)
    for groups in ([], [()], [("a cat", " ")]):
        with pytest.raises(DataError, match="the list of clusters is empty, or one holds no prompt"):
            localize_clusters(pipe, groups, statistics, row=ROW)
    with pytest.raises(ConfigError, match="searched in mode fast, not compat"):
        localize_clusters(pipe, [(FIRST,)], statistics, NemoSettings(mode="compat"), row=ROW)
