"""Tiny language models of every supported family: seeded, random, from their own config classes, made in milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 64
WIDTH = 24
"""Hidden neurons of every layer's MLP."""

_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": {**_COMMON, "head_dim": 8},
    "gemma3_text": {**_COMMON, "head_dim": 8},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_inner": WIDTH,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **_SPECIAL,
    },
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": WIDTH,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
        "resid_dropout": 0.0,
        **_SPECIAL,
    },
    "gpt_neox": _COMMON,
    "llama": _COMMON,
    "mistral": _COMMON,
    "olmo2": _COMMON,
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "ffn_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        **_SPECIAL,
    },
    "phi3": _COMMON,
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 8},
}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a two-layer model of a family, in training mode.

    Biases and the last projections are drawn larger than the families' own initializers draw them, so that an error in
    either moves the logits well above rounding.

    Args:
        family: one of `FAMILIES`, or any model type whose config takes the common names.
        seed: seed of the weights; the global generator is left as it was.
        changes: settings of the config to change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **{**_CONFIGS.get(family, _COMMON), **changes})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.1)
                elif ".layers." in name or ".h." in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def tokens(batch: int = 3, length: int = 10, *, seed: int = 0) -> torch.Tensor:
    """Draw token ids of shape (batch, length) that contain no special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)
