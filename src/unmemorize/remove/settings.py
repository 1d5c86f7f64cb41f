"""Settings of the edits of language models, one frozen dataclass a method, checked when they are made.

Layers are numbered from 0. Where `layers` is None, a method takes the layers that its source took, at the same depth:
the source's models have 32. Defaults are the sources' own unless a setting says "ours".
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from unmemorize.errors import ConfigError
from unmemorize.neurons import NeuronSet
from unmemorize.remove.objectives import Objective
from unmemorize.remove.spectra import require_frac

MatrixKind = Literal["gate", "up", "down"]
KINDS: tuple[MatrixKind, ...] = ("gate", "up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldSettings:
    """Multiply found neurons in the weights."""

    neurons: NeuronSet
    """Which."""
    scale: float = 0.0
    """Their factor, unitless; 0 removes them, 1 changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SvdSettings:
    """Drop the smallest singular values of MLP matrices; sees no text (Merullo et al. 2025, their baseline)."""

    layers: tuple[int, ...] | None = None
    """Decoder layers; by default layer 21 of 32."""
    drop_gate_frac: float = 0.5
    """Share of the singular values of a gate projection, by number."""
    drop_up_frac: float = 0.005
    """The same of an up projection: the only first projection of an MLP without gate."""
    drop_down_frac: float = 0.005
    """The same of a down projection."""

    def __post_init__(self) -> None:
        for kind in KINDS:
            require_frac(f"drop_{kind}_frac", getattr(self, f"drop_{kind}_frac"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvatureSettings:
    """Drop the components that carry little of the curvature on generic text (Merullo et al. 2025)."""

    layers: tuple[int, ...] | None = None
    """Decoder layers; by default layers 23 to 25 of 32."""
    kinds: tuple[MatrixKind, ...] = ("gate", "up")
    """Which matrices of an MLP; kinds that it does not have are skipped."""
    keep_frac: float = 0.6
    """Share of the curvature mass to keep; 1 changes nothing. 0.6 to 0.8 in the source."""
    labels: Literal["sampled", "gold"] = "sampled"
    """Whose gradient: labels drawn from the model (the Fisher matrix) or the text's own (the empirical one)."""
    protect_frac: float = 0.9
    """Share of a protected text's mass to keep (ours)."""
    protect_by: Literal["union", "projection"] = "union"
    """How a protected text is protected; see `spectra.without_low_curvature`."""
    seed: int = 0
    """Seed of the labels."""
    batch_size: int = 8
    """Texts per forward pass; changes speed and memory only."""

    def __post_init__(self) -> None:
        require_frac("keep_frac", self.keep_frac)
        require_frac("protect_frac", self.protect_frac)
        _require_choice("labels", self.labels, ("sampled", "gold"))
        _require_choice("protect_by", self.protect_by, ("union", "projection"))
        for kind in self.kinds:
            _require_choice("kinds", kind, KINDS)
        _require_positive(self, "batch_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class SubnetSettings:
    """Learn which few MLP weights to zero (BalancedSubnet, Sakarvadia et al. 2025)."""

    layers: tuple[int, ...] | None = None
    """Decoder layers; by default all."""
    kinds: tuple[MatrixKind, ...] = KINDS
    """Which matrices of an MLP; a fused gate and up projection counts as one matrix, under both names."""
    drop_frac: float = 0.0015
    """Share of each matrix's weights to zero, rounded down to a whole number; 0 changes nothing."""
    retain_weight: float = 0.7
    """Weight w of the retain loss, 1 - w of the targets'; 0 is Subnet. 0.7 is the setting of Merullo et al."""
    epochs: int = 5
    """Passes over the targets."""
    learning_rate: float = 0.3
    """Of SGD on the scores; 0.1 to 0.3 in the source."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """Of SGD."""
    prefix_tokens: int = 0
    """Tokens of each target that are given and not counted in its loss."""
    batch_size: int = 8
    """Targets per step, and retained texts beside them."""
    seed: int = 0
    """Seed of the scores and of the order."""

    def __post_init__(self) -> None:
        require_frac("drop_frac", self.drop_frac)
        require_frac("retain_weight", self.retain_weight)
        for kind in self.kinds:
            _require_choice("kinds", kind, KINDS)
        _require_positive(self, "batch_size", "learning_rate")
        _require_at_least_0(self, "epochs", "prefix_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputVectorSettings:
    """Change a few neurons' output vectors so that one suffix token loses to a distractor.

    Ours, after an idea of arXiv 2606.18767, of which we have read a description and not the algorithm.
    """

    layers: tuple[int, ...] | None = None
    """Decoder layers whose neurons may be chosen; by default all."""
    prefix_tokens: int = 32
    """Where a target's suffix starts."""
    num_neurons: int = 16
    """Neurons that are changed for a target, over all layers."""
    position: Literal["first", "weakest"] = "first"
    """Which suffix token is made to lose: the first, or the one that wins by the smallest margin."""
    margin_nats: float = 1.0
    """By how much the distractor's logit has to win."""
    locality: float = 1.0
    """How much more it costs to change the output at retained positions than to change weights; 0 ignores them."""
    max_change_frac: float = 2.0
    """Largest norm of the change, as a share of the norm of the chosen neurons' output vectors; 0 changes nothing."""
    batch_size: int = 8
    """Retained texts per forward pass."""

    def __post_init__(self) -> None:
        _require_choice("position", self.position, ("first", "weakest"))
        _require_positive(self, "prefix_tokens", "num_neurons", "batch_size")
        _require_at_least_0(self, "margin_nats", "locality", "max_change_frac")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlearningSettings:
    """Fine-tune the whole model away from the targets: gradient ascent, gradient difference, NPO or SimNPO.

    AdamW at a constant learning rate, dropout off; learning rate, epochs and weights as open-unlearning documents them.
    """

    learning_rate: float = 1e-5
    """Of AdamW; made for models of billions of parameters, small ones need 1e-4 to 1e-3."""
    epochs: int = 10
    """Passes over the targets; 0 changes nothing."""
    batch_size: int = 32
    """Targets per step, and retained texts beside them."""
    micro_size: int = 8
    """Texts per forward pass; changes speed and memory only (gradients are added up)."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Largest norm of the gradient (ours)."""
    forget_weight: float | None = None
    """gamma; by default 1, for simnpo 0.125."""
    retain_weight: float = 1.0
    """alpha; gradient-ascent has none."""
    beta: float | None = None
    """By default 0.1 per nat, for simnpo 4.5."""
    delta: float = 0.0
    """simnpo's margin, nats per token."""
    prefix_tokens: int = 0
    """Tokens of each target that are given and not unlearned."""
    mlp_only: bool = False
    """Whether only MLP matrices may change."""
    perplexity_budget_frac: float | None = 0.1
    """Stop, and go back to the last weights within it, when the perplexity of retained texts that are not trained on
    has risen by this share; None never stops (ours)."""
    num_check: int = 32
    """Retained texts that are kept back for the budget, at most a quarter of all (ours)."""
    check_every_steps: int = 1
    """Steps between two looks at the budget (ours)."""
    seed: int = 0
    """Seed of the order."""

    def __post_init__(self) -> None:
        _require_positive(self, "learning_rate", "batch_size", "micro_size", "clip_norm", "num_check")
        _require_positive(self, "check_every_steps")
        _require_at_least_0(self, "epochs", "weight_decay", "retain_weight", "prefix_tokens")
        if self.perplexity_budget_frac is not None:
            _require_at_least_0(self, "perplexity_budget_frac")
        for name in ("beta", "forget_weight"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}, expected above 0")

    def forget_weight_of(self, objective: Objective) -> float:
        """Return gamma."""
        return self.forget_weight or (0.125 if objective == "simnpo" else 1.0)

    def beta_of(self, objective: Objective) -> float:
        """Return beta."""
        return self.beta or (4.5 if objective == "simnpo" else 0.1)


EditSettings = (
    FoldSettings
    | SvdSettings
    | CurvatureSettings
    | SubnetSettings
    | OutputVectorSettings
    | UnlearningSettings
)

METHODS: dict[str, type] = {
    "fold": FoldSettings,
    "svd": SvdSettings,
    "curvature": CurvatureSettings,
    "subnet": SubnetSettings,
    "output-vectors": OutputVectorSettings,
    "gradient-ascent": UnlearningSettings,
    "gradient-difference": UnlearningSettings,
    "npo": UnlearningSettings,
    "simnpo": UnlearningSettings,
}
"""Method → its settings."""


def settings_for(method: str, settings: EditSettings | None) -> EditSettings:
    """Return a method's settings, its defaults if none are given.

    Raises:
        ConfigError: if the method is unknown, or the settings are those of another one.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown edit {method!r}; expected one of {', '.join(METHODS)}")
    kind = METHODS[method]
    if settings is None and kind is FoldSettings:
        raise ConfigError("fold needs neurons; pass FoldSettings(neurons=...)")
    if settings is not None and not isinstance(settings, kind):
        raise ConfigError(f"{method} takes {kind.__name__}, not {type(settings).__name__}")
    chosen: EditSettings = kind() if settings is None else settings
    return chosen


def settings_to_json(settings: EditSettings) -> dict[str, Any]:
    """Return plain lists, dicts, strings and numbers; neurons as their number and model."""
    value = {item.name: getattr(settings, item.name) for item in fields(settings)}
    if isinstance(settings, FoldSettings):
        neurons = settings.neurons
        value["neurons"] = {"model_id": neurons.model_id, "num_neurons": len(neurons)}
        plain: dict[str, Any] = value
    else:
        plain = asdict(settings)
    result: dict[str, Any] = json.loads(json.dumps(plain))
    return result


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def _require_positive(settings: Any, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) > 0:
            raise ConfigError(f"{name} is {getattr(settings, name)}, expected above 0")


def _require_at_least_0(settings: Any, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) >= 0:
            raise ConfigError(f"{name} is {getattr(settings, name)}, expected 0 or more")
