"""Language models: from an architecture to its MLP sites, checked when a model is loaded.

Support for an architecture is one row of `ROWS`: where its decoder layers are, which linear layers make the
hidden neurons of an MLP, which one reads them, and the name of the width in the config. Gated MLPs have two of
the first kind, or one that makes both halves. Upstream model code is never subclassed or copied.

`check` proves on a tiny input that a row is right: the sites exist, a gate of ones changes nothing, a gate of
zeros changes something, and a folded gate equals the gate at run time.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError, ModelNotSupported, SelfCheckFailed, SitesNotFound
from unmemorize.gates import is_transposed, module_at, site_width
from unmemorize.models.base import (
    CheckResult,
    fingerprint_of,
    gate_checks,
    quiet_transformers,
    require_match,
    signature_of,
)
from unmemorize.models.weight_files import require_no_pickle, require_there
from unmemorize.neurons import NeuronSet, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpRow:
    """Where the MLPs of an architecture are.

    Attributes:
        layers: dotted path of the list of decoder layers.
        up: paths, inside a layer, of the linear layers whose outputs make the hidden neurons.
        down: path, inside a layer, of the linear layer that reads the hidden neurons.
        width_key: config attribute that holds the number of hidden neurons; "" if the width is fixed.
        is_fused: whether the single `up` layer makes the gate half and the up half, in this order.
    """

    layers: str
    up: tuple[str, ...]
    down: str
    width_key: str
    is_fused: bool = False


_GATED = MlpRow(
    layers="model.layers",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    width_key="intermediate_size",
)
_GPT_NEO = MlpRow(layers="transformer.h", up=("mlp.c_fc",), down="mlp.c_proj", width_key="intermediate_size")

ROWS: dict[str, MlpRow] = {
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3_text": _GATED,
    "gpt2": MlpRow(layers="transformer.h", up=("mlp.c_fc",), down="mlp.c_proj", width_key="n_inner"),
    "gpt_neo": _GPT_NEO,
    "gpt_neox": MlpRow(
        layers="gpt_neox.layers",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        width_key="intermediate_size",
    ),
    "llama": _GATED,
    "mistral": _GATED,
    "olmo2": _GATED,
    "olmo3": _GATED,
    "opt": MlpRow(layers="model.decoder.layers", up=("fc1",), down="fc2", width_key="ffn_dim"),
    "phi3": MlpRow(
        layers="model.layers",
        up=("mlp.gate_up_proj",),
        down="mlp.down_proj",
        width_key="intermediate_size",
        is_fused=True,
    ),
    "qwen2": _GATED,
    "qwen3": _GATED,
    "smollm3": _GATED,
}


@dataclass(frozen=True, slots=True)
class Mlp:
    """One decoder layer's MLP, resolved in a model.

    Attributes:
        layer: the decoder layer.
        up: linear layers that make the hidden neurons.
        down: linear layer that reads them.
        site: its hidden neurons: the input side of `down`.
        up_paths: dotted paths of `up` in the model.
        is_fused: whether `up` is one layer with a gate half and an up half.
    """

    layer: nn.Module
    up: tuple[nn.Module, ...]
    down: nn.Module
    site: Site
    up_paths: tuple[str, ...]
    is_fused: bool


def row_for(model: nn.Module) -> MlpRow:
    """Return the table row of a model's architecture.

    Raises:
        ModelNotSupported: if there is none, or the model is a mixture of experts.
    """
    config = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", type(model).__name__))
    if kind in ROWS:
        return ROWS[kind]
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ModelNotSupported(
            f"{kind} is a mixture of experts: its experts have no hidden neurons of their own to gate; "
            "use a dense model"
        )
    raise ModelNotSupported(
        f"no site table row for model type {kind!r}; known: {', '.join(sorted(ROWS))}; for a dense model pass "
        "row=MlpRow(layers='model.layers', up=('mlp.gate_proj', 'mlp.up_proj'), down='mlp.down_proj', "
        "width_key='intermediate_size') with the names your model uses"
    )


def find_mlps(model: nn.Module, row: MlpRow | None = None) -> tuple[Mlp, ...]:
    """Resolve the MLPs of all decoder layers, in order.

    Raises:
        ModelNotSupported: if no row is given and the table has none.
        SitesNotFound: if the row names modules that the model does not have.
    """
    row = row or row_for(model)
    layers = module_at(model, row.layers)
    mlps: list[Mlp] = []
    for name, layer in layers.named_children():
        prefix = f"{row.layers}.{name}"
        down = module_at(model, f"{prefix}.{row.down}")
        site = Site(f"{prefix}.{row.down}", "in", site_width(down, "in"))
        up_paths = tuple(f"{prefix}.{part}" for part in row.up)
        up = tuple(module_at(model, path) for path in up_paths)
        halves = 2 if row.is_fused else 1
        for path, linear in zip(up_paths, up, strict=True):
            if site_width(linear, "out") != halves * site.width:
                raise SitesNotFound(
                    f"{path} makes {site_width(linear, 'out')} channels, expected {halves * site.width} "
                    f"for the {site.width} neurons of {site.path}; correct the table row"
                )
        mlps.append(Mlp(layer, up, down, site, up_paths, row.is_fused))
    if not mlps:
        raise SitesNotFound(f"{row.layers} holds no decoder layers; correct the table row")
    return tuple(mlps)


def signature(model: nn.Module, row: MlpRow | None = None) -> str:
    """Name an architecture with its widths: "language/llama-1a2b3c4d-*", valid for any of its weights."""
    sites = [mlp.site for mlp in find_mlps(model, row)]
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    return signature_of("language", kind, sites)


def fingerprint(model: nn.Module, row: MlpRow | None = None) -> str:
    """Name a model by architecture and weights; equal weights in equal dtype give equal names anywhere."""
    return fingerprint_of(signature(model, row), model)


def require_same_model(neurons: NeuronSet, model: nn.Module, row: MlpRow | None = None) -> None:
    """Raise `NeuronSetMismatch` unless a neuron set was made for this model."""
    require_match(neurons, signature(model, row), lambda: fingerprint(model, row))


def load(
    source: str | Path,
    *,
    row: MlpRow | None = None,
    dtype: torch.dtype | None = None,
    run_check: bool = True,
) -> PreTrainedModel:
    """Load a causal language model and check its sites.

    Args:
        source: folder or hub name, for `AutoModelForCausalLM.from_pretrained`.
        row: site table row, for an architecture that the table does not know.
        dtype: dtype of the weights; by default the checkpoint's.
        run_check: whether to run `check` and raise if it fails.

    Raises:
        ModelNotSupported: if the folder holds no causal language model, weights are missing or do not fit the config,
            or the table has no row for it.
        SelfCheckFailed: if a check fails.
    """
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model: PreTrainedModel
    info: dict[str, Any]
    require_there(source)
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise ModelNotSupported(f"{source} holds no config.json; pass a model folder in Hugging Face format")
    require_no_pickle(source)
    with quiet_transformers():
        try:
            # Both would be drawn at random and named in a report that is silenced here; below they are refused.
            model, info = loader.from_pretrained(
                str(source),
                dtype=dtype or "auto",
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:  # every reader underneath raises its own kind
            text = str(error).strip().splitlines()
            raise ModelNotSupported(
                f"cannot load {source} as a causal language model: {text[0] if text else type(error).__name__}"
            ) from error
    _require_whole(source, info)
    model.train(False)
    if run_check:
        for result in check(model, row):
            if not result.passed:
                raise SelfCheckFailed(f"self-check {result.name!r} failed for {source}: {result.detail}")
    return model


def _require_whole(source: str | Path, info: Mapping[str, Any]) -> None:
    """Raise `ModelNotSupported` if weights were missing or of another shape, and thus drawn at random."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        raise ModelNotSupported(
            f"{source} lacks {len(missing)} weights of a causal language model ({missing[0]} ...); copy the folder "
            "again, or pass a complete checkpoint"
        )
    if mismatched:
        name, found, expected = mismatched[0]
        raise ModelNotSupported(
            f"{source} holds {name} of shape {tuple(found)}, its config.json says {tuple(expected)}; pass weights and "
            "config of one model"
        )


@torch.no_grad()
def check(model: PreTrainedModel, row: MlpRow | None = None) -> list[CheckResult]:
    """Prove on a tiny input that the table row fits the model.

    Returns:
        The four results of `gate_checks`, on the logits of eight tokens.
    """
    sites = [mlp.site for mlp in find_mlps(model, row)]
    training = model.training
    model.train(False)
    try:
        vocabulary = int(model.config.get_text_config().vocab_size)
        tokens = torch.arange(8, device=model.device).remainder(vocabulary).unsqueeze(0)

        def logits(candidate: nn.Module) -> Tensor:
            output: Tensor = candidate(input_ids=tokens, use_cache=False).logits
            return output.float()

        return gate_checks(model, sites, logits, signature(model, row))
    finally:
        model.train(training)


def resized(
    model: PreTrainedModel, selections: Sequence[Tensor], row: MlpRow | None = None
) -> PreTrainedModel:
    """Return a copy of the model whose MLPs consist of chosen neurons; everything else is equal.

    Args:
        model: left untouched.
        selections: one int64 tensor of shape (new width,) per decoder layer: the old neuron that each new one
            copies, or -1 for a neuron of zeros. All have the same length, since configs know one width.
        row: site table row, for an architecture that the table does not know.

    Raises:
        ConfigError: if the widths differ, or the architecture's width cannot be changed.
    """
    row = row or row_for(model)
    mlps = find_mlps(model, row)
    widths = {len(chosen) for chosen in selections}
    if len(selections) != len(mlps) or len(widths) != 1 or not row.width_key:
        raise ConfigError(
            f"cannot resize {len(mlps)} MLPs to widths {sorted(widths)}: a plain checkpoint has one width for all "
            "layers; fold at equal width instead"
        )
    config = copy.deepcopy(model.config)
    setattr(config, row.width_key, widths.pop())
    weights = dict(model.state_dict())
    for mlp, chosen in zip(mlps, selections, strict=True):
        for path, linear in zip(mlp.up_paths, mlp.up, strict=True):
            both = torch.cat([chosen, torch.where(chosen < 0, chosen, chosen + mlp.site.width)])
            picked = both if mlp.is_fused else chosen
            axis = 1 if is_transposed(linear) else 0
            weights[f"{path}.weight"] = _select(weights[f"{path}.weight"], picked, axis)
            if f"{path}.bias" in weights:
                weights[f"{path}.bias"] = _select(weights[f"{path}.bias"], picked, 0)
        axis = 0 if is_transposed(mlp.down) else 1
        weights[f"{mlp.site.path}.weight"] = _select(weights[f"{mlp.site.path}.weight"], chosen, axis)
    with torch.random.fork_rng(devices=[]):
        smaller = cast("Any", type(model))(config)
    smaller.to(dtype=model.dtype, device=model.device)
    smaller.load_state_dict(weights)
    for (
        name,
        buffer,
    ) in model.named_buffers():  # position tables are not in the state dict and keep their own dtype
        owner, _, leaf = name.rpartition(".")
        module_at(smaller, owner)._buffers[leaf] = buffer.clone()
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return cast("PreTrainedModel", smaller.train(model.training))


def _select(tensor: Tensor, chosen: Tensor, axis: int) -> Tensor:
    chosen = chosen.to(tensor.device)
    picked = tensor.index_select(axis, chosen.clamp(min=0))
    return (
        picked.movedim(axis, 0)
        .masked_fill_((chosen < 0).view(-1, *[1] * (tensor.dim() - 1)), 0)
        .movedim(0, axis)
    )
