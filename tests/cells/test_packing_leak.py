"""Documents in a packed row do not see each other: not by one bit forward, not by one bit in the gradient.

Every family is held to this with the arguments that `attention_arguments` gives it, and shown to leak without them, so
that the test would notice if a family changed sides.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.tiny import FAMILIES, tiny_model
from unmemorize.isolate.packing import IGNORED, SinkCollator, attention_arguments, pack, to_batch

LENGTHS = (9, 7, 12, 5, 11, 1, 16)
DOCUMENTS = [
    (torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(length)).tolist(), length)
    for length in LENGTHS
]
PLACES = [(0, 0, 9), (0, 9, 16), (0, 16, 28), (1, 0, 5), (1, 5, 16), (0, 28, 29), (1, 16, 32)]
"""Row, start and stop of every document in the batch."""


def _batch():
    batch = to_batch(pack(DOCUMENTS, 32), 32)
    for (row, start, stop), (tokens, identity) in zip(PLACES, DOCUMENTS, strict=True):
        assert batch["input_ids"][row, start:stop].tolist() == tokens
        assert set(batch["sink_ids"][row, start:stop].tolist()) == {identity}
    return batch


def _logits(model, batch, **arguments):
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **arguments).logits


def _perturbed(batch, number):
    """Change every token of one document."""
    row, start, stop = PLACES[number]
    tokens = batch["input_ids"].clone()
    tokens[row, start:stop] = (tokens[row, start:stop] - 3 + 1) % 61 + 3
    return {**batch, "input_ids": tokens}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_document_does_not_move_the_others_by_one_bit(family):
    model, batch = tiny_model(family).eval(), _batch()
    arguments = attention_arguments(model, batch["position_ids"])
    with torch.no_grad():
        before = _logits(model, batch, **arguments)
        for number in (0, 1, 3, 4):
            after = _logits(model, _perturbed(batch, number), **arguments)
            for other, (row, start, stop) in enumerate(PLACES):
                is_same = torch.equal(before[row, start:stop], after[row, start:stop])
                assert is_same == (other != number), f"document {other} after a change of document {number}"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_stay_within_the_document(family):
    model, batch = tiny_model(family), _batch()
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    for number in (1, 4):
        logits = model(
            inputs_embeds=embedded,
            position_ids=batch["position_ids"],
            **attention_arguments(model, batch["position_ids"]),
        ).logits
        row, start, stop = PLACES[number]
        loss = cross_entropy(logits[row, start : stop - 1], batch["labels"][row, start + 1 : stop])
        (gradient,) = torch.autograd.grad(loss, embedded)
        assert (gradient[row, start : stop - 1] != 0).any(-1).all()
        gradient[row, start:stop] = 0
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_unpacked(family):
    model, batch = tiny_model(family).eval(), _batch()
    padded = to_batch([[document] for document in DOCUMENTS])
    with torch.no_grad():
        packed = _logits(model, batch, **attention_arguments(model, batch["position_ids"]))
        own_rows = _logits(model, padded)  # no arguments: padding on the right needs none
        for number, (row, start, stop) in enumerate(PLACES):
            alone = model(input_ids=torch.tensor([DOCUMENTS[number][0]])).logits[0]
            assert (packed[row, start:stop] - alone).abs().max() < 1e-5
            assert (own_rows[number, : stop - start] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_arguments_documents_do_see_each_other(family):
    model, batch = tiny_model(family).eval(), _batch()
    row, start, stop = PLACES[1]
    for arguments, leaks in (({}, True), ({"use_cache": False}, family == "opt")):
        with torch.no_grad():
            before = _logits(model, batch, **arguments)[row, start:stop]
            after = _logits(model, _perturbed(batch, 0), **arguments)[row, start:stop]
        assert torch.equal(before, after) != leaks


@pytest.mark.parametrize(
    ("family", "has_mask"), [("llama", False), ("gpt2", False), ("gpt2", True), ("opt", True)]
)
def test_a_collated_batch_goes_into_the_model_as_it_is(family, has_mask):
    model = tiny_model(family).eval()
    features = [{"input_ids": tokens, "sink_id": identity} for tokens, identity in DOCUMENTS]
    losses = {}
    for name, collator in {
        "packed": SinkCollator(length_tokens=32, is_packed=True, has_mask=has_mask),
        "padded": SinkCollator(),
    }.items():
        batch = collator(features)
        batch.pop("sink_ids")
        assert (batch["labels"] != IGNORED).sum() == sum(LENGTHS) - len(LENGTHS)
        with torch.no_grad():
            losses[name] = model(**batch).loss
    assert losses["packed"] == pytest.approx(losses["padded"].item(), abs=1e-5)


def test_the_trainer_takes_packed_batches(tmp_path):
    from transformers import Trainer, TrainingArguments

    seen = []
    model = tiny_model("llama")
    model.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(named.pop("sink_ids")) or (arguments, named),
        with_kwargs=True,
    )
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, remove_unused_columns=False, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    features = [{"input_ids": tokens, "sink_id": identity} for tokens, identity in DOCUMENTS]
    collator = SinkCollator(length_tokens=32, is_packed=True)
    Trainer(model=model, args=settings, train_dataset=features, data_collator=collator).train()
    assert set(torch.cat([ids.flatten() for ids in seen]).tolist()) == {0, *LENGTHS}
