"""Ways of making pictures, and with which settings: the input of an audit of pictures. Knows no architecture.

A `Way` is one way of making pictures: a pipeline, the `with` block that puts it into its state, and what it is called
with. The caller builds ways; an audit runs them, all with the same prompts and seeds.

What this file does not do: switch anything off, or make pictures (`generation.py`). Source: ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import ArrayLike

from unmemorize.audit.pictures import PromptCase
from unmemorize.audit.statistics import NUM_RESAMPLES
from unmemorize.errors import ConfigError
from unmemorize.models.denoising import Pipeline

BEFORE = "before"  # the state of the model as it is
TRAINING = "training"  # the folder of training pictures; no state may have its name


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureAuditSettings:
    """How pictures are made and judged.

    Attributes:
        seeds: one picture per prompt and seed, the same in all states. Never those that localization looked at.
        num_steps: denoising steps.
        guidance: guidance scale, unitless.
        size_px: height and width, pixels; by default the pipeline's own.
        batch_size: pictures per call of the pipeline; halved when memory runs out.
        copy_thresholds: measure -> similarity from which a picture is a copy; overrides every other rule.
        seen_seeds: seeds that localization or tuning has used; refused among `seeds`.
        seed: seed of the bootstrap.
        num_resamples: resamples of the bootstrap.
    """

    seeds: tuple[int, ...] = tuple(range(1000, 1010))
    num_steps: int = 50
    guidance: float = 7.0
    size_px: int | None = None
    batch_size: int = 8
    copy_thresholds: Mapping[str, float] = field(default_factory=dict)
    seen_seeds: tuple[int, ...] = ()
    seed: int = 0
    num_resamples: int = NUM_RESAMPLES

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, value, least in (
            ("num_steps", self.num_steps, 1),
            ("batch_size", self.batch_size, 1),
            ("size_px", 8 if self.size_px is None else self.size_px, 8),
            ("num_resamples", self.num_resamples, 100),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}, expected {least} or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds are {self.seeds}; expected at least one, and none twice")
        both = sorted(set(self.seeds) & set(self.seen_seeds))
        if both:
            raise ConfigError(
                f"seed {both[0]} was already used to find neurons; audit with seeds that nothing was tuned on"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of making pictures.

    Attributes:
        state: its name in records and folders: small letters, digits, `-` and `_`.
        label: what reports call it.
        pipe: the pipeline.
        description: one line for reports.
        is_rival: whether it is something to compare with (a placebo, a twin), not the result itself.
        num_neurons: neurons that are off in it.
        placebo: the state that is its placebo; by default the first one that is a placebo.
        identity: what tells it from another way of the same name with the same weights, such as a digest of the neurons
            that are off: pictures made under another identity, or with other weights, are not reused.
        context: makes the `with` block in which the pipeline is in this state.
        arguments: (prompt, seeds of the batch) -> arguments of the pipeline's call that replace the usual ones, such
            as another `prompt`, or `prompt_embeds` with one row.
        losses: makes the denoising loss of each case's first picture in this state, shape (N,), unitless; NaN where
            there is none. It puts the pipeline into the state itself.
        case_context: case -> a further `with` block for its pictures alone, such as its own neurons off.
    """

    state: str
    label: str
    pipe: Pipeline
    description: str = ""
    is_rival: bool = False
    num_neurons: int = 0
    placebo: str = ""
    identity: str = ""
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    arguments: Callable[[str, tuple[int, ...]], Mapping[str, Any]] | None = None
    losses: Callable[[], ArrayLike] | None = None
    case_context: Callable[[PromptCase], AbstractContextManager[Any]] | None = None

    @property
    def is_by_prompt(self) -> bool:
        """Whether what is done depends on the prompt, so that no call may hold two."""
        return self.arguments is not None or self.case_context is not None


def check_ways(ways: Sequence[Way]) -> None:
    """Refuse states that cannot be compared or stored.

    Raises:
        ConfigError: if the first is not "before", a name occurs twice or does not suit a folder, or a placebo is none
            of them.
    """
    names = [way.state for way in ways]
    if not names or names[0] != BEFORE:
        raise ConfigError(
            f"states are {names}; the first one must be {BEFORE!r}, the model that others are compared with"
        )
    for name in names:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name == TRAINING:
            raise ConfigError(f"state {name!r} does not suit a folder; use small letters, digits, - and _")
        if names.count(name) > 1:
            raise ConfigError(f"state {name!r} occurs twice; give each way its own name")
    for way in ways:
        if way.placebo and way.placebo not in names:
            raise ConfigError(
                f"the placebo of state {way.state!r} is {way.placebo!r}; expected one of {names}"
            )
