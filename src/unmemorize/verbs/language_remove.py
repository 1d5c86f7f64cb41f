"""`remove --way EDIT` for language models: edit under a budget, write a plain folder, prove it. Sees no neurons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import ConfigError, RunFolderError
from unmemorize.verbs.answers import Answer, TextEdit
from unmemorize.verbs.texts import NUM_KEPT_BACK, Cut, decoded, divided, load_model, read_ordinary, read_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from unmemorize.records import ProgressCallback

UNTARGETED = ("curvature", "svd")
LEARNING_RATE = 1e-4
"""Step size of unlearning unless one is given; that of small models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditOptions:
    """Options of an edit; the verb says what they mean."""

    way: TextEdit
    examples: Path | None
    ordinary: Path | None
    budget: float
    keep_undo: bool
    prefix: int = 32
    length: int = 256
    protect: Path | None = None
    learning_rate: float | None = None


def edit(progress: ProgressCallback, model: Path, out: Path, options: EditOptions) -> Answer:
    """Edit a copy, measure it on texts kept back, and write it only if it is within the budget."""
    from unmemorize.remove.changes import undo_path
    from unmemorize.remove.folders import kept_if_proved
    from unmemorize.remove.language import tokenizer_beside
    from unmemorize.remove.language_edits import edit as edited_copy
    from unmemorize.remove.language_edits import export_edit

    _require_complete(options)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} already holds something; choose a new folder")
    targets, retain, watched = _texts(model, options)
    protect = _protected(model, options, targets, watched)
    loaded = load_model(model, "cpu")
    edited = edited_copy(
        loaded, targets, retain, options.way, _settings(options), protect=protect, progress=progress
    )
    before, after = (_perplexity(one, watched) for one in (loaded, edited.model))
    rise = after / before - 1
    if not rise <= options.budget:
        raise ConfigError(
            f"no edit by {options.way} within the budget: perplexity of ordinary texts rises by {rise:.1%} "
            f"({before:.2f} to {after:.2f}), budget {options.budget:.1%}; raise --budget or choose another --way"
        )
    if not edited.undo:
        raise ConfigError(
            f"{options.way} changed nothing within a budget of {options.budget:.1%}; raise --budget or choose another "
            "--way"
        )
    manifest = {"budget_frac": options.budget, "perplexity_rise_frac": rise, "num_targets": len(targets)}
    if protect is not None:
        manifest["num_protected"] = len(protect)
    export_edit(
        edited, out, manifest=manifest, tokenizer=tokenizer_beside(model), keeps_undo=options.keep_undo
    )
    with kept_if_proved(out, undo_path(out) if options.keep_undo else None):
        difference = _proof(edited.model, out)
    data = {
        "folder": str(out),
        "way": options.way,
        "num_protected": 0 if protect is None else len(protect),
        "perplexity": [before, after],
        "perplexity_rise_frac": rise,
        "logit_difference": difference,
        "undo": str(undo_path(out)) if options.keep_undo else None,
    }
    return Answer(data=data, lines=_lines(data, options, edited.cost.seconds))


def _lines(data: dict[str, Any], options: EditOptions, seconds: float) -> list[str]:
    before, after = data["perplexity"]
    protected = f", {data['num_protected']} texts protected" if data["num_protected"] else ""
    return [
        f"{options.way}: perplexity of ordinary texts {before:.2f} -> {after:.2f} "
        f"({data['perplexity_rise_frac']:+.1%}, budget {options.budget:.1%}){protected}; {seconds:.1f} s",
        f"loads without unmemorize; largest logit difference to the edited model {data['logit_difference']:.2g}",
        *([f"undo: {data['undo']}"] if options.keep_undo else []),
        data["folder"],
    ]


def _require_complete(options: EditOptions) -> None:
    if not 0 <= options.budget <= 1:
        raise ConfigError(f"budget is {options.budget}, expected a rise of perplexity from 0 to 1")
    if options.ordinary is None:
        raise ConfigError("an edit needs --ordinary FILE: texts that it keeps, and that watch the budget")
    if options.examples is None and options.way not in UNTARGETED:
        raise ConfigError(f"{options.way} needs --examples FILE: the texts that are to go")


def _texts(model: Path, options: EditOptions) -> tuple[Any, Any, Any]:
    """Return targets, texts for the edit, and texts kept back."""
    from unmemorize.errors import DataError
    from unmemorize.tokenizer import load_tokenizer

    tokenizer, cut = load_tokenizer(model), Cut(length=options.length)
    texts = () if options.examples is None else read_texts(options.examples, tokenizer, str(model), cut)
    ordinary = read_ordinary(options.ordinary, tokenizer, cut, texts)
    if len(ordinary) < NUM_KEPT_BACK:
        raise DataError(f"{len(ordinary)} ordinary texts; an edit needs {NUM_KEPT_BACK} or more")
    targets = [one.tokens for one in texts if one.group == "target"]
    if not targets and options.way not in UNTARGETED:
        raise DataError(
            f"{options.examples} names no text of group target; give the texts to remove that group"
        )
    return targets, *divided(ordinary)


def _protected(
    model: Path, options: EditOptions, targets: Sequence[Sequence[int]], watched: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...] | None:
    """Read texts of an ability that should stay; None if no file was given.

    Raises:
        DataError: if one shares a passage with a target, or stands among those that watch the budget.
    """
    if options.protect is None:
        return None
    from unmemorize.corpus.passages import shared_passages
    from unmemorize.corpus.prompts import read_prompts
    from unmemorize.errors import DataError
    from unmemorize.tokenizer import encode_documents, load_tokenizer

    tokenizer = load_tokenizer(model)
    texts = [one.text for one in read_prompts(options.protect)]
    protect = tuple(dict.fromkeys(encode_documents(tokenizer, texts, options.length)))
    shared = next(shared_passages([decoded(tokenizer, t) for t in targets], texts), None)
    if shared is not None:
        number, owner, passage = shared
        raise DataError(
            f"text {number + 1} of {options.protect} shares {passage[:60]!r} with target {owner + 1}; what is "
            "protected stays, take it out of one"
        )
    both = len(set(protect) & set(watched))
    if both:
        raise DataError(
            f"{both} texts of {options.protect} stand among the ordinary texts that watch the budget, and would make "
            "it look kept; protect other texts"
        )
    return protect


def _settings(options: EditOptions) -> Any:
    from unmemorize.remove.settings import METHODS, OutputVectorSettings, UnlearningSettings

    if options.way == "output-vectors":
        return OutputVectorSettings(prefix_tokens=options.prefix)
    if METHODS[options.way] is UnlearningSettings:
        rate = LEARNING_RATE if options.learning_rate is None else options.learning_rate
        return UnlearningSettings(learning_rate=rate, perplexity_budget_frac=options.budget)
    return None


def _perplexity(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> float:
    import math

    from unmemorize.audit.language import document_losses

    found = document_losses(model, texts)
    return math.exp(min(700.0, found.nll_nats.sum() / found.num_tokens.sum()))


def _proof(model: PreTrainedModel, out: Path) -> float:
    import torch

    from unmemorize.remove.language import prove_plain

    tokens = torch.arange(32).remainder(int(model.config.get_text_config().vocab_size)).unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits.float()
    return float((prove_plain(out, tokens) - expected).abs().max())
