"""The report of picture audits: figures are the record's, pictures are the files, and nothing foreign gets through."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.html_page import parsed
from tests.unit.synthetic_audit import synthetic_audit
from tests.unit.synthetic_picture_audit import THRESHOLD, png, scene, synthetic_picture_audit
from unmemorize.errors import ConfigError, FileFormatError
from unmemorize.records import LocalizedPrompt, Measure, PictureAudit, Similarity, SiteNeurons
from unmemorize.report import picture_costs, picture_figures, render, write_report
from unmemorize.report.gallery import Gallery, gallery
from unmemorize.report.measures import MINUS, measure_cell, number_text
from unmemorize.report.neuron_map import neuron_plot, neuron_table, short_paths
from unmemorize.report.score_plots import effect_plot, gate_plot
from unmemorize.report.state_panels import result_state, state_panels

EVIL = "</script><script>document.title='pwned'</script><img src=x onerror=alert(1)>\"'"
SECTIONS = ["done", "panels", "pictures", "figures", "scores", "effects", "neurons", "cost", "each", "limits"]
STATES = ("before", "after", "placebo", "twin")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    synthetic_picture_audit(folder, num_seeds=3, size_px=12, states=STATES, num_prompts=5)
    return folder


@pytest.fixture(scope="module")
def audit(run: Path) -> PictureAudit:
    return PictureAudit.model_validate_json((run / "audit.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return render([run])


def written(folder: Path, value: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "audit.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def plain(audit: PictureAudit) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(audit.model_dump_json())
    return value


def the_gallery(audit: PictureAudit, folder: Path, budget_bytes: int = 10**9) -> Gallery:
    found = gallery(audit, folder, notes={}, result_state="after", budget_bytes=budget_bytes)
    assert found is not None
    return found


def tiles(found: Gallery) -> list[Any]:
    return [
        tile
        for group in found.groups
        for grid in group.grids
        for tile in (
            *([grid.training] if grid.training else []),
            *(one for strip in grid.strips for one in strip.tiles),
        )
    ]


def test_page_nests_and_every_picture_is_in_it_byte_for_byte(
    run: Path, audit: PictureAudit, html: str
) -> None:
    page = parsed(html)
    assert len(page.ids) == len(set(page.ids)) and page.handlers == []
    pictures = [reference for reference in page.references if not reference.startswith("#")]
    assert all(one.startswith("data:image/png;base64,") for one in pictures)
    embedded = sorted(base64.b64decode(one.split(",")[1]) for one in pictures)
    assert embedded == sorted(path.read_bytes() for path in (run / "pictures").rglob("*.png"))


def test_sections_come_in_order_below_the_verdict(audit: PictureAudit, html: str) -> None:
    places = [html.index(f'id="r1-{name}"') for name in SECTIONS]
    assert places == sorted(places) and html.index(audit.verdict) < places[0]


def test_large_figures_are_the_records_with_placebo_beside(audit: PictureAudit, html: str) -> None:
    head = html[html.index('<div class="figures">') : html.index('id="r1-done"')]
    by_state = {state.state: {group.group: group for group in state.groups} for state in audit.states}
    for group, field, unit in (
        ("target", "copy_rate_frac", "percent"),
        ("neighbour", "copy_rate_frac", "percent"),
        ("ordinary", "kept_similarity", "similarity"),
    ):
        after, placebo = (
            measure_cell(getattr(by_state[name][group].similarities[0], field), unit)  # type: ignore[arg-type]
            for name in ("after", "placebo")
        )
        assert f'{after.text} <span class="interval">{after.detail}</span>' in head
        assert placebo.text in head and placebo.detail in head
    before = by_state["before"]["target"].similarities[0].copy_rate_frac
    assert before is not None
    assert f'<span class="before">{measure_cell(before, "percent").text}</span>' in head


FIELDS = {
    "copies": ("copy_rate_frac", "copy_similarity"),
    "changes": ("kept_similarity", "seed_similarity"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_tables_of_similarities_are_the_record(audit: PictureAudit, name: str) -> None:
    maker = picture_figures.copies_table if name == "copies" else picture_figures.changes_table
    table = maker(audit, "after", "t")
    assert table is not None
    found = {
        (row.name, row.cells[0].value, row.cells[1].value): [cell.value for cell in row.cells[2:4]]
        for row in table.rows
    }
    measures = {
        (state.label, group.group, one.measure): [getattr(one, field) for field in FIELDS[name]]
        for state in audit.states
        for group in state.groups
        for one in group.similarities
    }
    assert found == {
        key: [None if one is None else one.value for one in row] for key, row in measures.items() if any(row)
    }
    num_groups = 2 if name == "copies" else 3
    assert len(found) == len(STATES) * num_groups * 2
    assert {row.name for row in table.rows if row.is_strong} == {"Neurons off"}
    first = [row.cells[1].value for row in table.rows[: table.shown_rows]]
    assert first == ["structure"] * len(STATES) * num_groups


class WiderSimilarity(Similarity):
    """A record with the figures that not every audit has."""

    copy_rate_change_frac: Measure | None = None
    copy_rate_per_picture_frac: Measure | None = None
    kept_beyond_placebo: Measure | None = None


def test_figures_that_only_some_audits_have_get_a_column_of_their_own(audit: PictureAudit) -> None:
    one = WiderSimilarity(
        measure="structure",
        copy_rate_frac=Measure(value=0.5, num=12),
        copy_rate_change_frac=Measure(value=-0.43, ci95=(-0.61, -0.2), num=12),
        copy_rate_per_picture_frac=Measure(value=0.25, num=12),
        kept_beyond_placebo=Measure(value=0.031, num=12),
        seed_similarity=Measure(refused="too few"),
    )
    group = audit.states[0].groups[0].model_copy(update={"similarities": [one]})
    small = audit.model_copy(update={"states": [audit.states[0].model_copy(update={"groups": [group]})]})
    copies, changes = (
        maker(small, "", "t") for maker in (picture_figures.copies_table, picture_figures.changes_table)
    )
    assert copies is not None and changes is not None
    assert [column.name for column in copies.columns] == [
        *("State", "Group", "Copied", "Change", "Pictures copied", "Prompts")
    ]
    cells = copies.rows[0].cells
    assert [cell.text for cell in cells[1:4]] == ["50%", f"{MINUS}43", "25%"]
    assert cells[2].detail == f"[{MINUS}61, {MINUS}20]" and cells[2].bar_frac is None
    assert [cell.text for cell in changes.rows[0].cells[1:3]] == ["+0.03", "too few"]


def test_denoising_losses_stand_with_four_digits_in_the_table_of_quality(audit: PictureAudit) -> None:
    table = picture_figures.quality_table(audit, "after", "t")
    assert table is not None
    names = [name for name, _ in table.spans]
    place = names.index("Denoising loss")
    first = sum(count for _, count in table.spans[:place])  # the column of states comes first
    assert table.columns[first].name == "Target"
    assert [row.cells[first - 1].text for row in table.rows[:2]] == ["0.1042", "0.1142"]


def test_alignment_and_distances_stand_in_the_table_of_quality(audit: PictureAudit) -> None:
    distance = Measure(value=0.01234, ci95=(0.011, 0.013), num=3, method="t")
    states = [
        state.model_copy(
            update={
                "groups": [
                    one.model_copy(update={"kid": distance}) if one.group == "ordinary" else one
                    for one in state.groups
                ]
            }
        )
        for state in audit.states
    ]
    table = picture_figures.quality_table(audit.model_copy(update={"states": states}), "after", "t")
    assert table is not None
    assert [table.spans[0], *table.spans[-2:]] == [("", 1), ("FID", 1), ("KID", 1)]
    assert table.spans[1][0] == "Alignment" and {column.name for column in table.columns[-2:]} == {"Ordinary"}
    fid, kid = table.rows[0].cells[-2:]
    assert fid.is_refused and "60 pictures" in fid.text
    assert (kid.text, kid.detail) == ("0.01234", "[0.011, 0.013]")
    assert table.rows[0].cells[0].text == "0.31"


def test_pictures_that_share_a_prompt_are_told_apart(run: Path, audit: PictureAudit) -> None:
    one = audit.prompts[0]
    twins = [one.model_copy(update={"name": name}) for name in ("target-0000", "target-0001")]
    found = the_gallery(audit.model_copy(update={"prompts": twins}), run)
    assert [grid.prompt for grid in found.groups[0].grids] == [
        f"{one.prompt} ({twin.name})" for twin in twins
    ]


def test_refusals_stand_as_their_reason(audit: PictureAudit, html: str, tmp_path: Path) -> None:
    assert "3 prompts; an interval needs 5" in html and "the distance of two sets needs 2,048" in html
    value = plain(audit)
    for state in value["states"]:
        value_of = state["groups"][0]["similarities"][0]
        value_of["copy_rate_frac"] = Measure(refused="4 prompts; a rate needs 12").model_dump()
    by_similarity = render([written(tmp_path / "few", value)])
    assert (
        "Targets like their training picture" in by_similarity
        and "Targets copied by state" not in by_similarity
    )
    for state in value["states"]:
        state["groups"][0]["similarities"][0]["copy_similarity"] = None
    refused = render([written(tmp_path, value)])
    head = refused[refused.index('<div class="figures">') : refused.index('id="r1-done"')]
    assert "no figure" in head and head.count("4 prompts; a rate needs 12") == len(STATES)
    assert "Targets copied by state" in refused


def test_copies_are_exactly_those_from_the_threshold_on(run: Path, audit: PictureAudit) -> None:
    value = plain(audit)
    prompt = value["prompts"][0]
    prompt["copy_similarity"]["before"] = [THRESHOLD, THRESHOLD - 1e-9, 0.99]
    grid = the_gallery(PictureAudit.model_validate(value), run).groups[0].grids[0]
    strip = grid.strips[0]
    assert strip.label == "Before" and strip.hint == "2 of 3 copied"
    assert [tile.is_copy for tile in strip.tiles] == [True, False, True]
    assert [tile.similarity for tile in strip.tiles] == ["0.70", "0.70", "0.99"]
    assert grid.training is not None and grid.training.uri and not grid.training.is_copy


def test_columns_are_named_by_the_settings_seeds_and_references_by_what_they_are(
    run: Path, audit: PictureAudit
) -> None:
    value = plain(audit)
    value["prompts"][-1]["picture"] = value["prompts"][0]["picture"]
    found = the_gallery(PictureAudit.model_validate(value), run)
    assert found.groups[0].grids[0].seeds == ("100", "101", "102")
    assert found.groups[0].grids[0].strips[0].tiles[1].words.startswith("Before, seed 101, similarity 0.")
    assert found.groups[0].grids[0].reference == "Training picture"
    assert found.groups[-1].grids[-1].reference == "Reference picture, never trained on"
    value["settings"] = {"seeds": [7]}
    assert the_gallery(PictureAudit.model_validate(value), run).groups[0].grids[0].seeds == ("1", "2", "3")


def test_without_a_threshold_nothing_is_marked(run: Path, audit: PictureAudit) -> None:
    found = the_gallery(audit.model_copy(update={"copy_thresholds": {}}), run)
    assert not found.has_threshold and not any(tile.is_copy for tile in tiles(found))
    assert any(tile.similarity for tile in tiles(found))


def test_small_pictures_are_enlarged_by_pixel_and_large_ones_are_not(
    audit: PictureAudit, tmp_path: Path
) -> None:
    one = plain(audit)["prompts"][0]
    one["made"] = {"before": ["small.png", "large.png"]}
    one["picture"], one["copy_similarity"] = "", {}
    (tmp_path / "small.png").write_bytes(png(scene("a", 63)))
    (tmp_path / "large.png").write_bytes(png(scene("a", 64)))
    found = the_gallery(
        PictureAudit.model_validate({**plain(audit), "prompts": [one], "localized": []}), tmp_path
    )
    assert [tile.is_small for tile in tiles(found)] == [True, False]


def test_what_cannot_be_shown_is_a_named_placeholder(audit: PictureAudit, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    whole = png(scene("a", 8))
    outside.write_bytes(whole)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "torn.png").write_bytes(whole[:-12])
    (folder / "text.png").write_text("<svg onload=alert(1)>" * 9, encoding="utf-8")
    (folder / "none.png").write_bytes(whole[:16] + bytes(8) + whole[24:])
    (folder / "link.png").symlink_to(outside)
    names = ["gone.png", "torn.png", "text.png", "none.png", "../outside.png", "link.png", str(outside)]
    one = {**plain(audit)["prompts"][0], "picture": "", "made": {"before": [*names, "", "a\0b"]}}
    value = {**plain(audit), "prompts": [one], "localized": []}
    found = tiles(the_gallery(PictureAudit.model_validate(value), folder))
    assert not any(tile.uri for tile in found)
    reasons = ["not in", "cut off", "not a PNG", "side of 0", "not in", "not in", "not in", "not made"]
    for tile, reason in zip(found, [*reasons, "not in"], strict=True):
        assert reason in tile.missing
    page = parsed(render([written(folder, value)]))
    assert "not in the run folder: gone.png" in page.text and "img" not in page.tags


def test_seeds_give_way_first_then_prompts_then_groups(run: Path, audit: PictureAudit) -> None:
    value = plain(audit)
    for one in value["prompts"]:
        one["made"] = {state: paths * 3 for state, paths in one["made"].items()}
    wide = PictureAudit.model_validate(value)
    everything = the_gallery(wide, run)
    assert everything.left_out == "" and everything.groups[0].grids[0].num_seeds == 9
    full = sum(len(tile.uri) for tile in tiles(everything))
    assert the_gallery(wide, run, full).left_out == ""
    fewer = the_gallery(wide, run, full - 1)
    assert fewer.groups[0].grids[0].num_seeds == 8 and "8 of 9 seeds" in fewer.left_out
    half = the_gallery(wide, run, full // 5)
    assert half.groups[0].grids[0].num_seeds == 4 and "of 5 target prompts" in half.left_out
    least = the_gallery(wide, run, full // 50)
    assert [group.group for group in least.groups] == ["target"]
    assert "0 of 5 ordinary prompts" in least.left_out
    for found, budget in ((fewer, full - 1), (half, full // 5), (least, full // 50)):
        assert 0 < sum(len(tile.uri) for tile in tiles(found)) <= budget
    assert "No pictures are shown" in the_gallery(wide, run, 10).left_out
    assert "<img" not in render([run], max_picture_bytes=0)


def test_equal_input_gives_equal_bytes_without_torch_or_pillow(run: Path, html: str) -> None:
    code = (
        f"import sys; from unmemorize.report import render; html = render([{str(run)!r}]);"
        "assert not {'torch', 'PIL', 'numpy', 'transformers'} & set(sys.modules), 'heavy import';"
        "sys.stdout.buffer.write(html.encode())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert other == html.encode()


def test_policy_lets_in_embedded_pictures_and_the_pages_script_only(html: str) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert rules["script-src"].startswith("'sha256-") and " " not in rules["script-src"]


def test_hostile_text_stays_text(audit: PictureAudit, run: Path, tmp_path: Path) -> None:
    value = plain(audit)
    value["title"] = value["verdict"] = value["limits"][0] = EVIL
    value["measures"] = {EVIL: EVIL}
    value["copy_thresholds"] = {EVIL: 0.5}
    value["settings"][EVIL] = "{{ 7 * 7 }}"
    for state in value["states"]:
        state["label"] = state["description"] = EVIL
        for group in state["groups"]:
            for one in group["similarities"]:
                one["measure"] = EVIL
    for one in [*value["prompts"], *value["localized"]]:
        one["prompt"] = EVIL + "p" * 9000
    value["prompts"][0]["made"] = {EVIL: [EVIL]}
    value["sites"][0]["path"] = EVIL
    html = render([written(tmp_path, value)])
    page = parsed(html)
    assert page.tags.count("script") == 2 and page.handlers == []
    assert "img" not in page.tags and "{{ 7 * 7 }}" in html
    assert "p" * 400 not in html.split('type="application/json"')[0]


def test_what_is_absent_leaves_no_empty_section(audit: PictureAudit, tmp_path: Path) -> None:
    bare = {**plain(audit), "states": [], "prompts": [], "localized": [], "sites": [], "limits": []}
    bare["measures"] = bare["copy_thresholds"] = {}
    page = parsed(render([written(tmp_path, bare)]))
    sections = {name for name in SECTIONS if f"r1-{name}" in page.ids}
    assert sections == {"done", "limits"} and "svg" not in page.tags
    for name, gone in (
        ("states", {"panels", "figures"}),
        ("prompts", {"pictures"}),
        ("localized", {"scores", "effects", "each"}),
        ("sites", {"neurons"}),
    ):
        ids = parsed(render([written(tmp_path, {**plain(audit), name: []})])).ids
        assert {one for one in SECTIONS if f"r1-{one}" not in ids} == gone


def test_gate_plot_has_a_dot_for_each_prompt_and_its_threshold(audit: PictureAudit) -> None:
    plot = gate_plot(audit, "g")
    assert plot is not None
    for picture in plot.pictures:
        dots = re.findall(r'class="dot g-(\w+)( open)?"', picture)
        wanted = [(one.group, "" if one.is_memorized else " open") for one in audit.localized]
        assert sorted(dots) == sorted(wanted)
        assert "gate 0.428" in picture
    assert "5 of 5 passed" in plot.pictures[0] and "0 of 5 passed" in plot.pictures[0]


def test_gate_plot_places_dots_right_of_the_threshold_exactly_when_their_score_is_higher(
    audit: PictureAudit,
) -> None:
    scores = [0.1, 0.35, 0.52, 0.97]
    localized = [
        LocalizedPrompt(prompt=str(score), group="target", best_pair=score, is_memorized=score > 0.428)
        for score in scores
    ]
    plot = gate_plot(audit.model_copy(update={"localized": localized}), "g")
    assert plot is not None
    line = float(re.findall(r'<line x1="([\d.]+)"[^>]*class="threshold"', plot.pictures[0])[0])
    centres = [float(x) for x in re.findall(r'cx="([\d.]+)"', plot.pictures[0])]
    assert [x > line for x in centres] == [score > 0.428 for score in scores]


def test_a_crowd_of_dots_stays_in_its_row(audit: PictureAudit) -> None:
    crowd = [
        LocalizedPrompt(prompt=f"p{place}", group="ordinary", best_pair=0.3, is_memorized=False)
        for place in range(900)
    ]
    plot = gate_plot(audit.model_copy(update={"localized": crowd}), "g")
    assert plot is not None
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', plot.pictures[0])]
    assert len(heights) == 900 and min(heights) > 20 and max(heights) - min(heights) < 64


def test_effect_plot_shows_the_worst_first_and_counts_what_is_broken(audit: PictureAudit) -> None:
    plot = effect_plot(audit, "e")
    assert plot is not None
    memorized = [one for one in audit.localized if one.is_memorized]
    broken = [one for one in memorized if one.refined_score < one.threshold and not one.is_replaced]
    assert f"{len(broken)} of {len(memorized)} scores are below" in plot.note
    assert plot.pictures[0].count("chosen broken") == len(broken)
    worst = max(memorized, key=lambda one: one.refined_score - one.threshold)
    first = re.findall(r"<g><title>(.*?)</title>", plot.pictures[0])[0]
    assert first.startswith(worst.prompt[:20]) and number_text(worst.refined_score, "score") in first


@pytest.mark.parametrize("widths", [(16, 16, 24, 24, 40, 64), (320, 320, 640, 640, 1280, 1280, 1280)])
def test_neuron_map_is_proportional_and_marks_every_chosen_neuron(
    audit: PictureAudit, widths: tuple[int, ...]
) -> None:
    sites = [
        SiteNeurons(path=f"unet.block.{place}.to_v", width=width, indices=[0, width - 1], num_prompts=[1, 4])
        for place, width in enumerate(widths)
    ]
    plot = neuron_plot(audit.model_copy(update={"sites": sites}), "m")
    assert plot is not None and f"{2 * len(widths)} of {sum(widths):,} neurons" in plot.note
    for picture in plot.pictures:
        drawn = [float(x) for x in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)"', picture)]
        assert [x / drawn[0] for x in drawn] == pytest.approx(
            [width / widths[0] for width in widths], rel=0.01
        )
        ticks = re.findall(r'<path d="([^"]*)" stroke-width="([\d.]+)" class="neuron shade(\d)"', picture)
        assert len(ticks) == 2 * len(widths) and {shade for _, _, shade in ticks} == {"1", "4"}
        assert all(float(width) >= 2 for _, width, _ in ticks)


def test_neuron_table_and_short_paths(audit: PictureAudit) -> None:
    assert short_paths(["a.b.0.x.v", "a.b.1.x.v", "a.mid.x.v"]) == ["b.0", "b.1", "mid"]
    assert short_paths(["a.downs.0.v", "a.downs.1.v"]) == ["downs.0", "downs.1"]
    assert short_paths(["a.b"]) == ["a.b"] and short_paths(["a", "a"]) == ["a", "a"]
    site = SiteNeurons(path="a", width=9, indices=[3, 5, 7], num_prompts=[1, 6])
    table = neuron_table(audit.model_copy(update={"sites": [site]}), "n")
    assert table is not None and table.rows[0].cells[2].text == "5 (6\u00d7), 3 (1\u00d7), 7"
    assert (
        neuron_plot(audit.model_copy(update={"sites": [site.model_copy(update={"indices": []})]}), "m")
        is None
    )


def test_cost_is_medians_and_sums_of_what_was_counted(audit: PictureAudit) -> None:
    prompts = [
        LocalizedPrompt(
            prompt="p", group="target", best_pair=0.9, is_memorized=True, sample_forwards=n, seconds=n / 10
        )
        for n in (100, 160, 900)
    ]
    table = picture_costs.cost_table(audit.model_copy(update={"localized": prompts}), "c")
    assert table is not None and len(table.rows) == 1
    assert [cell.value for cell in table.rows[0].cells] == [160, 1160, 16.0, pytest.approx(116.0)]
    assert table.rows[0].cells[0].detail == "[100, 900]"


def test_the_result_is_the_named_state_or_after_or_the_first_that_is_no_control(audit: PictureAudit) -> None:
    assert result_state(audit) == "after"
    named = audit.model_copy(update={"settings": {"headline_state": "placebo"}})
    assert result_state(named) == "placebo"
    states = [
        state.model_copy(update={"state": {"after": "refined"}.get(state.state, state.state)})
        for state in audit.states
    ]
    assert result_state(audit.model_copy(update={"states": states})) == "refined"
    earlier = audit.states[2].model_copy(update={"state": "initial"})
    assert result_state(audit.model_copy(update={"states": [earlier, *audit.states]})) == "after"
    controls = [state for state in states if state.state in ("before", "placebo")]
    assert result_state(audit.model_copy(update={"states": controls})) == ""


def test_panels_have_a_row_for_every_state(audit: PictureAudit) -> None:
    panels = state_panels(audit, "s")
    assert [panel.title for panel in panels] == [
        *("Targets copied", "Neighbours copied", "Ordinary pictures kept")
    ]
    for panel in panels:
        assert panel.picture.count("row-figure") == len(STATES)
    assert panels[0].picture.count("state-mark") == len(STATES)
    assert panels[2].picture.count("state-mark") == len(STATES) - 1


def test_both_families_share_a_page(run: Path, tmp_path: Path) -> None:
    language = tmp_path / "language"
    language.mkdir()
    synthetic_audit(1, ("standard", "dedup", "sinks")).save(language / "audit.json")
    path = write_report([run, language, language], tmp_path / "both.html")
    text = path.read_text(encoding="utf-8")
    page = parsed(text)
    assert {"r1-pictures", "r2-frontier", "r3-frontier", "combined"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)) and "r1-frontier" not in page.ids
    assert "sinks B" in page.text and "sinks C" in page.text and "Filled marks are run B" in text
    single = parsed(render([run, language]))
    assert "combined" not in single.ids and "r2-frontier" in single.ids


def test_bad_input_is_one_clear_line(run: Path, audit: PictureAudit, tmp_path: Path) -> None:
    value = plain(audit)
    value["prompts"][0]["group"] = "guess"
    with pytest.raises(FileFormatError, match=r"does not fit the audit format at prompts.0.group"):
        render([written(tmp_path, value)])
    with pytest.raises(ConfigError, match="max_picture_bytes is -1; pass 0"):
        render([run], max_picture_bytes=-1)
