"""Neurons of a language model, found and switched off: the records of `localization.json` and `audit.json`.

A state is one way of running the model: as it is (before), with the neurons off (after), with as many random ones off
(placebo), and further models where given (mended, twin).
"""

from __future__ import annotations

from typing import Any, Literal

from unmemorize.records.base import Measure, Record, StoredRecord
from unmemorize.records.pictures import SiteNeurons
from unmemorize.records.training import Continuation, GroupResult

NeuronSelection = Literal["per-layer", "global"]
"""Whether every layer gives its own share of neurons, or all layers compete."""


class LocalizedMethod(Record):
    """One localizer: what it chose and what that cost.

    `forward_equivalents` counts passes of one example, `neurons_per_layer` the chosen ones, in order of the layers.
    """

    method: str
    num_neurons: int
    neurons_per_layer: list[int]
    forward_equivalents: float
    seconds: float


class Agreement(Record):
    """How far the sets of two localizers agree: shared neurons divided by all, and what chance would give."""

    first: str
    second: str
    jaccard_frac: float
    by_chance_frac: float


class NeuronSearch(Record):
    """Few neurons along a method's ranking with which off no text keeps more than `leave_frac` of its likelihood.

    A likelihood is the geometric mean probability of a suffix token, 0 to 1: `likelihood_before_frac` and
    `likelihood_after_frac` over all texts searched on, `left_frac` the largest ratio of after to before of one text.
    `forward_equivalents` counts passes of one example, `num_sets` the sets of neurons that were switched off.
    """

    method: str
    leave_frac: float
    left_frac: float
    num_texts: int
    likelihood_before_frac: float
    likelihood_after_frac: float
    num_neurons: int
    neurons_per_layer: list[int]
    num_sets: int
    forward_equivalents: float
    seconds: float


class TextLocalization(StoredRecord):
    """The whole of a language model's `localization.json`.

    `neurons.json` is the set of the first method, or that of `search` if there was one. `share_frac` is that of every
    layer, or of all layers together where `selection` is "global"; `skipped_layers` give none. `length_tokens` is where
    longer texts were cut. `compared` has digests of the ordinary texts that a method compared with; an audit leaves
    them out.
    """

    format: Literal["unmemorize.text_localization"] = "unmemorize.text_localization"
    format_version: Literal[1] = 1
    model_id: str
    method: str
    share_frac: float
    selection: NeuronSelection = "per-layer"
    skipped_layers: list[int] = []
    prefix_tokens: int
    suffix_tokens: int
    length_tokens: int
    num_targets: int
    num_memorized: int
    extraction_rate_frac: Measure
    methods: list[LocalizedMethod]
    agreement: list[Agreement] = []
    search: NeuronSearch | None = None
    compared: list[str] = []


class NeuronState(Record):
    """All groups in one state; `ordinary_perplexity` is exp(nats / predicted tokens) of the ordinary texts."""

    state: str
    label: str
    description: str = ""
    num_neurons: int = 0
    groups: list[GroupResult]
    ordinary_perplexity: Measure


class DeletionPoint(Record):
    """The model with the best share off, by one method: what targets and ordinary text lose.

    The share is that of every layer, or of all layers together, as localization selected.
    """

    method: str
    share_frac: float
    num_neurons: int
    extraction_rate_frac: Measure
    target_loss_nats: Measure
    ordinary_perplexity: Measure


class NeuronAudit(StoredRecord):
    """The whole of `audit.json` of a language model's neurons."""

    format: Literal["unmemorize.audit"] = "unmemorize.audit"
    format_version: Literal[1] = 1
    kind: Literal["neurons"] = "neurons"
    family: Literal["language"] = "language"
    title: str
    verdict: str
    settings: dict[str, Any]
    environment: dict[str, str]
    states: list[NeuronState]
    continuations: list[Continuation] = []
    sites: list[SiteNeurons] = []
    localized: list[LocalizedMethod] = []
    agreement: list[Agreement] = []
    curve: list[DeletionPoint] = []
    limits: list[str] = []
