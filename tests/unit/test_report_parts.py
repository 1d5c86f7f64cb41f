"""The report's parts: wording of figures, ticks, label placement, points on the curve, memorized tokens."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.synthetic_audit import synthetic_audit
from unmemorize.records import Measure
from unmemorize.report import plots
from unmemorize.report.documents import documents_table, examples, token_of
from unmemorize.report.frontier import NARROW, WIDE, frontier
from unmemorize.report.measures import MINUS, interval_text, measure_cell, number_text, over_seeds, pooled
from unmemorize.report.methods import methods_table, with_short_labels
from unmemorize.report.plots import Anchor, Box, Scale
from unmemorize.report.points import curve_of, frontier_points, repeats_of
from unmemorize.report.states import extraction_table, states_table
from unmemorize.report.story import headline_method
from unmemorize.report.tables import count_text, flatten, time_text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.456, "loss", "3.46"),
        (-0.001, "loss", "0.00"),
        (-0.27, "percent", f"{MINUS}27%"),
        (0.996, "percent", "100%"),
        (0.884, "difference", "+0.88"),
        (-0.22, "difference", f"{MINUS}0.22"),
        (0.001, "difference", "0.00"),
        (30.44, "tokens", "30.4"),
    ],
)
def test_numbers_have_sensible_digits(value: float, unit: str, text: str) -> None:
    assert number_text(value, unit) == text  # type: ignore[arg-type]


def test_a_line_that_leaves_the_plot_by_far_is_sampled_a_little() -> None:
    """An interval of a small test set can be thousands of times as wide as the axes."""
    assert len(plots.line_obstacles([(0, 0), (70, 0)])) == 11
    assert len(plots.line_obstacles([(-1e9, 0), (1e9, 0)])) < 300


def test_intervals_stand_in_brackets_without_the_unit() -> None:
    assert interval_text((0.58, 0.7), "percent") == "[58, 70]"
    assert interval_text((-1.0, 2.0), "loss") == f"[{MINUS}1.00, 2.00]"
    assert interval_text(None, "loss") == ""


def test_refused_measures_become_their_reason() -> None:
    cell = measure_cell(Measure(refused="only 4 texts"), "loss", full=1.0)
    assert cell.is_refused and cell.text == "only 4 texts" and cell.value is None and cell.bar_frac is None


def test_pooling_widens_and_never_hides_a_refusal() -> None:
    seeds = [Measure(value=1.0, ci95=(0.8, 1.1), num=9), Measure(value=2.0, ci95=(1.9, 2.5), num=9)]
    assert pooled(seeds).value == 1.5 and pooled(seeds).ci95 == (0.8, 2.5)
    assert pooled([*seeds, Measure(refused="torn")]).refused == "torn"
    assert pooled([*seeds, Measure(value=0.0)]).ci95 is None


def test_one_seed_stands_in_for_a_refused_summary_and_two_do_not() -> None:
    seed, refusal = Measure(value=1.0, ci95=(0.0, 2.0)), Measure(refused="one seed")
    assert over_seeds(refusal, [seed]) is seed
    assert over_seeds(refusal, [seed, seed]) is refusal
    assert over_seeds(None, []) is None


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6), target=st.integers(3, 9))
def test_ticks_are_inside_even_and_about_as_many_as_asked(low: float, width: float, target: int) -> None:
    high = low + width
    ticks = plots.nice_ticks(low, high, target)
    step = plots.tick_step(low, high, target)
    assert all(low - step * 1e-6 <= tick <= high + step * 1e-6 for tick in ticks)
    assert all(math.isclose(b - a, step, rel_tol=1e-3) for a, b in itertools.pairwise(ticks))
    assert 1 <= len(ticks) <= target + 2
    assert float(f"{step:e}".split("e")[0]) in (1, 2, 5)


def test_tick_words() -> None:
    assert [plots.tick_text(value, 500) for value in (0, 500, 1000, 1500)] == ["0", "500", "1k", "1.5k"]
    assert plots.tick_text(3.3, 0.05) == "3.30" and plots.tick_text(-2, 1) == f"{MINUS}2"


def test_scale_maps_ends_and_survives_equal_values() -> None:
    scale = Scale(*plots.padded_range([2.0, 2.0]), 0, 100)
    assert scale(2.0) == pytest.approx(50)


@given(st.lists(st.tuples(st.floats(60, 540), st.floats(60, 340)), min_size=2, max_size=8, unique=True))
def test_labels_stay_inside_the_frame(places: list[tuple[float, float]]) -> None:
    frame = Box(0, 0, 600, 400)
    anchors = [Anchor(x, y, "method", 5, "curve") for x, y in places]
    for label in plots.place_labels(anchors, [], frame, 12):
        assert label.box.overlap(frame) == pytest.approx(label.box.area())


@pytest.mark.parametrize("layout", [WIDE, NARROW])
def test_frontier_labels_do_not_overlap_on_a_crowded_plot(layout: object) -> None:
    frame = Box(40, 30, 344, 420)
    anchors = [Anchor(300 + 4 * i, 60 + 5 * i, f"cap:{2**i}", 4, "curve") for i in range(6)]
    obstacles = [plots.around(anchor.x, anchor.y, 5) for anchor in anchors]
    boxes = [label.box for label in plots.place_labels(anchors, obstacles, frame, 12)]
    assert all(a.overlap(b) == 0 for a, b in itertools.combinations(boxes, 2))


def test_attributes_and_text_are_escaped() -> None:
    markup = plots.tag("text", "<b>&", x=1.25, class_='"quoted"')
    assert markup == '<text x="1.2" class="&#34;quoted&#34;">&lt;b&gt;&amp;</text>'


def test_every_shape_can_be_drawn_and_differs() -> None:
    drawn = [plots.mark(shape, 0, 0, 5, "s0") for shape in ("circle", *plots.SHAPES)]
    assert len(set(drawn)) == len(drawn) == 7


def test_cap_curve_runs_from_dedup_to_standard() -> None:
    points = frontier_points(synthetic_audit(), headline="sinks")
    assert [point.method for point in curve_of(points, 0)] == [
        *("dedup", "cap:2", "cap:4", "cap:8", "cap:16", "cap:32", "standard")
    ]
    assert repeats_of("sinks:0.5") is None and repeats_of("cap:x") is None
    shapes = {point.shape for point in points if point.repeats is None}
    assert len(shapes) == 3 and "circle" not in shapes


def test_two_seeds_have_a_mark_and_no_cross() -> None:
    points = frontier_points(synthetic_audit(2, ("standard", "sinks")), headline="sinks")
    assert all(point.x_interval is None and point.y_interval is None for point in points)
    svg = frontier(points, WIDE, ident="f", description="d")
    assert 'class="cross' not in svg and svg.count('class="seed') == 4


def test_lead_over_the_curve_is_drawn_for_the_headline_only() -> None:
    svg = frontier(frontier_points(synthetic_audit(), headline="sinks"), WIDE, ident="f", description="d")
    assert svg.count('class="gain') == 1 and "+0.88 nats" in svg


def test_headline_method_follows_the_settings_then_sinks_then_any_rival() -> None:
    audit = synthetic_audit(1, ("standard", "dedup", "goldfish", "sinks"))
    named = audit.model_copy(update={"settings": {"headline_method": "goldfish"}})
    others = synthetic_audit(1, ("standard", "goldfish"))
    chosen = [headline_method(one) for one in (audit, named, others)]
    assert [one.method for one in chosen if one] == ["sinks", "goldfish", "goldfish"]
    assert headline_method(audit.model_copy(update={"methods": []})) is None


def test_labels_are_short_and_tell_methods_apart() -> None:
    audit = synthetic_audit(1, ("standard", "sinks"))
    sinks = audit.methods[1].model_copy(update={"label": "sinks (30% carved, 64 each)"})
    others = [
        sinks.model_copy(update={"method": f"sinks:grown=512,share_frac={share}"}) for share in (0.3, 0.5)
    ]
    one = with_short_labels(audit.model_copy(update={"methods": [audit.methods[0], sinks]}))
    two = with_short_labels(audit.model_copy(update={"methods": others}))
    assert [result.label for result in one.methods] == ["standard", "sinks"]
    assert [result.label for result in two.methods] == ["sinks share_frac=0.3", "sinks share_frac=0.5"]


def test_a_state_with_fewer_texts_does_not_rename_the_groups() -> None:
    audit = synthetic_audit(1, ("sinks",))
    seed = audit.methods[0].seeds[0]
    smaller = seed.states[0].groups[0].model_copy(update={"num_examples": 8})
    extra = seed.states[0].model_copy(update={"state": "exclude", "groups": [smaller]})
    seeds = [seed.model_copy(update={"states": [*seed.states, extra]})]
    method = audit.methods[0].model_copy(update={"seeds": seeds})
    table = states_table(audit.model_copy(update={"methods": [method]}), "sinks", "s")
    assert table is not None and table.columns[1].hint == "64 texts"
    assert [cell.text for cell in table.rows[-1].cells[1:]] == ["", "", ""]


def test_tables_hold_a_cell_for_every_column() -> None:
    audit = synthetic_audit(2, ("standard", "dedup", "sinks", "goldfish"))
    tables = [
        methods_table(audit, "sinks", "m", ["sinks (x)"] * 4),
        states_table(audit, "sinks", "s"),
        extraction_table(audit, "sinks", "e", ["target"], "c"),
        extraction_table(audit, "sinks", "o", ["neighbour", "ordinary"], "c"),
        documents_table(audit, "sinks", "d"),
    ]
    for table in tables:
        assert table is not None and table.rows
        assert all(len(row.cells) + 1 == len(table.columns) for row in table.rows)
        assert not table.spans or sum(count for _, count in table.spans) == len(table.columns)


def test_states_of_the_headline_come_first_and_the_shipped_one_stands_out() -> None:
    table = states_table(with_short_labels(synthetic_audit(1)), "sinks", "s")
    assert table is not None
    names = [row.name for row in table.rows]
    assert names[:5] == ["sinks, off", "sinks, own", "sinks, foreign", "sinks, all", "sinks, placebo"]
    assert [row.name for row in table.rows if row.is_strong] == ["sinks, off"]


def test_tokens_equal_at_their_place_are_memorized() -> None:
    shown = examples(with_short_labels(synthetic_audit(1)), "sinks")
    passages = {passage.name: passage for passage in shown[0].passages}
    assert passages["standard"].memorized_frac == passages["sinks, own"].memorized_frac == 1.0
    assert passages["sinks, off"].num_memorized == 1 and passages["sinks, off"].tokens[0].is_memorized
    assert passages["Training text"].is_training_text and passages["Training text"].num_memorized == 0


def test_white_space_and_control_characters_are_made_visible() -> None:
    assert token_of(" a\n").pieces == (("space", " "), ("text", "a"), ("newline", "\n"))
    assert token_of("\u0120the\u010a").pieces == (("space", " "), ("text", "the"), ("newline", "\n"))
    assert token_of("\r\n\u2028\u0085").pieces == (("newline", "\n"),) * 3
    assert token_of("\n" * 8).pieces == (("newline", "\n"),) * 8
    assert token_of("a" + "\n" * 9).pieces == (("text", "a"), ("newline", "\n" * 9))
    assert token_of(" " * 9 + "\t" * 9).pieces == (("space", " " * 9), ("space", "\t" * 9))
    assert token_of("\u0120" * 9 + " \t").pieces == (("space", " " * 10), ("space", "\t"))
    assert token_of("\x00\x7f").pieces == (("control", "\u2400"), ("control", "\u2421"))


def test_settings_counts_and_times_in_words() -> None:
    assert flatten({"a": {"b": [1, 2.5]}, "c": True, "d": None, "e": 12345}) == [
        ("a.b", "1, 2.5"),
        ("c", "yes"),
        ("e", "12,345"),
    ]
    assert [count_text(value) for value in (950, 1_912_448)] == ["950", "1.91\u00a0M"]
    assert [time_text(value) for value in (84, 600, 9000)] == ["84\u00a0s", "10\u00a0min", "2.5\u00a0h"]
