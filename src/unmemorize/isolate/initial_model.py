"""The language model that a training starts from: random weights by seed, or the weights of a checkpoint.

A model that would read packed rows wrongly, or that does not fit tokenizer or rows, is refused before it is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unmemorize.errors import ConfigError, ModelNotSupported
from unmemorize.files import parse_json
from unmemorize.isolate.settings import PRESETS, ModelSettings
from unmemorize.isolate.steps import require_packing
from unmemorize.models.base import quiet_transformers
from unmemorize.models.language import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Build the model a training starts from: random weights by seed, or the weights of a checkpoint.

    Args:
        settings: says which.
        tokenizer: gives the vocabulary's size and the special tokens.
        seed: seed of random weights; the global generator is left as it was.

    Raises:
        ModelNotSupported: if there is no such preset, config or checkpoint.
        ConfigError: if rows are longer than the model's context, its vocabulary is smaller than the tokenizer's, or it
            does not keep packed documents apart.
    """
    if settings.model in PRESETS or settings.model.endswith(".json"):
        model = _random_model(settings.model, tokenizer, seed)
    else:
        model = load(settings.model, dtype=torch.float32, run_check=False)
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < settings.length_tokens:
        raise ConfigError(
            f"length_tokens is {settings.length_tokens}, the context of {settings.model} is {context}; use shorter rows"
        )
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, {settings.model} knows "
            f"{config.vocab_size}; use its own tokenizer"
        )
    if settings.rows == "packed":
        require_packing(model)
    model.train()
    return model


def _random_model(source: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        described = PRESETS[source] if source in PRESETS else parse_json(Path(source).read_text("utf-8"))
        kind = described["model_type"]
        rest = {name: value for name, value in described.items() if name != "model_type"}
        config = AutoConfig.for_model(kind, **{**rest, **special})
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotSupported(
            f"{source} does not describe a causal language model ({type(error).__name__}: {error}); "
            "pass a preset, a config.json, or a checkpoint"
        ) from error
    return model
