"""Removal from language models: fold, excise, export, and proof that the result is an ordinary checkpoint.

Folding zeroes the columns of the last projection that read the removed neurons and keeps every shape. Excising cuts
the neurons out, so that the checkpoint is narrower; configs know one width for all layers, so layers that lose fewer
neurons than others are filled up with neurons of zeros. Both compute what the model computes with the gate closed.

`prove_plain` loads an exported folder in a process that cannot import this library, and returns what it computes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from unmemorize.errors import ConfigError
from unmemorize.files import whole_folder
from unmemorize.gates import closed, folded
from unmemorize.models.base import quiet_transformers
from unmemorize.models.language import (
    MlpRow,
    find_mlps,
    fingerprint,
    require_same_model,
    resized,
)
from unmemorize.neurons import NeuronSet
from unmemorize.remove.folders import in_plain_process, write_manifest
from unmemorize.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def fold(model: PreTrainedModel, neurons: NeuronSet, *, row: MlpRow | None = None) -> PreTrainedModel:
    """Return a copy of the model with a set of neurons zeroed in its weights, all shapes unchanged.

    Raises:
        NeuronSetMismatch: if the set was made for another model.
    """
    require_same_model(neurons, model, row)
    return cast("PreTrainedModel", folded(model, closed(neurons)))


def excise(model: PreTrainedModel, neurons: NeuronSet, *, row: MlpRow | None = None) -> PreTrainedModel:
    """Return a copy of the model without a set of neurons: narrower by the fewest that any layer loses.

    Raises:
        NeuronSetMismatch: if the set was made for another model.
        ConfigError: if nothing would be left, or the architecture's width is fixed.
    """
    require_same_model(neurons, model, row)
    kept: list[Tensor] = []
    for mlp in find_mlps(model, row):
        gone = set(neurons.indices.get(mlp.site, ()))
        kept.append(torch.tensor([i for i in range(mlp.site.width) if i not in gone], dtype=torch.int64))
    width = max(len(chosen) for chosen in kept)
    if width == 0:
        raise ConfigError("excising every neuron leaves no MLP; keep at least one neuron in one layer")
    filled = [torch.cat([chosen, torch.full((width - len(chosen),), -1)]) for chosen in kept]
    return resized(model, filled, row)


def export(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    manifest: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write a model as a plain folder that `AutoModelForCausalLM.from_pretrained` loads; complete or not at all.

    Args:
        model: the model after removal.
        folder: destination; must not exist, or be empty.
        manifest: what was done; stored as `unmemorize.json` with format, version and the weights' fingerprint.
        tokenizer: stored beside the weights if given.

    Raises:
        RunFolderError: if the destination holds something, or cannot be written.
    """
    with whole_folder(folder) as partial:
        with quiet_transformers():
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        write_manifest(partial, manifest, fingerprint(model))
    return Path(folder)


_PLAIN_PROCESS = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
folder, tokens, out = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor(json.loads(tokens))).logits.float()
save_file({"logits": logits}, out)
"""


def prove_plain(folder: str | Path, tokens: Tensor) -> Tensor:
    """Compute logits of an exported folder in a process in which `import unmemorize` fails.

    Args:
        folder: a model folder.
        tokens: token ids, shape (B, T), int64.

    Returns:
        Logits, shape (B, T, vocabulary), float32.

    Raises:
        SelfCheckFailed: if the folder does not load without this library.
    """
    return in_plain_process(_PLAIN_PROCESS, folder, [json.dumps(tokens.tolist())])["logits"]


def tokenizer_beside(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that is stored in a model folder, or None if there is none."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    return load_tokenizer(folder)
