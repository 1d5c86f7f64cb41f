"""Texts that the verbs of language models are given: read, encoded, checked. Heavy libraries are imported inside.

A file is a table or list of texts (.jsonl, .csv, .txt) with groups, a set of memorized sequences (.npy, or .jsonl with
`prefix` and `suffix`, or `tokens`), or a run folder that holds `examples.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import ConfigError, DataError
from unmemorize.verbs.answers import Precision
from unmemorize.verbs.devices import dtype_of, on_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from unmemorize.audit.examples import Example
    from unmemorize.corpus.memorized import MemorizedExample

NUM_KEPT_BACK = 4
"""Every fourth ordinary text is kept from choices and edits, and says what they cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where texts are cut, in tokens: what the model is given, what it is to recite, and the most of a text."""

    prefix: int = 32
    suffix: int = 32
    length: int = 256

    def __post_init__(self) -> None:
        if self.prefix < 1 or self.suffix < 1 or self.length < 2:
            raise ConfigError(
                f"prefix, suffix and length are {self.prefix}, {self.suffix} and {self.length} tokens; expected 1 or "
                "more, and a length of 2 or more"
            )


def cut_at(prefix: int, suffix: int, length: int) -> Cut:
    """Return where texts are cut; a length below prefix and suffix together is raised to them.

    Raises:
        ConfigError: if one of them is out of range.
    """
    asked = Cut(prefix=prefix, suffix=suffix, length=length)
    return replace(asked, length=max(length, prefix + suffix))


def load_model(
    model: str | Path, device: str = "auto", precision: Precision | None = None
) -> PreTrainedModel:
    """Load a language model and move it to its device ("auto": the first accelerator, else the CPU)."""
    from unmemorize.models.language import load

    return on_device(load(model, dtype=dtype_of(precision)), device)


def read_texts(path: Path, tokenizer: PreTrainedTokenizerBase, model: str, cut: Cut) -> tuple[Example, ...]:
    """Read examples with their groups; texts without one are targets.

    Raises:
        DataError: if the file cannot be read, a group is unknown, or one text is in two groups.
    """
    from unmemorize.audit.examples import Example, check_examples
    from unmemorize.corpus.memorized import read_memorized
    from unmemorize.corpus.prompts import read_prompts
    from unmemorize.files import read_json_lines
    from unmemorize.tokenizer import encode_documents

    if path.is_dir():
        rows = read_json_lines(path / "examples.jsonl")
    elif _is_sequences(path):
        named = "" if _first_row(path).get("tokenizer") else model
        found = read_memorized(
            path,
            tokenizer=named,
            prefix_tokens=cut.prefix,
            suffix_tokens=cut.suffix,
            encode=lambda text: _plain(tokenizer, text),
        )
        rows = [{"tokens": one.tokens, "name": f"sequence {one.name}"} for one in found.examples]
    else:
        rows = [{"text": one.text, "group": one.group} for one in read_prompts(path)]
    for number, row in enumerate(rows, start=1):
        _require_usable(row, f"{path} row {number}")
    encoded = iter(encode_documents(tokenizer, [r["text"] for r in rows if not r.get("tokens")], cut.length))
    examples = tuple(
        Example(
            name=str(row.get("name", f"example {number}")),
            group=row.get("group", "target"),
            tokens=tuple(row["tokens"][: cut.length]) if row.get("tokens") else next(encoded),
        )
        for number, row in enumerate(rows, start=1)
    )
    check_examples(examples)
    return examples


def _require_usable(row: dict[str, Any], place: str) -> None:
    tokens, text = row.get("tokens"), row.get("text")
    if not tokens and not (isinstance(text, str) and text):
        raise DataError(f"{place} has neither text nor tokens; write one of them in every row")
    is_list = isinstance(tokens, list | tuple)
    if tokens and not (is_list and all(type(token) is int and token >= 0 for token in tokens)):
        raise DataError(f"{place}: tokens is not a list of token ids; expected integers of 0 or more")


def read_ordinary(
    path: Path | None, tokenizer: PreTrainedTokenizerBase, cut: Cut, examples: Sequence[Example]
) -> tuple[tuple[int, ...], ...]:
    """Read ordinary texts, and take those among the examples; none may share a passage with a target.

    Raises:
        DataError: if one shares a passage, or stands among the targets.
    """
    from unmemorize.corpus.passages import require_no_passage
    from unmemorize.corpus.prompts import read_prompts
    from unmemorize.tokenizer import encode_documents

    texts = [] if path is None else [one.text for one in read_prompts(path, group="ordinary")]
    encoded = [
        *encode_documents(tokenizer, texts, cut.length),
        *(example.tokens for example in examples if example.group == "ordinary"),
    ]
    ordinary = tuple(dict.fromkeys(encoded))
    targets = [example.tokens for example in examples if example.group == "target"]
    require_no_passage([decoded(tokenizer, t) for t in targets], [decoded(tokenizer, t) for t in ordinary])
    return ordinary


def divided(
    ordinary: Sequence[tuple[int, ...]],
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Return the ordinary texts that a choice or an edit may see, and every fourth, kept back to say what it cost."""
    seen = tuple(text for number, text in enumerate(ordinary) if number % NUM_KEPT_BACK)
    return seen, tuple(ordinary[::NUM_KEPT_BACK])


def target_cuts(examples: Sequence[Example], cut: Cut, path: Path) -> tuple[MemorizedExample, ...]:
    """Cut the targets into prefix and suffix.

    Raises:
        DataError: if there is no target, or one is too short.
    """
    from unmemorize.corpus.memorized import cut_examples

    targets = [example for example in examples if example.group == "target"]
    if not targets:
        raise DataError(f"{path} names no text of group target; give the texts to look into that group")
    names = [example.name for example in targets]
    return cut_examples([example.tokens for example in targets], cut.prefix, cut.suffix, names=names)


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return tokens as text, special ones left out."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def digest_of(value: Any) -> str:
    """Return sixteen hexadecimal digits that name plain data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    encoded: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]
    return encoded


def _is_sequences(path: Path) -> bool:
    if path.suffix.lower() == ".npy":
        return True
    row = _first_row(path)
    return "tokens" in row or {"prefix", "suffix"} <= set(row)


def _first_row(path: Path) -> dict[str, Any]:
    """Return the first row of a JSON Lines file, or nothing; what is wrong with it, its reader says."""
    from unmemorize.corpus.readers import text_lines
    from unmemorize.files import parse_json

    if not path.is_file() or not path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        return {}
    try:
        row = parse_json(next((line for line in text_lines(path) if line.strip()), "{}"))
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
