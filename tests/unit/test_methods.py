"""Method strings, what they change, and how gradients are routed."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

from tests.tiny import tiny_model, tokens
from unmemorize.errors import ConfigError
from unmemorize.isolate.language import plan_sinks
from unmemorize.isolate.methods import MethodSettings, RoutedGradients, parse_method
from unmemorize.isolate.optimizer import pool_slices
from unmemorize.isolate.plan import SinkSettings
from unmemorize.isolate.settings import (
    OptimizationSettings,
    TrainSettings,
    first_difference,
    settings_from_json,
)
from unmemorize.isolate.steps import learning_rate, micro_batches


@pytest.mark.parametrize(
    ("text", "kind", "cap", "has_pool", "folder"),
    [
        ("standard", "standard", None, False, "standard"),
        ("dedup", "dedup", 1, False, "dedup"),
        ("cap:8", "cap", 8, False, "cap-8"),
        ("goldfish", "goldfish", None, False, "goldfish"),
        ("sinks", "sinks", None, True, "sinks"),
        ("gradient-masking", "gradient-masking", None, True, "gradient-masking"),
        ("sinks:share_frac=0.5", "sinks", None, True, "sinks-share_frac-0.5"),
    ],
)
def test_methods_are_read(text: str, kind: str, cap: int | None, has_pool: bool, folder: str) -> None:
    method = parse_method(text)
    assert (method.kind, method.cap, method.has_pool, method.folder) == (kind, cap, has_pool, folder)
    assert method.name == text


@pytest.mark.parametrize("text", ["", "sink", "Standard", "cap8", "standard:", ":8", "sinks "])
def test_unknown_methods_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="unknown method .*; expected one of standard, dedup, cap:R"):
        parse_method(text)


@pytest.mark.parametrize("text", ["cap", "cap:", "cap:0", "cap:x", "cap:-1", "cap:1.5"])
def test_a_cap_needs_a_number(text: str) -> None:
    with pytest.raises(ConfigError, match="needs a number of sightings, 1 or more, such as cap:8"):
        parse_method(text)


def test_a_method_changes_settings_for_itself() -> None:
    settings = MethodSettings(sinks=SinkSettings(share_frac=0.7, active_frac=0.3))
    text = "sinks:sinks_per_id=4,layers=[0,1],per_layer=true,sinks_for=all,sink_learning_rate_scale=2"
    changed = parse_method(text, settings).settings
    assert (changed.sinks.sinks_per_id, changed.sinks.active_frac) == (4, None)
    assert changed.sinks.layers == (0, 1)
    assert changed.sinks.per_layer is True
    assert changed.sinks.share_frac == 0.7
    assert (changed.sinks_for, changed.sink_learning_rate_scale) == ("all", 2)
    assert settings.sinks.sinks_per_id is None
    assert parse_method("sinks:active_frac=0.2").settings.sinks.sinks_per_id is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sinks:width=3", "has 'width=3', expected NAME=VALUE"),
        ("sinks:share_frac", "has 'share_frac', expected NAME=VALUE"),
        ("sinks:share_frac=2", "share_frac is 2, expected 0 to 1"),
        ("sinks:share_frac=much", "wrong type"),
        ("sinks:shared_cap=-1", "shared_cap is -1, expected a whole number of sightings, 0 or more"),
        ("sinks:shared_cap=1.5", "shared_cap is 1.5, expected a whole number"),
        ("sinks:shared_cap=few", "wrong type"),
        ("goldfish:goldfish_k=1", "goldfish_k is 1, expected 2 or more"),
        ("sinks:scheme=published,active_frac=0.3", "use compute masked"),
    ],
)
def test_wrong_changes_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_method(text)


def test_who_opens_sinks() -> None:
    repeated = {7}
    for name, seven, nine in [
        ("standard", 0, 0),
        ("sinks", 7, 0),
        ("sinks:sinks_for=all", 7, 9),
        ("gradient-masking", 7, 0),
        ("gradient-masking:sinks_for=all", 7, 0),
    ]:
        method = parse_method(name)
        assert (method.sink_id(7, repeated), method.sink_id(9, repeated)) == (seven, nine), name


def test_labels_are_split_and_dropped() -> None:
    labels = torch.tensor([[-100, 5, 6, -100, 8, 9]])
    ids = torch.tensor([[7, 7, 7, 0, 0, 0]])
    method = parse_method("gradient-masking")
    assert method.halves() == ("repeated", "others")
    assert method.labels(labels, ids, "repeated").tolist() == [[-100, 5, 6, -100, -100, -100]]
    assert method.labels(labels, ids, "others").tolist() == [[-100, -100, -100, -100, 8, 9]]
    long = torch.arange(400).remainder(37).view(1, -1)
    kept = parse_method("goldfish:goldfish_k=3").labels(long, torch.zeros_like(long), "all")
    assert 0.15 < (kept == -100).float().mean() < 0.5
    assert torch.equal(parse_method("standard").labels(long, torch.zeros_like(long), "all"), long)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_gradients_are_routed_exactly(family: str) -> None:
    model = tiny_model(family)
    plan = plan_sinks(model, SinkSettings(share_frac=0.5))
    repeated, others = tokens(2, seed=1), tokens(2, seed=2)

    def gradients(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    from_repeated, from_others = gradients(repeated), gradients(others)
    model.zero_grad()
    routed = RoutedGradients(model, plan)
    model(input_ids=repeated, labels=repeated).loss.backward()
    routed.keep_pool()
    model(input_ids=others, labels=others).loss.backward()
    routed.put_pool()
    expected = {name: gradient.clone() for name, gradient in from_others.items()}
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, axis, part in pool_slices(model, plan):
        size = part.stop - part.start
        source = from_repeated[names[id(parameter)]].narrow(axis, part.start, size)
        expected[names[id(parameter)]].narrow(axis, part.start, size).copy_(source)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_learning_rate_warms_up_and_ends_at_its_share() -> None:
    settings = OptimizationSettings(learning_rate=1.0, warmup_frac=0.2, final_frac=0.1)
    rates = [learning_rate(step, 50, settings) for step in range(50)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert learning_rate(0, 1, settings) == 1.0


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("micro_rows", [None, 2])
def test_every_row_is_in_one_share(num_processes: int, micro_rows: int | None) -> None:
    batch = {
        "input_ids": torch.arange(7).view(7, 1).expand(7, 3),
        "labels": torch.ones(7, 3, dtype=torch.long),
    }
    shares = [micro_batches(batch, rank, num_processes, micro_rows) for rank in range(num_processes)]
    assert len({tuple(len(part["labels"]) for part in share) for share in shares}) == 1
    learned = [
        int(row)
        for share in shares
        for part in share
        for row, label in zip(part["input_ids"][:, 0], part["labels"][:, 0], strict=True)
        if label == 1
    ]
    assert sorted(learned) == list(range(7))


def test_settings_round_trip_through_json() -> None:
    settings = TrainSettings(methods=("standard", "sinks:layers=[0,1]"), seeds=(0, 3))
    assert settings_from_json(settings.to_json()) == settings
    assert settings_from_json({}) == TrainSettings()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"method": {"sinks": {"shared": 1}}}, "unknown setting method.sinks.shared; expected one of"),
        ({"sedes": [0]}, "unknown setting sedes"),
        ({"seeds": [0, 2**63]}, "setting seeds holds a whole number of more than 64 bits"),
        (
            {"model": {"vocabulary_size": 10**25}},
            "setting model.vocabulary_size holds a whole number of more",
        ),
        ({"seeds": ["a"]}, "setting seeds.0 cannot be used"),
        ({"seeds": [1, 1]}, "seeds is .1, 1., expected each seed once"),
        ({"methods": []}, "expected at least one method"),
        ({"methods": ["sinks", "sinks"]}, "expected each method once"),
        ({"methods": ["capp"]}, "unknown method 'capp'"),
        ({"optimization": {"batch_rows": 0}}, "batch_rows is 0, expected 1 or more"),
        ({"model": {"length_tokens": 2}}, "length_tokens is 2, expected 8 or more"),
        ({"records": {"log_every_steps": 0}}, "log_every_steps is 0, expected 1 or more"),
        ({"method": {"sinks": {"share_frac": 3}}}, "share_frac is 3"),
    ],
)
def test_wrong_settings_are_refused_by_name(value: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_from_json(value)


def test_the_first_difference_is_named() -> None:
    ours = TrainSettings()
    theirs = dataclasses.replace(ours, optimization=OptimizationSettings(batch_rows=4))
    assert first_difference(ours.to_json(), ours.to_json()) is None
    difference = first_difference(ours.to_json(), theirs.to_json())
    assert difference == "optimization.batch_rows is 4 there and 8 here"


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "clip_norm"])
def test_numbers_that_no_float32_holds_are_refused(name: str) -> None:
    for number in (1e308, float("inf")):
        with pytest.raises(ConfigError, match=rf"{name} is .*, expected .*1e\+"):
            OptimizationSettings(**{name: number})
    with pytest.raises(
        ConfigError, match="sink_learning_rate_scale is 1e\\+308, expected above 0, at most 1e\\+06"
    ):
        MethodSettings(sink_learning_rate_scale=1e308)
