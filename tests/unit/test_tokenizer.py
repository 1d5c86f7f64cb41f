"""Tokenizers: training, saving, reloading, encoding, and what cannot be loaded."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unmemorize.errors import ConfigError, DataError
from unmemorize.tokenizer import END, encode_documents, load_tokenizer, train_tokenizer

TEXTS = [f"once upon a time there was cat number {n}, and it sat.\n" for n in range(50)]
STRANGE = ["naïve 日本語 🙂", "\ttabs and  spaces\r\n", "\x01", "x" * 500]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300, folder)
    return folder


def test_every_text_survives_the_way_there_and_back(folder):
    tokenizer = load_tokenizer(folder)
    for text, tokens in zip([*TEXTS, *STRANGE], encode_documents(tokenizer, [*TEXTS, *STRANGE]), strict=True):
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[:-1]) == text


def test_saved_folder_is_a_hugging_face_tokenizer_with_the_same_ids(folder, tmp_path):
    trained = train_tokenizer(TEXTS, 300, tmp_path)
    plain = AutoTokenizer.from_pretrained(str(folder))
    assert len(plain) == 300
    assert (plain.eos_token, plain.pad_token) == (END, END)
    assert plain.get_vocab() == trained.get_vocab()
    ids = encode_documents(trained, TEXTS)
    assert ids == encode_documents(load_tokenizer(folder), TEXTS)
    assert len(ids[0]) < len(TEXTS[0]) // 2  # merges were learned


def test_an_end_token_spelled_out_in_a_document_stays_text(folder):
    tokenizer = load_tokenizer(folder)
    (tokens,) = encode_documents(tokenizer, [f"a {END} b"])
    assert tokens.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens[:-1]) == f"a {END} b"


def test_documents_are_cut_to_a_length(folder):
    tokenizer = load_tokenizer(folder)
    (whole,) = encode_documents(tokenizer, TEXTS[:1])
    assert encode_documents(tokenizer, TEXTS[:1], len(whole)) == [whole]
    assert encode_documents(tokenizer, TEXTS[:1], 5) == [whole[:5]]


def test_what_cannot_be_encoded(folder):
    tokenizer = load_tokenizer(folder)
    with pytest.raises(DataError, match="document 2 has no tokens; drop it"):
        encode_documents(tokenizer, ["a", ""])
    with pytest.raises(ConfigError, match="length_tokens is 1, expected 2 or more"):
        encode_documents(tokenizer, ["a"], 1)


def test_a_vocabulary_must_hold_all_bytes(tmp_path):
    with pytest.raises(ConfigError, match="vocabulary_size is 256, expected 257 or more"):
        train_tokenizer(TEXTS, 256, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    assert len(train_tokenizer(TEXTS, 257, tmp_path / "bytes")) == 257


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    bare.save_pretrained(str(tmp_path))
    with pytest.raises(DataError, match="has no end-of-text token; set eos_token and save it again"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    for source in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DataError, match="cannot load a tokenizer from .*expected a folder") as caught:
            load_tokenizer(source)
        assert "\n" not in str(caught.value)
