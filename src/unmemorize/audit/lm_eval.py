"""A folder of lm-evaluation-harness tasks made from one's own examples, for `lm_eval --include_path FOLDER`.

For each group of examples (target, neighbour, heldout, ordinary) that occurs there are two tasks, and all of them carry
one tag, so that `--tasks NAME` runs them together:

    NAME_<group>_verbatim    greedy continuation of a prefix: `exact`, `matched_prefix_frac`, `equal_frac`
    NAME_<group>_suffix      log-likelihood of the suffix: `acc` (every token is the most likely one), `nats_per_token`

The folder needs nothing of this library: YAML, one JSON Lines file a group, and one Python file of scores. It holds the
texts; treat it like them.

The harness passes text, not tokens, and encodes it again. Examples whose prefix and suffix would then be other tokens
are left out and counted, so that a score of 1 means what it means in our own audit. `matched_prefix_frac` is in
characters of the suffix here, because the harness gives scores no tokenizer. Tokenizers that put a token before every
text (add_special_tokens) let the model see one token more than our audit does.

Not done: sampling, several prefixes an example, chat templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unmemorize.audit.examples import GROUPS, Example, check_examples
from unmemorize.errors import ConfigError, DataError, RunFolderError
from unmemorize.files import write_atomic, write_json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORES_FILE = "scores.py"

_SCORES = '''"""Scores of verbatim continuation for this folder's tasks. Written by unmemorize; needs nothing of it."""


def verbatim(doc, results):
    """Compare one greedy continuation with the true suffix, character by character.

    White space at the start is left out of both: some tokenizers lose it when a continuation is decoded alone.
    """
    truth, said = doc["suffix"].lstrip(), results[0].lstrip()
    said = said[: len(truth)]
    matched = 0
    while matched < len(said) and said[matched] == truth[matched]:
        matched += 1
    equal = sum(a == b for a, b in zip(said, truth))
    return {
        "exact": float(said == truth),
        "matched_prefix_frac": matched / len(truth),
        "equal_frac": equal / len(truth),
    }


def suffix(doc, results):
    """Score the log-likelihood of the true suffix."""
    log_likelihood, is_greedy = results[0]
    return {"acc": float(is_greedy), "nats_per_token": -log_likelihood / doc["num_suffix_tokens"]}
'''


@dataclass(frozen=True, slots=True)
class HarnessTasks:
    """What was written.

    Attributes:
        folder: pass it as `--include_path`.
        tag: pass it as `--tasks`; runs every task.
        tasks: names of the tasks.
        num_examples: group → examples in its tasks.
        num_excluded: group → examples that are too short, or would be encoded into other tokens.
    """

    folder: Path
    tag: str
    tasks: tuple[str, ...]
    num_examples: dict[str, int]
    num_excluded: dict[str, int]


def write_harness_tasks(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    name: str,
    prefix_tokens: int = 32,
    suffix_tokens: int = 32,
) -> HarnessTasks:
    """Write a task folder; every file appears complete.

    Args:
        examples: what to ask; groups become tasks.
        tokenizer: of the model that will be evaluated.
        folder: made if missing; must be empty.
        name: start of every task's name: letters, digits and underscores.
        prefix_tokens: tokens that are given, at least 1.
        suffix_tokens: tokens to be continued, at least 1.

    Raises:
        ConfigError: if the name or a length cannot be used.
        DataError: if no example is left, or examples contradict each other.
        RunFolderError: if the folder holds something, or cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise ConfigError(f"task name {name!r} cannot be used; expected letters, digits and underscores")
    if prefix_tokens < 1 or suffix_tokens < 1:
        raise ConfigError(f"lengths are ({prefix_tokens}, {suffix_tokens}), expected 1 token or more each")
    check_examples(examples)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} already holds something; choose a new folder or empty it")
    rows: dict[str, list[dict[str, object]]] = {}
    excluded: dict[str, int] = {}
    for group in GROUPS:
        members = [example for example in examples if example.group == group]
        found = [_row(example, tokenizer, prefix_tokens, suffix_tokens) for example in members]
        usable = [row for row in found if row is not None]
        if members:
            excluded[group] = len(members) - len(usable)
        if usable:
            rows[group] = usable
    if not rows:
        raise DataError(
            f"no example keeps its {prefix_tokens} + {suffix_tokens} tokens when its text is encoded again; "
            "use the tokenizer that made them, or shorter lengths"
        )
    tasks: list[str] = []
    for kept, documents in rows.items():
        data = write_json_lines(folder / f"{kept}.jsonl", documents)
        for kind, text in _tasks(name, kept, data, suffix_tokens).items():
            write_atomic(folder / f"{name}_{kept}_{kind}.yaml", text)
            tasks.append(f"{name}_{kept}_{kind}")
    write_atomic(folder / SCORES_FILE, _SCORES)
    return HarnessTasks(folder, name, tuple(tasks), {g: len(d) for g, d in rows.items()}, excluded)


def _row(
    example: Example, tokenizer: PreTrainedTokenizerBase, prefix_tokens: int, suffix_tokens: int
) -> dict[str, object] | None:
    """Give an example as the harness needs it; None if it would be encoded into other tokens."""
    tokens = list(example.tokens[: prefix_tokens + suffix_tokens])
    if len(tokens) < prefix_tokens + suffix_tokens:
        return None
    prefix, whole = _decoded(tokenizer, tokens[:prefix_tokens]), _decoded(tokenizer, tokens)
    if not whole.startswith(prefix) or len(whole) == len(prefix) or whole[len(prefix) :].isspace():
        return None
    if _encoded(tokenizer, prefix) != tokens[:prefix_tokens] or _encoded(tokenizer, whole) != tokens:
        return None
    if (
        prefix != prefix.rstrip()
    ):  # the harness moves white space at the end of a prompt into the continuation
        return None
    return {
        "name": example.name,
        "prefix": prefix,
        "suffix": whole[len(prefix) :],
        "num_suffix_tokens": suffix_tokens,
    }


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _tasks(name: str, group: str, data: Path, suffix_tokens: int) -> dict[str, str]:
    """Write the two tasks of a group as YAML; strings are JSON, which YAML reads as they are."""
    head = f"""# Written by unmemorize from {group} examples. The path below is absolute: edit it if the folder moves.
tag: {json.dumps(name)}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(data.resolve()))}
test_split: test
doc_to_text: "{{{{prefix}}}}"
doc_to_target: "{{{{suffix}}}}"
target_delimiter: ""
metadata:
  version: 1.0
"""
    verbatim = f"""task: {json.dumps(f"{name}_{group}_verbatim")}
{head}output_type: generate_until
process_results: !function scores.verbatim
generation_kwargs:
  until: []
  do_sample: false
  temperature: 0.0
  max_gen_toks: {suffix_tokens}
metric_list:
{_metric("exact")}{_metric("matched_prefix_frac")}{_metric("equal_frac")}"""
    suffix = f"""task: {json.dumps(f"{name}_{group}_suffix")}
{head}output_type: loglikelihood
process_results: !function scores.suffix
metric_list:
{_metric("acc")}{_metric("nats_per_token", is_higher_better=False)}"""
    return {"verbatim": verbatim, "suffix": suffix}


def _metric(name: str, *, is_higher_better: bool = True) -> str:
    return (
        f"  - metric: {name}\n    aggregation: mean\n    higher_is_better: {str(is_higher_better).lower()}\n"
    )
