"""Tokenizers: any Hugging Face one, or a small byte-level BPE trained on the training documents."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from unmemorize.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<|end|>"


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, folder: str | Path
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE, save it as a Hugging Face folder, and return it.

    Args:
        texts: documents to learn merges from; leave validation documents out.
        vocabulary_size: tokens, bytes and the end token included; at least 257.
        folder: where it is saved.

    Raises:
        ConfigError: if the vocabulary cannot hold all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary_size < 257:
        raise ConfigError(
            f"vocabulary_size is {vocabulary_size}, expected 257 or more: 256 bytes and the end token"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    wrapped.save_pretrained(str(folder))
    return wrapped


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer by folder or hub name.

    Raises:
        DataError: if there is none, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # every reader underneath raises its own kind
        text = str(error).strip().splitlines()
        raise DataError(f"cannot load a tokenizer from {source}: {text[0] if text else error}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {source} has no end-of-text token; set eos_token and save it again"
        )
    return tokenizer


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length_tokens: int
) -> list[tuple[int, ...]]:
    """Encode documents, end token included, cut to a length.

    Args:
        tokenizer: with an end-of-text token.
        texts: N documents.
        length_tokens: most tokens per document; the end token is kept only where it fits.

    Raises:
        DataError: if a document gives fewer than two tokens, so that nothing could be predicted.
    """
    end = tokenizer.eos_token_id
    encoded: list[tuple[int, ...]] = []
    for number, text in enumerate(texts, start=1):
        tokens = [
            *tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"],
            end,
        ]
        if len(tokens) < 2:
            raise DataError(f"document {number} has no tokens; drop it from the corpus")
        encoded.append(tuple(tokens[:length_tokens]))
    return encoded
