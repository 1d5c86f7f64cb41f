"""Figures of pictures against literal definitions; verdict sentences from figures alone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference import pictures as reference
from unmemorize.audit.picture_figures import (
    PictureSimilarities,
    Resampling,
    per_prompt,
    similarities_of_state,
    similarity_figures,
)
from unmemorize.audit.picture_verdict import picture_verdict
from unmemorize.audit.statistics import refused
from unmemorize.records import Measure, PictureGroup, PictureState, Similarity

NUM, SEEDS, WIDTH = 14, 4, 6
QUICK = Resampling(num_resamples=200)


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shared = generator.normal(size=(NUM, 1, WIDTH))
    return {
        name: unit(shared + generator.normal(size=(NUM, SEEDS, WIDTH)))
        for name in ("before", "off", "placebo")
    }


@pytest.fixture(scope="module")
def references() -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [unit(generator.normal(size=(number % 3 + (number < 13), WIDTH))) for number in range(NUM)]


def test_figures_equal_their_definition(vectors: dict[str, np.ndarray], references: list[np.ndarray]) -> None:
    """The last prompts include one with a single training picture and one without: 14 prompts, 13 with pictures."""
    references = [*references[:13], references[13][:0]]
    states = {
        name: similarities_of_state(made, references, None if name == "before" else vectors["before"])
        for name, made in vectors.items()
    }
    everyone, threshold = np.ones(NUM, dtype=bool), 0.5
    found = similarity_figures(
        "m",
        states["off"],
        everyone,
        threshold,
        before=states["before"],
        placebo=states["placebo"],
        resampling=QUICK,
    )
    lists = {name: [list(row) for row in made] for name, made in vectors.items()}
    copies = reference.copy_similarity(lists["off"], [list(own) for own in references])
    earlier = reference.copy_similarity(lists["before"], [list(own) for own in references])
    assert len(copies) == 13
    expected = {
        "copy_rate_frac": reference.copy_rate(copies, threshold),
        "copy_rate_per_picture_frac": reference.copy_rate_per_picture(copies, threshold),
        "copy_rate_change_frac": reference.copy_rate(copies, threshold)
        - reference.copy_rate(earlier, threshold),
        "copy_similarity": np.mean([max(row) for row in copies]),
        "typical_copy_similarity": np.mean([np.median(row) for row in copies]),
        "copy_similarity_change": np.mean([max(a) - max(b) for a, b in zip(copies, earlier, strict=True)]),
        "kept_similarity": reference.kept_similarity(lists["off"], lists["before"]),
        "kept_beyond_placebo": reference.kept_similarity(lists["off"], lists["before"])
        - reference.kept_similarity(lists["placebo"], lists["before"]),
        "seed_similarity": reference.seed_similarity(lists["off"]),
    }
    assert 0 < expected["copy_rate_frac"] < 1
    for name, value in expected.items():
        measure = getattr(found, name)
        assert measure.value == pytest.approx(value, abs=1e-6), name
        assert measure.ci95[0] <= measure.value <= measure.ci95[1], name
    assert found.copy_rate_frac is not None and found.copy_rate_frac.method == "wilson"
    assert per_prompt(states, 0)["off"] == pytest.approx(copies[0], abs=1e-6)
    assert per_prompt(states, 13) == {}


def test_the_group_decides_which_prompts_count(
    vectors: dict[str, np.ndarray], references: list[np.ndarray]
) -> None:
    state = similarities_of_state(vectors["before"], references, None)
    half = np.arange(NUM) < 7
    part = similarity_figures("m", state, half, 0.5, resampling=QUICK)
    assert part.seed_similarity.num == 7
    assert part.seed_similarity.value == pytest.approx(state.between_N[:7].mean())
    assert part.kept_similarity is None and part.copy_rate_change_frac is None


def test_too_few_prompts_are_refused_rate_by_rate() -> None:
    state = PictureSimilarities(np.full((4, 3), 0.9), np.full((4, 3), 0.9), np.full(4, 0.5))
    few = similarity_figures("m", state, np.ones(4, dtype=bool), 0.5, before=state, placebo=state)
    for name in ("copy_rate_frac", "copy_rate_per_picture_frac", "copy_rate_change_frac", "copy_similarity"):
        assert "4 " in str(getattr(few, name).refused), name
    assert few.kept_similarity is not None and few.kept_similarity.refused is not None
    single = PictureSimilarities(np.full((20, 1), 0.9), None, np.full(20, np.nan))
    alone = similarity_figures("m", single, np.ones(20, dtype=bool), None)
    assert "diversity needs two" in str(alone.seed_similarity.refused)
    assert alone.copy_rate_frac is not None and "set copy_thresholds" in str(alone.copy_rate_frac.refused)


def rate(value: float, num: int = 40) -> Measure:
    return Measure(value=value, ci95=(max(0, value - 0.1), min(1, value + 0.1)), num=num, method="wilson")


def state(
    name: str,
    copies: Measure | None,
    kept: Measure | None = None,
    beyond: Measure | None = None,
    **more: object,
) -> PictureState:
    def figures(**found: Measure | None) -> list[Similarity]:
        return [Similarity(measure="structure", seed_similarity=rate(0.5), **found)]

    groups = [
        PictureGroup(
            group="target",
            num_prompts=40,
            pictures_per_prompt=10,
            similarities=figures(copy_rate_frac=copies),
        ),
        PictureGroup(
            group="ordinary",
            num_prompts=30,
            pictures_per_prompt=10,
            similarities=figures(kept_similarity=kept, kept_beyond_placebo=beyond),
        ),
    ]
    return PictureState(state=name, label=name, groups=groups, **more)  # type: ignore[arg-type]


def test_the_verdict_says_what_the_figures_say() -> None:
    below = Measure(value=-0.1, ci95=(-0.2, -0.05), num=30, method="bootstrap")
    states = [
        state("before", rate(0.9)),
        state("off", rate(0.1), rate(0.8, 30), below, num_neurons=12),
        state("placebo", rate(0.85), rate(0.9, 30), is_rival=True),
        state("twin", rate(0.0), is_rival=True),
    ]
    assert picture_verdict(states) == (
        "In state 'off' (12 neurons), 10% [0, 20] of 40 target prompts reproduce their training picture, against "
        "90% [80, 100] in state 'before', 85% [75, 95] in state 'placebo' and 0% [0, 10] in state 'twin'; pictures of "
        "30 ordinary prompts keep a similarity of 0.80 [0.70, 0.90] to those before, against 0.90 [0.80, 1.00] with "
        "the placebo (they move further than with the placebo) (measure: structure)."
    )


def test_the_verdict_names_refusals_and_missing_parts() -> None:
    few = refused("4 examples; a rate needs 12")
    lines = picture_verdict([state("before", few), state("off", few, refused("no"))])
    assert "reproduce their training picture is refused (4 examples; a rate needs 12)" in lines
    assert "how far ordinary prompts have moved is refused (no)" in lines
    assert picture_verdict([state("before", None)]) == (
        "In state 'before', the targets have no training picture to compare with."
    )
    assert picture_verdict([state("before", rate(0.5)), state("twin", rate(0.0), is_rival=True)]) == (
        "In state 'before', 50% [40, 60] of 40 target prompts reproduce their training picture, beside 0% [0, 10] in "
        "state 'twin' (measure: structure)."
    )
    chosen = picture_verdict(
        [state("before", rate(0.9)), state("off", rate(0.1)), state("folded", rate(0.2))], headline="folded"
    )
    assert chosen.startswith("In state 'folded', 20%")
