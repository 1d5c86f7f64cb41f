"""Generation with a KV cache computes what uncached forwards compute, in every state and family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import FAMILIES, tiny_model, tokens
from unmemorize.errors import ShapeMismatch
from unmemorize.isolate.language import plan_sinks, sink_state, training_sinks
from unmemorize.isolate.plan import SinkSettings

PROMPT = tokens(2, 6)
IDS = torch.tensor([5, 9])
NUM_NEW = 6
STATES = ("off", "own", "foreign", "all")


def uncached(model: Any, num_new: int = NUM_NEW) -> tuple[Tensor, Tensor]:
    """Greedy tokens (B, num_new) and their logits (B, num_new, V), one whole forward per token."""
    text, kept = PROMPT, []
    for _ in range(num_new):
        logits = model(input_ids=text, use_cache=False).logits[:, -1]
        kept.append(logits)
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    return text[:, PROMPT.shape[1] :], torch.stack(kept, dim=1)


def generate(model: Any, prompt: Tensor = PROMPT, **settings: Any) -> tuple[Tensor, Tensor]:
    output = model.generate(
        prompt,
        attention_mask=settings.pop("attention_mask", torch.ones_like(prompt)),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **{"eos_token_id": -1, "pad_token_id": 0, "use_cache": True, **settings},
    )
    return output.sequences[:, prompt.shape[1] :], torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_equals_uncached_in_every_state(family: str) -> None:
    model = tiny_model(family).eval()
    plan = plan_sinks(model, SinkSettings(share_frac=0.25))
    seen: list[Tensor] = []
    for state in STATES:
        for exclude in ((), (5,)):
            with sink_state(model, plan, state, ids=IDS, exclude=exclude):
                expected_tokens, expected = uncached(model)
                found_tokens, found = generate(model)
            assert torch.equal(found_tokens, expected_tokens)
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
            if not exclude:
                seen.append(expected)
    assert all(not torch.allclose(seen[a], seen[b], atol=1e-5) for a in range(4) for b in range(a))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_left_padding_keeps_each_row_with_its_id(family: str) -> None:
    model = tiny_model(family).eval()
    plan = plan_sinks(model, SinkSettings(share_frac=0.25))
    short = PROMPT[1:, 2:]
    with sink_state(model, plan, "own", ids=IDS[1:]):
        alone_tokens, alone = generate(model, short)
    padded = PROMPT.clone()
    padded[1, :2] = 0
    with sink_state(model, plan, "own", ids=IDS):
        both_tokens, both = generate(model, padded, attention_mask=(padded != 0).long())
    assert torch.equal(both_tokens[1:], alone_tokens)
    torch.testing.assert_close(both[1:], alone, atol=2e-6, rtol=0)


@torch.no_grad()
def test_a_training_block_in_evaluation_mode_generates_with_the_pool_off() -> None:
    model = tiny_model("llama").eval()
    plan = plan_sinks(model, SinkSettings(share_frac=0.25))
    with sink_state(model, plan, "off"):
        expected = generate(model)
    for compute in ("masked", "gathered"):
        with training_sinks(model, plan, compute=compute):
            found = generate(model)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], atol=2e-6, rtol=0)


@torch.no_grad()
def test_one_id_serves_all_beams_and_other_shapes_are_refused() -> None:
    model = tiny_model("llama").eval()
    plan = plan_sinks(model, SinkSettings(share_frac=0.25))
    with sink_state(model, plan, "own", ids=IDS[:1]):
        assert model.generate(PROMPT[:1], max_new_tokens=3, num_beams=2, do_sample=False).shape[0] == 1
    with sink_state(model, plan, "own", ids=IDS.view(2, 1).expand(2, 6)):
        with pytest.raises(
            ShapeMismatch, match=r"sink ids of shape \(2, 6\) do not fit tokens of shape \(2, 1\)"
        ):
            generate(model)
    with (
        sink_state(model, plan, "own", ids=IDS),
        pytest.raises(ShapeMismatch, match=r"do not fit tokens of shape \(4"),
    ):
        model.generate(PROMPT, max_new_tokens=3, num_beams=2, do_sample=False)
