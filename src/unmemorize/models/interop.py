"""A neuron set of a language model in the words of other libraries. Plain data; none of them is needed here.

    plain PyTorch     {module path: hook}, a forward pre-hook of that module
    TransformerLens   {"blocks.3.mlp.hook_post": indices}: its hook sits on the input of the MLP's last projection,
                      after gate and up are multiplied, which is our site
    nnsight           {"model.layers[3].mlp.down_proj": indices}: the input of that module is our site

Indices mean the same neurons everywhere, because none of these libraries permutes the hidden neurons of an MLP.

LIMIT: TransformerLens folds layer norms and centres weights by default when it loads a model. That changes no hidden
neuron's activation, but the vectors that neurons write: use `from_pretrained_no_processing` to compare those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from unmemorize.errors import SitesNotFound
from unmemorize.gates import apply_gate, closed
from unmemorize.models.language import MlpRow, find_mlps, require_same_model
from unmemorize.neurons import NeuronSet, Site

Hook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]


def to_hooks(neurons: NeuronSet, *, scale: float = 0.0) -> dict[str, Hook]:
    """Return hooks that multiply the neurons, for use without this library's blocks.

    Args:
        neurons: neurons on the input side of linear layers.
        scale: their factor, unitless.

    Returns:
        Module path -> hook in the form of a forward pre-hook of `nn.Module`.

    Raises:
        SitesNotFound: if a site is on the output side.
    """
    _require_inputs(neurons)
    gates = closed(neurons, scale=scale)

    def hook_with(gate: Tensor, start: int) -> Hook:
        return lambda _, args: (apply_gate(args[0], gate, start), *args[1:])

    return {site.path: hook_with(gate, site.start) for site, gate in gates.items()}


def to_transformer_lens(
    neurons: NeuronSet, model: nn.Module, row: MlpRow | None = None
) -> dict[str, tuple[int, ...]]:
    """Return TransformerLens hook name -> indices.

    Args:
        neurons: neurons of the model.
        model: the Hugging Face model; tells which layer a site belongs to.
        row: site table row, for an architecture that the table does not know.

    Raises:
        NeuronSetMismatch: if the set belongs to another model.
        SitesNotFound: if a site is not the input of an MLP's last projection.
    """
    require_same_model(neurons, model, row)
    layers = {mlp.site: layer for layer, mlp in enumerate(find_mlps(model, row))}
    return {
        f"blocks.{_layer(site, layers)}.mlp.hook_post": chosen for site, chosen in neurons.indices.items()
    }


def to_nnsight(neurons: NeuronSet) -> dict[str, tuple[int, ...]]:
    """Return nnsight path (below the wrapped model) -> indices in the last dimension of that module's `input`.

    Raises:
        SitesNotFound: if a site is on the output side.
    """
    _require_inputs(neurons)
    return {
        re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", site.path): tuple(site.start + index for index in chosen)
        for site, chosen in neurons.indices.items()
    }


def _layer(site: Site, layers: Mapping[Site, int]) -> int:
    if site not in layers:
        raise SitesNotFound(
            f"{site.path} is not the last projection of an MLP of this model; pass a set that was made for it"
        )
    return layers[site]


def _require_inputs(neurons: NeuronSet) -> None:
    for site in neurons.indices:
        if site.side != "in":
            raise SitesNotFound(
                f"{site.path} is a site on the output side; these names exist for hidden neurons of MLPs only"
            )
