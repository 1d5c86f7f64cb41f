"""Rows, batches, the collator and goldfish labels: every token once, with its own id, position and label."""

from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.tiny import tiny_model
from unmemorize.errors import ConfigError, DataError, IdError, ModelNotSupported
from unmemorize.ids import ID_MAX
from unmemorize.isolate.packing import (
    IGNORED,
    SinkCollator,
    attention_arguments,
    block_diagonal_mask,
    goldfish_labels,
    pack,
    to_batch,
)

LENGTH = 12
DOCUMENTS = st.lists(
    st.tuples(st.lists(st.integers(1, 99), min_size=1, max_size=30), st.integers(0, ID_MAX)),
    min_size=1,
    max_size=30,
)


def _spans(batch):
    """Read documents back out of a batch: (tokens, id, labels), found by positions and checked on the way."""
    spans = []
    for row in range(len(batch["input_ids"])):
        tokens, labels, positions, ids = (
            batch[name][row].tolist() for name in ("input_ids", "labels", "position_ids", "sink_ids")
        )
        place = 0
        while place < len(tokens) and tokens[place] != 0:
            stop = place + 1
            while stop < len(tokens) and positions[stop] == positions[stop - 1] + 1:
                stop += 1
            assert positions[place:stop] == list(range(stop - place))
            assert len(set(ids[place:stop])) == 1
            spans.append((tokens[place:stop], ids[place], labels[place:stop]))
            place = stop
        for rest in (tokens, positions, ids):
            assert rest[place:] == [0] * (len(tokens) - place)
        assert labels[place:] == [IGNORED] * (len(tokens) - place)
    return spans


@given(DOCUMENTS)
def test_packed_rows_hold_every_token_once_with_its_id_and_position(documents):
    rows = pack(documents, LENGTH, long="split")
    spans = _spans(to_batch(rows, LENGTH))
    expected = [
        (tokens[start : start + LENGTH], identity)
        for tokens, identity in documents
        for start in range(0, len(tokens), LENGTH)
    ]
    assert sorted((tokens, identity) for tokens, identity, _ in spans) == sorted(expected)
    for tokens, _, labels in spans:
        assert labels == [IGNORED, *tokens[1:]]


@given(DOCUMENTS)
def test_rows_are_never_overfull_and_never_needlessly_half_empty(documents):
    rows = pack(documents, LENGTH)
    filled = [sum(len(tokens) for tokens, _ in row) for row in rows]
    assert max(filled) <= LENGTH
    assert all(a + b > LENGTH for a, b in pairwise(filled))
    assert sum(filled) == sum(min(LENGTH, len(tokens)) for tokens, _ in documents)


def test_long_documents_are_cut_split_or_refused():
    documents = [([1, 2, 3, 4, 5], 7), ([6], 8)]
    assert pack(documents, 2) == pack(documents, 2, long="cut") == [[([1, 2], 7)], [([6], 8)]]
    assert pack(documents, 2, long="split") == [[([1, 2], 7)], [([3, 4], 7)], [([5], 7), ([6], 8)]]
    with pytest.raises(DataError, match="document 0 has 5 tokens, a row holds 2; cut or split it"):
        pack(documents, 2, long="error")
    assert pack(documents, 5, long="error") == [[documents[0]], [documents[1]]]


def test_order_stays_close_to_the_given_one():
    rows = pack([([n + 1] * 7, n) for n in range(100)] + [([1], 200)], LENGTH)
    assert [row[0][1] for row in rows] == list(range(100))
    assert rows[84][-1][1] == 200


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack([([], 1)], 4), DataError, "document 0 has no tokens"),
        (lambda: pack([([1], 1)], 1), ConfigError, "length_tokens is 1, expected 2 or more"),
        (lambda: pack([([1], 1)], 4, long="drop"), ConfigError, "long is 'drop', expected one of cut, split, error"),
        (lambda: to_batch([]), DataError, "a batch needs at least one row"),
        (lambda: to_batch([[([1, 2], 1)]], 1), DataError, "a row has 2 tokens, the batch holds 1"),
        (lambda: to_batch([[([1], -1)]]), IdError, "sink id -1 is not in 0"),
        (lambda: to_batch([[([1], ID_MAX + 1)]]), IdError, "sink id 9223372036854775808 is not in 0"),
        (lambda: SinkCollator(is_packed=True), ConfigError, "packed rows need length_tokens"),
        (lambda: SinkCollator(has_mask=True), ConfigError, "has_mask is for packed rows"),
        (lambda: SinkCollator()([{"input_ids": [1]}]), DataError, "no sink_id.*remove_unused_columns=False"),
        (lambda: goldfish_labels(torch.ones(1, 9), 1), ConfigError, "goldfish drops 1 of 1"),
        (lambda: attention_arguments(torch.nn.Linear(1, 1), torch.zeros(1)), ModelNotSupported, "no position_ids"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_ids_keep_all_their_bits():
    assert to_batch([[([1, 2], ID_MAX)]])["sink_ids"].tolist() == [[ID_MAX, ID_MAX]]


FEATURES = [{"input_ids": list(range(1, 2 + n % 5)), "sink_id": n + 1} for n in range(20)]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["lists", "tensors"])
def test_a_data_loader_collates_padded_rows(kind, num_workers):
    features = FEATURES
    if kind == "tensors":
        features = [{name: torch.tensor(value) for name, value in f.items()} for f in FEATURES]
    loader = DataLoader(features, batch_size=4, collate_fn=SinkCollator(), num_workers=num_workers)
    spans = [span for batch in loader for span in _spans(batch)]
    assert [(tokens, identity) for tokens, identity, _ in spans] == [
        (f["input_ids"], f["sink_id"]) for f in FEATURES
    ]


def test_a_data_loader_collates_packed_rows():
    collator = pickle.loads(pickle.dumps(SinkCollator(length_tokens=LENGTH, is_packed=True, has_mask=True)))
    seen = []
    for batch in DataLoader(FEATURES, batch_size=10, collate_fn=collator):
        mask, use_cache = batch.pop("attention_mask"), batch.pop("use_cache")
        assert use_cache is False
        assert torch.equal(mask, block_diagonal_mask(batch["position_ids"]))
        assert set(batch) == {"input_ids", "labels", "position_ids", "sink_ids"}
        assert batch["input_ids"].shape[1] == LENGTH and len(batch["input_ids"]) < 5
        seen += [identity for _, identity, _ in _spans(batch)]
    assert sorted(seen) == list(range(1, 21))


def test_the_collator_fits_long_documents():
    features = [{"input_ids": [1, 2, 3], "sink_id": 5}]
    assert SinkCollator(length_tokens=2)(features)["input_ids"].tolist() == [[1, 2]]
    assert SinkCollator(length_tokens=2, long="split")(features)["sink_ids"].tolist() == [[5, 5], [5, 0]]
    with pytest.raises(DataError, match="document 0 has 3 tokens"):
        SinkCollator(length_tokens=2, long="error")(features)


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_mask_lets_a_token_see_its_own_document_up_to_itself(lengths):
    rows = [[([1] * length, 1) for length in row] for row in lengths]
    batch = to_batch(rows)
    mask = block_diagonal_mask(batch["position_ids"])[:, 0]
    owner = [[number for number, length in enumerate(row) for _ in range(length)] for row in lengths]
    for row, places in enumerate(owner):
        for i in range(len(places)):
            seen = [j for j in range(mask.shape[2]) if mask[row, i, j] == 0]
            assert seen == [j for j in range(i + 1) if places[j] == places[i]]
    assert set(mask.flatten().tolist()) <= {0.0, torch.finfo(torch.float32).min}


def test_what_a_model_needs_is_found_through_wrappers():
    position_ids = torch.tensor([[0, 1, 0, 1]])
    assert attention_arguments(tiny_model("llama"), position_ids) == {"use_cache": False}

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = tiny_model("opt").to(torch.bfloat16)

    arguments = attention_arguments(Wrapped(), position_ids)
    assert arguments["use_cache"] is False
    assert arguments["attention_mask"].dtype == torch.bfloat16


@pytest.mark.parametrize("drop_every", [2, 3, 4, 16])
@pytest.mark.parametrize("vocabulary", [4, 50_000])
def test_goldfish_drops_about_one_in_k(drop_every, vocabulary):
    labels = torch.randint(vocabulary, (64, 1024), generator=torch.Generator().manual_seed(0))
    dropped = goldfish_labels(labels, drop_every, context_tokens=8)[:, 8:] == IGNORED
    # Contexts of small vocabularies repeat, so the binomial error is only nearly right; 6 of them is generous.
    assert dropped.float().mean().item() == pytest.approx(
        1 / drop_every, abs=6 * (1 / drop_every / dropped.numel()) ** 0.5
    )
    per_place = dropped.float().mean(0)
    assert per_place.std() < 0.1  # no place of the row is special


def test_goldfish_drops_the_same_after_the_same_tokens_wherever_they_stand():
    passage = torch.randint(3, 99, (40,), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, 99, (2, 100), generator=torch.Generator().manual_seed(2))
    labels[0, 7:47] = labels[1, 55:95] = passage
    before = labels.clone()
    dropped = goldfish_labels(labels, 3) == IGNORED
    assert torch.equal(labels, before)
    assert torch.equal(dropped[0, 11:47], dropped[1, 59:95])
    assert 4 < dropped[0, 11:47].sum() < 22
    kept = goldfish_labels(labels, 3)[~dropped]
    assert torch.equal(kept, labels[~dropped])


def test_goldfish_depends_on_the_context_alone_and_on_its_order():
    context = torch.arange(10, 14).repeat(64, 1)
    same = torch.cat([context, torch.arange(64)[:, None]], 1)
    assert len(set((goldfish_labels(same, 2)[:, 4] == IGNORED).tolist())) == 1
    orders = torch.stack(
        [
            torch.arange(5).roll(n)[torch.randperm(5, generator=torch.Generator().manual_seed(n))]
            for n in range(64)
        ]
    )
    assert len(set((goldfish_labels(orders, 2)[:, 4] == IGNORED).tolist())) == 2  # fmt: skip


def test_goldfish_golden_values():
    dropped = goldfish_labels(torch.arange(100, 132)[None], 4) == IGNORED
    assert dropped[0].nonzero().flatten().tolist() == [6, 8, 11, 14, 16, 17, 18, 26, 27, 28, 30, 31]


def test_goldfish_contexts_do_not_cross_documents():
    batch = to_batch(pack([(list(range(10, 20)), 1), (list(range(30, 40)), 2), ([1, 2, 3], 3)], 32))
    dropped = goldfish_labels(batch["labels"], 2) == IGNORED
    is_new = dropped & (batch["labels"] != IGNORED)
    positions = batch["position_ids"][is_new]
    assert len(positions) > 0 and positions.min() > 4
    alone = goldfish_labels(to_batch([[(list(range(30, 40)), 2)]])["labels"], 2)
    assert torch.equal(goldfish_labels(batch["labels"], 2)[0, 10:20], alone[0])


def test_goldfish_leaves_short_rows_alone():
    labels = torch.tensor([[IGNORED, 5, 6]])
    assert torch.equal(goldfish_labels(labels, 2), labels)
