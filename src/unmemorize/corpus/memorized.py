"""Memorized sequences as tokens: a prefix that the model is given and a suffix that it recites. Torch-free.

Public sets come as token ids of one tokenizer: JSON Lines with `prefix` and `suffix` (MemPi's Pile sequences, canary
lists), or NumPy arrays of one row a sequence (the extraction challenge's `*_prefix.npy` and `*_suffix.npy`). Ids mean
nothing under another tokenizer, so every set says which one it belongs to.

Not here: whether a model really recites them (measured where they are used), and tokenizers themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmemorize.corpus.readers import read_rows
from unmemorize.errors import ConfigError, DataError

Encode = Callable[[str], Sequence[int]]
"""Text -> token ids, without special tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorizedExample:
    """A text as the model is given it and as it goes on.

    Attributes:
        prefix: token ids that the model is given, at least one.
        suffix: token ids that follow, at least one.
        name: what reports call it, "" if nothing.
        source: named unit of deletion it belongs to, "" if none.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    name: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        """Check that there is something to give and something to recite."""
        if not self.prefix or not self.suffix:
            raise DataError(
                f"example {self.name!r} has {len(self.prefix)} prefix and {len(self.suffix)} suffix tokens, expected "
                "at least one each; use longer texts"
            )

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prefix and suffix."""
        return self.prefix + self.suffix

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that name the tokens and where the suffix begins."""
        text = f"{' '.join(map(str, self.prefix))}|{' '.join(map(str, self.suffix))}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class MemorizedSet:
    """Examples, and the name or folder of the tokenizer that made their ids."""

    tokenizer: str
    examples: tuple[MemorizedExample, ...]


def cut_examples(
    sequences: Iterable[Sequence[int]],
    prefix_tokens: int,
    suffix_tokens: int,
    *,
    names: Sequence[str] | None = None,
) -> tuple[MemorizedExample, ...]:
    """Cut token sequences into prefix and suffix; what follows is dropped.

    Args:
        sequences: N token sequences.
        prefix_tokens: tokens that the model is given, at least 1.
        suffix_tokens: tokens that it is to recite, at least 1.
        names: N names; by default their numbers, from 0.

    Raises:
        ConfigError: if a length is below 1.
        DataError: if a sequence is shorter than both together.
    """
    if prefix_tokens < 1 or suffix_tokens < 1:
        raise ConfigError(
            f"prefix and suffix are {prefix_tokens} and {suffix_tokens} tokens, expected 1 or more"
        )
    total = prefix_tokens + suffix_tokens
    examples: list[MemorizedExample] = []
    for number, sequence in enumerate(sequences):
        name = names[number] if names is not None else str(number)
        if len(sequence) < total:
            raise DataError(
                f"example {name!r} has {len(sequence)} tokens, expected at least {prefix_tokens} + {suffix_tokens}; "
                "drop it or shorten prefix and suffix"
            )
        row = tuple(int(token) for token in sequence[:total])
        examples.append(MemorizedExample(prefix=row[:prefix_tokens], suffix=row[prefix_tokens:], name=name))
    return tuple(examples)


def read_memorized(
    path: str | Path,
    *,
    tokenizer: str = "",
    suffix_path: str | Path | None = None,
    prefix_tokens: int = 32,
    suffix_tokens: int = 32,
    encode: Encode | None = None,
    limit: int | None = None,
) -> MemorizedSet:
    """Read a set of memorized sequences.

    Args:
        path: JSON Lines (also .gz or .zst) whose rows hold `prefix` and `suffix`, each a list of token ids or a text,
            and optionally `name`, `source` and `tokenizer`; or `tokens` in place of the two. Or a `.npy` array of
            integers, one row a sequence.
        tokenizer: name or folder of the tokenizer that made the ids; may be left out if every row names it.
        suffix_path: second `.npy` array whose rows follow those of the first one.
        prefix_tokens: where `tokens` and single arrays are cut.
        suffix_tokens: how many follow.
        encode: makes ids of texts, with that tokenizer.
        limit: most examples to read.

    Raises:
        DataError: if there is no such file, a row lacks what is needed, ids are not integers or the tokenizer is not
            known or not the same throughout.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        rows = _array_rows(path, suffix_path)
    else:
        rows = read_rows(path, text_column="prefix", source_column=None)
    examples: list[MemorizedExample] = []
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            break
        named = str(row.get("tokenizer") or tokenizer)
        if not named or (tokenizer and named != tokenizer):
            raise DataError(
                f"{path} row {number}: the tokenizer is {named or 'not named'}, expected {tokenizer or 'a name'}; pass "
                "tokenizer= as the set's authors give it"
            )
        tokenizer = named
        examples.append(_example(row, f"{path} row {number}", prefix_tokens, suffix_tokens, encode, number))
    if not examples:
        raise DataError(f"{path} holds no sequences; pass a set with at least one")
    return MemorizedSet(tokenizer, tuple(examples))


def _example(
    row: dict[str, Any],
    place: str,
    prefix_tokens: int,
    suffix_tokens: int,
    encode: Encode | None,
    number: int,
) -> MemorizedExample:
    name, source = str(row.get("name", number)), str(row.get("source", ""))
    if "tokens" in row and "prefix" not in row:
        whole = _ids(row["tokens"], place, "tokens", encode)
        (cut,) = cut_examples([whole], prefix_tokens, suffix_tokens, names=[name])
        return MemorizedExample(prefix=cut.prefix, suffix=cut.suffix, name=name, source=source)
    missing = [key for key in ("prefix", "suffix") if key not in row]
    if missing:
        raise DataError(
            f"{place} has no {missing[0]!r} (it has {', '.join(map(str, row)) or 'nothing'}); expected prefix and "
            "suffix, or tokens"
        )
    prefix, suffix = (_ids(row[key], place, key, encode) for key in ("prefix", "suffix"))
    return MemorizedExample(prefix=prefix, suffix=suffix, name=name, source=source)


def _ids(value: Any, place: str, key: str, encode: Encode | None) -> tuple[int, ...]:
    if isinstance(value, str):
        if encode is None:
            raise DataError(f"{place}: {key} is text; pass encode=, the tokenizer's own function")
        value = list(encode(value))
    is_list = isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)
    if not is_list:
        raise DataError(f"{place}: {key} is not a list of token ids; expected integers of 0 or more")
    return tuple(value)


def _array_rows(path: Path, suffix_path: str | Path | None) -> Iterator[dict[str, Any]]:
    prefix = _array(path)
    if suffix_path is None:
        yield from ({"tokens": row} for row in prefix)
        return
    suffix = _array(Path(suffix_path))
    if len(prefix) != len(suffix):
        raise DataError(
            f"{path} has {len(prefix)} rows and {suffix_path} {len(suffix)}; expected the two halves of one set"
        )
    yield from ({"prefix": head, "suffix": tail} for head, tail in zip(prefix, suffix, strict=True))


def _array(path: Path) -> list[list[int]]:
    import numpy

    try:
        array = numpy.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path} as a NumPy array ({error}); make or copy it again") from error
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise DataError(
            f"{path} holds {array.dtype} of shape {array.shape}; expected integers, one row a sequence"
        )
    rows: list[list[int]] = array.astype(numpy.int64).tolist()
    return rows
