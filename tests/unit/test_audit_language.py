"""Losses and verbatim extraction of tiny models against literal references, and groups in one state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import metrics as reference
from tests.tiny import FAMILIES, VOCABULARY, tiny_model
from unmemorize.audit.examples import (
    AuditSettings,
    Example,
    check_examples,
    continuations,
    document_results,
)
from unmemorize.audit.language import audit_state, continue_greedily, document_losses, extract
from unmemorize.audit.verbatim import levenshtein, score_continuations
from unmemorize.errors import ConfigError, DataError, IdsMissing, ShapeMismatch
from unmemorize.isolate.language import plan_sinks, sink_state
from unmemorize.isolate.plan import SinkSettings
from unmemorize.records import Progress

torch.set_num_threads(1)

WINDOWED = [
    ("gemma2", {"sliding_window": 6}),
    ("gemma3_text", {"sliding_window": 6}),
    ("mistral", {"sliding_window": 6}),
]
MODELS = [(family, {}) for family in FAMILIES] + WINDOWED


def draw(lengths: list[int], seed: int = 0) -> list[tuple[int, ...]]:
    generator = np.random.default_rng(seed)
    return [tuple(generator.integers(3, VOCABULARY, size=length).tolist()) for length in lengths]


# Losses


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_losses_equal_the_literal_ones_in_any_batch(family: str, changes: dict[str, int]) -> None:
    model = tiny_model(family, **changes)
    sequences = draw([40, 3, 17, 2, 60, 17, 9])
    expected = np.array([reference.summed_nll(model.eval(), s) for s in sequences])
    for batch_size in (1, 3, 7):
        measured = document_losses(model, sequences, batch_size=batch_size)
        assert measured.num_tokens.tolist() == [39, 2, 16, 1, 59, 16, 8]
        assert measured.mean_nats() == pytest.approx(expected / measured.num_tokens, abs=1e-5)


def test_documents_without_a_prediction_have_no_loss() -> None:
    measured = document_losses(tiny_model(), [(5,), (), (5, 6)])
    assert measured.num_tokens.tolist() == [0, 0, 1]
    assert np.isnan(measured.mean_nats()[:2]).all()
    assert measured.nll_nats[2] > 0
    assert document_losses(tiny_model(), []).nll_nats.shape == (0,)


def test_half_precision_accumulates_in_float32() -> None:
    model, sequences = tiny_model(), draw([50] * 4)
    expected = document_losses(model, sequences).mean_nats()
    measured = document_losses(model.to(torch.bfloat16), sequences).mean_nats()
    assert measured == pytest.approx(expected, abs=0.03)


def test_modes_of_all_modules_come_back() -> None:
    model = tiny_model().train()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    document_losses(model, draw([4]))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(DataError):
        document_losses(model, [(3, VOCABULARY)])
    assert [module.training for module in model.modules()] == before


def test_documents_that_do_not_fit_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(
        DataError, match="document 1 has 65 tokens, the model's context holds 64; cut or split it"
    ):
        document_losses(model, draw([10, 65]))
    with pytest.raises(
        DataError, match="document 0 holds token 64, the model's vocabulary has 64; use the tokenizer"
    ):
        document_losses(model, [(3, 64)])
    with pytest.raises(DataError, match="document 0 holds token -1"):
        extract(model, [(3, -1, 5, 7)], 2, 2)


def test_progress_counts_documents() -> None:
    steps: list[Progress] = []
    document_losses(tiny_model(), draw([5] * 5), batch_size=2, progress=steps.append)
    assert [(step.stage, step.done, step.total) for step in steps] == [
        ("losses", 2, 5),
        ("losses", 4, 5),
        ("losses", 5, 5),
    ]


# Extraction


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_cached_generation_equals_uncached(family: str, changes: dict[str, int]) -> None:
    model = tiny_model(family, **changes).eval()
    prompts = draw([9] * 4)
    added = continue_greedily(model, torch.tensor(prompts), 20)
    assert added.tolist() == [reference.greedy(model, prompt, 20) for prompt in prompts]


def test_generation_equals_transformers_own() -> None:
    model = tiny_model("llama", eos_token_id=None).eval()
    model.generation_config.eos_token_id = None
    prompts = torch.tensor(draw([8] * 3))
    theirs = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=12,
        min_new_tokens=12,
    )
    assert torch.equal(continue_greedily(model, prompts, 12), theirs[:, 8:])


def test_extraction_by_construction() -> None:
    """What the model wrote itself is extracted whole; with its fourth token changed, three match."""
    model = tiny_model().eval()
    prompts = draw([8] * 3)
    own = [tuple(prompt) + tuple(reference.greedy(model, prompt, 10)) for prompt in prompts]
    changed = list(own[1])
    changed[8 + 3] = 3 + (changed[8 + 3] - 2) % (VOCABULARY - 3)
    sequences = [own[0], draw([12])[0], tuple(changed), (*own[2], 5, 6)]
    result = extract(model, sequences, 8, 10, batch_size=2)
    assert result.indices.tolist() == [0, 2, 3]
    assert result.num_excluded == 1
    assert result.scores.is_exact.tolist() == [True, False, True]
    assert result.scores.matched_prefix_tokens.tolist() == [10, 3, 10]
    assert result.scores.edit_distance_frac.tolist() == [0.0, 0.1, 0.0]
    assert result.scores.is_near_verbatim.all()
    assert result.generated.tolist() == [list(own[0][8:]), list(own[1][8:]), list(own[2][8:])]
    assert result.truth.tolist()[1] == changed[8:]
    assert result.scores.teacher_forced_accuracy_frac[0] == 1.0


def test_teacher_forcing_sees_the_true_text() -> None:
    model = tiny_model("gpt2").eval()
    (sequence,) = draw([20])
    result = extract(model, [sequence], 6, 14)
    expected = [reference.greedy(model, sequence[:place], 1)[0] for place in range(6, 20)]
    assert result.teacher_forced[0].tolist() == expected


def test_extraction_of_nothing_is_empty() -> None:
    result = extract(tiny_model(), draw([5, 6]), 8, 8)
    assert result.generated.shape == (0, 8)
    assert result.num_excluded == 2
    assert result.scores.is_exact.shape == (0,)


def test_extraction_needs_room() -> None:
    with pytest.raises(
        ConfigError, match="extraction needs 80 tokens, the model's context holds 64; shorten it"
    ):
        extract(tiny_model(), draw([60]), 40, 40)


# Scores


tokens_of = st.integers(0, 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.tuples(tokens_of, tokens_of, tokens_of)] * 7), min_size=1, max_size=5))
def test_scores_equal_the_literal_ones(rows: list[tuple[tuple[int, int, int], ...]]) -> None:
    generated, forced, truth = np.array(rows, dtype=np.int64).transpose(2, 0, 1)
    scores = score_continuations(generated, forced, truth)
    for n in range(len(rows)):
        g, q, s = generated[n].tolist(), forced[n].tolist(), truth[n].tolist()
        assert scores.is_exact[n] == (g == s)
        assert scores.matched_prefix_tokens[n] == reference.matched_prefix(g, s)
        assert scores.equal_positions_frac[n] == pytest.approx(sum(map(int.__eq__, g, s)) / 7)
        assert scores.teacher_forced_accuracy_frac[n] == pytest.approx(sum(map(int.__eq__, q, s)) / 7)
        assert scores.edit_distance_frac[n] == pytest.approx(reference.levenshtein(g, s) / 7)
        assert scores.is_near_verbatim[n] == (reference.levenshtein(g, s) <= 1)
        assert scores.extraction_strength_frac[n] == pytest.approx(reference.extraction_strength(q, s))


def test_edit_distance_by_hand() -> None:
    """One token lost at the start shifts everything: no position is equal, yet two edits are enough."""
    generated, truth = np.array([[2, 3, 4, 5, 6, 7, 8, 9]]), np.array([[1, 2, 3, 4, 5, 6, 7, 8]])
    scores = score_continuations(generated, generated, truth)
    assert levenshtein(generated, truth).tolist() == [2]
    assert scores.equal_positions_frac.tolist() == [0.0]
    assert scores.is_near_verbatim.tolist() == [True]


def test_extraction_strength_reaches_both_ends() -> None:
    truth = np.array([[1, 2, 3, 4]] * 3)
    forced = np.array([[1, 2, 3, 4], [1, 9, 3, 4], [1, 2, 3, 9]])
    strength = score_continuations(truth, forced, truth).extraction_strength_frac
    assert strength.tolist() == [1.0, 0.5, 0.0]


def test_scores_need_equal_shapes() -> None:
    with pytest.raises(ShapeMismatch, match="expected one shape"):
        score_continuations(np.zeros((2, 3), int), np.zeros((2, 3), int), np.zeros((2, 4), int))
    with pytest.raises(ShapeMismatch, match="l >= 1"):
        score_continuations(*[np.zeros((2, 0), int)] * 3)


# Groups and states


def examples(num_target: int = 13, num_ordinary: int = 15) -> list[Example]:
    texts = draw([40] * num_target + [30] * num_ordinary, seed=1)
    return [
        Example(
            name=f"text {number}",
            group="target" if number < num_target else "ordinary",
            tokens=text,
            repeats=8 if number < num_target else 0,
            id=number + 1,
            sink_id=1000 + number,
        )
        for number, text in enumerate(texts)
    ]


SETTINGS = AuditSettings(lengths=((8, 8), (16, 20)), num_resamples=200)


def test_state_holds_every_group() -> None:
    model, texts = tiny_model(), examples()
    measured = audit_state(model, texts, "plain", SETTINGS, description="as trained")
    assert [group.group for group in measured.result.groups] == ["target", "ordinary"]
    target, ordinary = measured.result.groups
    assert (target.num_examples, ordinary.num_examples) == (13, 15)
    expected = sum(reference.summed_nll(model.eval(), e.tokens) for e in texts[:13]) / (13 * 39)
    assert target.loss_nats.value == pytest.approx(expected, abs=1e-5)
    low, high = target.loss_nats.ci95
    assert low < target.loss_nats.value < high
    assert target.extraction[0].extraction_rate_frac.method == "wilson"
    assert target.extraction[1].num_excluded == 0
    assert ordinary.extraction[1].num_excluded == 15
    refusal = "no example has the 16 + 20 tokens it needs"
    assert ordinary.extraction[1].extraction_rate_frac.refused == refusal
    assert ordinary.extraction[1].edit_distance_frac.refused == refusal


def test_groups_asked_for_but_empty_are_refused() -> None:
    measured = audit_state(
        tiny_model(), examples(3, 15), "plain", SETTINGS, groups=("ordinary", "neighbour", "target")
    )
    target, neighbour, _ = measured.result.groups
    assert target.loss_nats.refused == "3 examples; an interval needs 5"
    assert target.extraction[0].extraction_rate_frac.refused is not None
    assert (neighbour.group, neighbour.num_examples) == ("neighbour", 0)
    assert neighbour.loss_nats.refused == "no examples; an interval needs 5"
    assert neighbour.extraction[0].matched_prefix_tokens.refused == "no examples"


def test_texts_without_a_prediction_are_counted() -> None:
    texts = [*examples(), Example(name="stub", group="target", tokens=(5,))]
    measured = audit_state(tiny_model(), texts, "plain", SETTINGS)
    target = measured.result.groups[0]
    assert (target.num_examples, target.num_excluded, target.extraction[0].num_excluded) == (13, 1, 1)
    assert "stub" not in [row.example for row in document_results(texts, {"plain": measured})]


def test_a_text_belongs_to_one_group() -> None:
    first, *_, last = examples()
    with pytest.raises(DataError, match=r"'text 0' \(target\) and 'copy' \(ordinary\) are the same text"):
        check_examples([first, Example(name="copy", group="ordinary", tokens=first.tokens)])
    with pytest.raises(DataError, match="are the same text; a text belongs to one group"):
        check_examples([first, Example(name="copy", group="ordinary", tokens=last.tokens, id=first.id)])
    check_examples([first, Example(name="copy", group="target", tokens=first.tokens)])


def test_examples_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(DataError, match="two examples are named 'text 0'; give each its own name"):
        check_examples([examples()[0]] * 2)
    with pytest.raises(DataError, match="no examples to audit"):
        check_examples([])
    with pytest.raises(DataError, match="is in group 'validation'; expected one of"):
        check_examples([Example(name="a", group="validation", tokens=(1, 2))])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"num_resamples": 5}, "num_resamples is 5, expected 100 or more"),
        ({"lengths": ((0, 8),)}, r"extraction lengths are \(0, 8\), expected 1 token or more each"),
    ],
)
def test_settings_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AuditSettings(**changes)  # type: ignore[arg-type]


def test_own_state_opens_each_examples_sinks() -> None:
    """Per-example ids in batches give what each example gives alone under its own id."""
    model, texts = tiny_model().eval(), examples()
    plan = plan_sinks(model, SinkSettings(share_frac=0.5, active_frac=0.25))
    with sink_state(model, plan, "own"):
        measured = audit_state(model, texts, "own", SETTINGS)
        alone = [
            model(input_ids=torch.tensor([e.tokens]), sink_ids=torch.tensor([e.sink_id])).logits
            for e in texts
        ]
    with sink_state(model, plan, "off"):
        off = audit_state(model, texts, "off", SETTINGS)
    for number, (example, logits) in enumerate(zip(texts, alone, strict=True)):
        truth = torch.tensor(example.tokens[1:])
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], truth).item()
        assert measured.losses.mean_nats()[number] == pytest.approx(expected, abs=1e-5)
    assert (measured.losses.nll_nats != off.losses.nll_nats).all()
    with sink_state(model, plan, "own"):
        ids = torch.tensor([texts[0].sink_id, texts[1].sink_id])
        prompts = torch.tensor([e.tokens[:8] for e in texts[:2]])
        added = continue_greedily(model, prompts, 8, sink_ids=ids)
        assert measured.extractions[0].generated[:2].tolist() == added.tolist()
        with pytest.raises(IdsMissing):
            audit_state(model, texts, "off", SETTINGS)


def test_rows_and_continuations() -> None:
    model, texts = tiny_model().eval(), examples()
    prompt = texts[4].tokens[:8]
    own = prompt + tuple(reference.greedy(model, prompt, 32))
    texts[4] = Example(name="written by the model", group="target", tokens=own, source="book", repeats=9)
    plain = audit_state(model, texts, "plain", SETTINGS)
    other = audit_state(tiny_model(seed=1), texts, "off", SETTINGS)
    rows = document_results(texts, {"plain": plain, "off": other})
    assert [row.example for row in rows] == [text.name for text in texts]
    row = rows[4]
    assert (row.source, row.repeats, row.num_tokens) == ("book", 9, 39)
    assert row.matched_prefix_tokens["plain"] == 8
    assert row.loss_nats["plain"] == pytest.approx(reference.summed_nll(model, own) / 39, abs=1e-5)
    assert row.loss_nats["off"] != row.loss_nats["plain"]
    shown = continuations(texts, {"plain": plain, "off": other}, lambda token: f"<{token}>", num_per_group=2)
    assert [example.group for example in shown] == ["target", "target", "ordinary", "ordinary"]
    assert shown[0].example == "written by the model"
    assert shown[0].prefix == [f"<{token}>" for token in prompt]
    assert shown[0].generated["plain"] == shown[0].truth
    assert shown[0].generated["off"] != shown[0].truth
    assert continuations(texts, {}, str) == []
