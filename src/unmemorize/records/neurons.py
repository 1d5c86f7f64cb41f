"""Neurons of a language model, found and switched off: the records of `localization.json` and `audit.json`.

A state is one way of running the model: as it is (before), with the neurons off (after), with as many random ones off
(placebo), and further models where given (mended, twin).
"""

from __future__ import annotations

from typing import Any, Literal

from unmemorize.records.base import Measure, Record, StoredRecord
from unmemorize.records.pictures import SiteNeurons
from unmemorize.records.training import Continuation, GroupResult


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


class TextLocalization(StoredRecord):
    """The whole of a language model's `localization.json`. The first method is the one whose set is `neurons.json`.

    `length_tokens` is where longer texts were cut.
    """

    format: Literal["unmemorize.text_localization"] = "unmemorize.text_localization"
    format_version: Literal[1] = 1
    model_id: str
    method: str
    share_frac: float
    prefix_tokens: int
    suffix_tokens: int
    length_tokens: int
    num_targets: int
    num_memorized: int
    extraction_rate_frac: Measure
    methods: list[LocalizedMethod]
    agreement: list[Agreement] = []


class NeuronState(Record):
    """All groups in one state; `ordinary_perplexity` is exp(nats / predicted tokens) of the ordinary texts."""

    state: str
    label: str
    description: str = ""
    num_neurons: int = 0
    groups: list[GroupResult]
    ordinary_perplexity: Measure


class DeletionPoint(Record):
    """The model with the best share of every layer off, by one method: what targets and ordinary text lose."""

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
