"""The audit of text-to-image models: what prompts reproduce, in every state, and which neurons hold it.

A state is one way of making pictures: the model as it is, neurons off, a placebo, a rival, a twin. Similarities are
unitless, 1 for equal pictures; each comes from a named measure (docs/metrics.md).
"""

from __future__ import annotations

from typing import Any, Literal

from unmemorize.records.base import Group, Measure, Record, StoredRecord


class Similarity(Record):
    """Figures of one similarity measure for one group of prompts in one state.

    `copy_rate_frac` and `copy_similarity` compare with the training picture, each prompt by its best seed, and are
    absent where no training picture is known; `copy_rate_per_picture_frac` counts pictures instead of prompts,
    `typical_copy_similarity` takes each prompt's median seed; `kept_similarity` compares with the picture of the same
    seed in state "before" and is absent there; `seed_similarity` compares the pictures of one prompt with each other:
    lower is more diverse. Changes are this state minus state "before", `kept_beyond_placebo` is this state minus the
    placebo; both are paired by prompt.
    """

    measure: str
    copy_rate_frac: Measure | None = None
    copy_rate_per_picture_frac: Measure | None = None
    copy_rate_change_frac: Measure | None = None
    copy_similarity: Measure | None = None
    typical_copy_similarity: Measure | None = None
    copy_similarity_change: Measure | None = None
    kept_similarity: Measure | None = None
    kept_beyond_placebo: Measure | None = None
    seed_similarity: Measure


class PictureGroup(Record):
    """One group of prompts in one state; `alignment` is the similarity of prompt and picture, unitless.

    `denoising_loss` is the mean squared error of the denoiser's prediction on the group's pictures with their captions,
    unitless; in a run on pictures that of group ordinary is the validation loss, that of target the repeated loss.
    Changes are this state minus state "before", paired by prompt.
    """

    group: Group
    num_prompts: int
    pictures_per_prompt: int
    similarities: list[Similarity]
    alignment: Measure | None = None
    alignment_change: Measure | None = None
    denoising_loss: Measure | None = None
    denoising_loss_change: Measure | None = None
    fid: Measure | None = None
    kid: Measure | None = None


class PictureState(Record):
    """All groups in one state. `is_rival`: what the result has to be compared with, not the result itself."""

    state: str
    label: str
    description: str = ""
    is_rival: bool = False
    num_neurons: int = 0
    seconds: float = 0.0
    groups: list[PictureGroup]


class PicturePrompt(Record):
    """One prompt: its training picture and what each state made of it; `name` tells rows apart that share a prompt.

    `picture` and the values of `made` are paths inside the run folder, PNG, one per seed; `copy_similarity` holds one
    value per seed by the audit's first measure.
    """

    prompt: str
    group: Group
    name: str = ""
    picture: str = ""
    made: dict[str, list[str]] = {}
    copy_similarity: dict[str, list[float]] = {}


class LocalizedPrompt(Record):
    """What localization found for one prompt and what that cost (see `localize.results.PromptResult`)."""

    prompt: str
    group: Group
    best_pair: float
    is_memorized: bool
    num_initial: int = 0
    num_refined: int = 0
    initial_score: float = 0.0
    refined_score: float = 0.0
    threshold: float = 0.0
    is_replaced: bool = False
    sample_forwards: int = 0
    seconds: float = 0.0


class SiteNeurons(Record):
    """The neurons chosen at one site, and for each how many prompts it was found for (0 where that is not known)."""

    path: str
    width: int
    indices: list[int] = []
    num_prompts: list[int] = []


class PictureAudit(StoredRecord):
    """The whole of `audit.json` of a text-to-image model. `measures` maps each measure's name to what it is."""

    format: Literal["unmemorize.audit"] = "unmemorize.audit"
    format_version: Literal[1] = 1
    kind: Literal["pictures"] = "pictures"
    family: Literal["diffusion"] = "diffusion"
    title: str
    verdict: str
    settings: dict[str, Any]
    environment: dict[str, str]
    measures: dict[str, str]
    copy_thresholds: dict[str, float] = {}
    states: list[PictureState]
    prompts: list[PicturePrompt]
    localized: list[LocalizedPrompt] = []
    gate_threshold: float | None = None
    sites: list[SiteNeurons] = []
    limits: list[str] = []
