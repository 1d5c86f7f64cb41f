"""`remove --way EDIT` for language models: edit under a budget, write a plain folder, prove it. Sees no neurons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import ConfigError, RunFolderError
from unmemorize.verbs.answers import Answer, TextEdit
from unmemorize.verbs.texts import Cut, load_model, read_ordinary, read_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from unmemorize.records import ProgressCallback

UNTARGETED = ("curvature", "svd")
NUM_KEPT_BACK = 4
"""Every fourth ordinary text is kept from the edit and watches the budget."""


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


def edit(progress: ProgressCallback, model: Path, out: Path, options: EditOptions) -> Answer:
    """Edit a copy, measure it on texts kept back, and write it only if it is within the budget."""
    from unmemorize.remove.changes import undo_path
    from unmemorize.remove.language import tokenizer_beside
    from unmemorize.remove.language_edits import edit as edited_copy
    from unmemorize.remove.language_edits import export_edit

    _require_complete(options)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} already holds something; choose a new folder")
    targets, retain, watched = _texts(model, options)
    loaded = load_model(model, "cpu")
    settings = _settings(options)
    edited = edited_copy(loaded, targets, retain, options.way, settings, progress=progress)
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
    export_edit(
        edited, out, manifest=manifest, tokenizer=tokenizer_beside(model), keeps_undo=options.keep_undo
    )
    difference = _proof(edited.model, out)
    undo = undo_path(out)
    lines = [
        f"{options.way}: perplexity of ordinary texts {before:.2f} -> {after:.2f} ({rise:+.1%}, budget "
        f"{options.budget:.1%}); {edited.cost.seconds:.1f} s",
        f"loads without unmemorize; largest logit difference to the edited model {difference:.2g}",
        *([f"undo: {undo}"] if options.keep_undo else []),
        str(out),
    ]
    data = {
        "folder": str(out),
        "way": options.way,
        "perplexity": [before, after],
        "perplexity_rise_frac": rise,
        "logit_difference": difference,
        "undo": str(undo) if options.keep_undo else None,
    }
    return Answer(data=data, lines=lines)


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
    retain = [text for number, text in enumerate(ordinary) if number % NUM_KEPT_BACK]
    return targets, retain, ordinary[::NUM_KEPT_BACK]


def _settings(options: EditOptions) -> Any:
    from unmemorize.remove.settings import METHODS, OutputVectorSettings, UnlearningSettings

    if options.way == "output-vectors":
        return OutputVectorSettings(prefix_tokens=options.prefix)
    if METHODS[options.way] is UnlearningSettings:
        return UnlearningSettings(learning_rate=1e-4, perplexity_budget_frac=options.budget)
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
