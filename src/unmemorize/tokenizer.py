"""Tokenizers: any Hugging Face one, or a small byte-level BPE trained on the training documents.

Documents are encoded as text alone: a special token that is spelled out in a document stays the characters it is made
of, or a text could end itself.
"""

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
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END, pad_token=END
    )
    wrapped.save_pretrained(str(folder))
    return wrapped


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder (`save_pretrained`) or by hub name.

    Raises:
        DataError: if there is none, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # every reader underneath raises its own kind
        text = str(error).strip().splitlines()
        raise DataError(
            f"cannot load a tokenizer from {source} ({text[0] if text else type(error).__name__}); expected a folder "
            "with a saved tokenizer, or a hub name"
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {source} has no end-of-text token; set eos_token and save it again"
        )
    return tokenizer


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length_tokens: int | None = None
) -> list[tuple[int, ...]]:
    """Encode documents, end token included, cut to a length.

    Args:
        tokenizer: with an end-of-text token.
        texts: N documents.
        length_tokens: most tokens per document, at least 2; the end token is kept only where it fits. None cuts
            nothing.

    Returns:
        Token ids of N documents.

    Raises:
        DataError: if a document gives fewer than two tokens, so that nothing could be predicted.
    """
    if length_tokens is not None and length_tokens < 2:
        raise ConfigError(f"length_tokens is {length_tokens}, expected 2 or more")
    encoded: list[tuple[int, ...]] = []
    for number, text in enumerate(texts, start=1):
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        if not plain:
            raise DataError(f"document {number} has no tokens; drop it from the corpus")
        encoded.append((*plain, tokenizer.eos_token_id)[:length_tokens])
    return encoded
