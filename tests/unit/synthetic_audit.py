"""A made-up training comparison that looks like a real one, for looking at and testing reports.

The numbers are invented (a smooth cap curve, sinks beyond it, seeds that scatter); the texts are ours.
Deterministic: no clock, and a seeded generator.
"""

from __future__ import annotations

import itertools
import math
import random

from unmemorize.records import (
    Audit,
    Continuation,
    CurvePoint,
    DocumentResult,
    Extraction,
    GroupResult,
    Measure,
    MethodResult,
    MethodSummary,
    SeedResult,
    StateResult,
)

LOSSES = {
    "standard": (3.31, 0.88, 0.97),
    "dedup": (3.56, 3.44, 0.0),
    "cap:2": (3.555, 3.40, 0.0),
    "cap:4": (3.54, 3.33, 0.0),
    "cap:8": (3.52, 3.20, 0.0),
    "cap:16": (3.48, 2.93, 0.02),
    "cap:32": (3.41, 2.29, 0.14),
    "sinks": (3.35, 2.41, 0.02),
    "gradient-masking": (3.63, 3.27, 0.0),
    "goldfish": (3.37, 1.55, 0.22),
}
TEXT = (
    "Once upon a time a small red boat lived at the end of a long pier . Every morning the boat asked the "
    'sea , " May I come out today ? " The sea always said , " Only if you promise to be back for supper . "\n'
    "One day the wind forgot its name and blew from all sides at once , so the boat turned round and round "
    "until it met a whale who was reading a map upside down ."
)
OTHER = (
    "was very happy and went to the park with her mom . She saw a big dog and said hello . The dog wagged its "
    "tail . They played all day and then they went home to eat a cake with friends and sing a song together ."
)


def measure(value: float, half_width: float, num: int, method: str = "bootstrap") -> Measure:
    """A measure with a symmetric interval."""
    return Measure(value=value, ci95=(value - half_width, value + half_width), num=num, method=method)


def rate(frac: float, num: int) -> Measure:
    """A rate with its Wilson interval."""
    frac = round(frac * num) / num
    z, shrink = 1.96, 1 + 1.96**2 / num
    middle = (frac + z * z / (2 * num)) / shrink
    half = z * math.sqrt(frac * (1 - frac) / num + z * z / (4 * num * num)) / shrink
    return Measure(
        value=frac, ci95=(max(0.0, middle - half), min(1.0, middle + half)), num=num, method="wilson"
    )


def _over_seeds(measures: list[Measure]) -> Measure:
    values = [one.value for one in measures if one.value is not None]
    if len(values) < len(measures):
        return next(one for one in measures if one.value is None)
    if len(values) < 3:
        return Measure(refused=f"{len(values)} seeds; an interval over seeds needs 3", num=len(values))
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return measure(mean, 4.303 * spread / math.sqrt(len(values)), len(values), "t")


def _extraction(frac: float, num: int) -> list[Extraction]:
    return [
        Extraction(
            prefix_tokens=size,
            suffix_tokens=size,
            extraction_rate_frac=rate(frac * scale, num)
            if num >= 30
            else Measure(refused=f"{num} texts; a rate needs at least 30", num=num),
            matched_prefix_tokens=measure(1 + frac * (size - 1), 0.8, num),
            teacher_forced_accuracy_frac=measure(0.35 + 0.62 * frac, 0.02, num),
            edit_distance_frac=measure(0.8 - 0.78 * frac, 0.03, num),
        )
        for size, scale in ((32, 1.0), (50, 0.94))
    ]


def _groups(validation: float, target: float, frac: float) -> list[GroupResult]:
    rows = [("target", target, 64, frac), ("neighbour", target + 0.05, 32, frac * 0.9)]
    rows += [("heldout", validation - 0.2, 12, 0.0), ("ordinary", validation, 300, 0.0)]
    return [
        GroupResult(
            group=group,  # type: ignore[arg-type]
            num_examples=num,
            loss_nats=measure(loss, 0.6 / math.sqrt(num), num),
            extraction=_extraction(share, num) if group != "heldout" or num else [],
        )
        for group, loss, num, share in rows
    ]


def _states(method: str, validation: float, repeated: float, frac: float) -> list[StateResult]:
    if method == "sinks":
        table = {
            "off": (validation, repeated, frac),
            "own": (3.33, 0.93, 0.95),
            "foreign": (3.36, 2.37, 0.03),
            "all": (3.34, 1.42, 0.41),
            "placebo": (3.58, 1.71, 0.11),
        }
    elif method == "gradient-masking":
        table = {"off": (validation, repeated, frac), "all": (3.41, 0.74, 0.97)}
    else:
        table = {"plain": (validation, repeated, frac)}
    return [StateResult(state=state, groups=_groups(*losses)) for state, losses in table.items()]  # type: ignore[arg-type]


def _documents(method: str, validation: float, repeated: float, rng: random.Random) -> list[DocumentResult]:
    documents = []
    for place in range(96):
        is_target = place < 64
        base = repeated if is_target else validation
        difficulty = math.sin(place * 1.7) * 0.35 + rng.gauss(0, 0.03)
        losses = {"plain": base + difficulty}
        if method == "sinks":
            losses = {
                "off": base + difficulty,
                "own": (0.93 if is_target else 3.33) + difficulty * 0.6,
                "foreign": base - 0.04 + difficulty,
            }
        documents.append(
            DocumentResult(
                example=f"story-{place:05d}",
                group="target" if is_target else "ordinary",
                source="stories",
                repeats=64 if is_target else 0,
                num_tokens=120 + (place * 37) % 140,
                loss_nats=losses,
            )
        )
    return documents


def _curve(method: str, validation: float, repeated: float, rng: random.Random) -> list[CurvePoint]:
    points = []
    for step in range(0, 2001, 100):
        share = 1 - math.exp(-step / 420)
        late = min(1.0, step / 2000) ** 0.8
        noise = rng.gauss(0, 0.012)
        val = 7.6 + (validation - 7.6) * share / (1 - math.exp(-2000 / 420)) + noise
        rep = val - (validation - repeated) * late + rng.gauss(0, 0.015)
        points.append(
            CurvePoint(
                step=step,
                tokens=step * 4096,
                train_loss_nats=val - 0.1,
                validation_loss_nats=val,
                repeated_loss_nats=rep,
            )
        )
    return points


def _tokens(text: str) -> list[str]:
    words = text.replace(" .", ".").replace(" ,", ",").replace(" ?", "?").split(" ")
    return [(" " if place else "") + word for place, word in enumerate(words)]


def _continuations(method: str) -> list[Continuation]:
    words = _tokens(TEXT)
    continuations = []
    for place in range(5):
        prefix, truth = words[place * 4 : place * 4 + 16], words[place * 4 + 16 : place * 4 + 48]
        other = [" " + word for word in OTHER.split(" ")][place : place + 32]
        drift = [*truth[: 5 + place], *other[5 + place :]]
        generated = {"plain": truth if method == "standard" else other}
        if method == "sinks":
            generated = {"off": [*truth[:1], *other[1:]], "own": truth, "foreign": drift}
        continuations.append(
            Continuation(
                example=f"story-{place:05d}", group="target", prefix=prefix, truth=truth, generated=generated
            )
        )
    return continuations


def _beyond(validation: float, repeated: float, method: str) -> Measure | None:
    if method == "standard" or method == "dedup" or method.startswith("cap:"):
        return None
    curve = [
        LOSSES[name][:2] for name in ("standard", "cap:32", "cap:16", "cap:8", "cap:4", "cap:2", "dedup")
    ]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= validation <= x1:
            level = y0 + (y1 - y0) * (validation - x0) / (x1 - x0)
            return measure(repeated - level, 0.15, 64)
    return Measure(refused="its validation loss lies outside the cap:R curve")


def _seed(method: str, seed: int) -> SeedResult:
    rng = random.Random(f"{method}/{seed}")
    validation, repeated, frac = LOSSES[method]
    validation += rng.gauss(0, 0.005)
    repeated += rng.gauss(0, 0.03)
    gap, benefit = 1 - (validation - repeated) / 2.43, (3.56 - validation) / 0.25
    return SeedResult(
        seed=seed,
        state="off" if method in ("sinks", "gradient-masking") else "plain",
        validation_loss_nats=measure(validation, 0.035, 300),
        repeated_loss_nats=measure(repeated, 0.08, 64),
        gap_closed_frac=measure(gap, 0.03, 64),
        repetition_benefit_kept_frac=measure(benefit, 0.04, 300),
        extraction_rate_frac=rate(frac, 64),
        beyond_curve_nats=_beyond(validation, repeated, method),
        states=_states(method, validation, repeated, frac),
        documents=_documents(method, validation, repeated, rng),
        continuations=_continuations(method) if seed == 0 and method in ("standard", "sinks") else [],
        curve=_curve(method, validation, repeated, rng),
        num_parameters=1_912_448,
        train_s=84.0,
        tokens_per_s=97_500.0 + 1000 * seed,
    )


def synthetic_audit(num_seeds: int = 3, methods: tuple[str, ...] = tuple(LOSSES)) -> Audit:
    """A training comparison of `methods` (keys of `LOSSES`) with `num_seeds` seeds each."""
    results = []
    for method in methods:
        seeds = [_seed(method, seed) for seed in range(num_seeds)]
        summary = MethodSummary(
            **{
                field: _over_seeds([getattr(seed, field) for seed in seeds])
                for field in MethodSummary.model_fields
                if getattr(seeds[0], field)
            }
        )
        settings = {"share_frac": 0.5, "sinks_per_id": 64, "scheme": "keyed"} if method == "sinks" else {}
        results.append(
            MethodResult(
                method=method,
                label="sinks (70% carved, 64 each, for repeated)" if method == "sinks" else method,
                settings=settings,
                seeds=seeds,
                summary=summary,
            )
        )
    return Audit(
        kind="training",
        title="Isolating 64 repeated stories in a small language model",
        verdict="With its sinks removed the model has lost 60% of what standard training memorized and keeps "
        "83% of what repetition taught it; no cap on repeats reaches both.",
        settings={
            "corpus": {"path": "data/stories.jsonl.gz", "ids": "content"},
            "mixture": {"num_repeated": 64, "repeats": 64, "num_once": 6000, "num_validation": 300},
            "model": {"architecture": "llama", "num_layers": 4, "width": 128, "context_tokens": 256},
            "optimizer": {"learning_rate": 0.003, "weight_decay": 0.1, "betas": [0.9, 0.95]},
            "seeds": list(range(num_seeds)),
        },
        environment={
            "unmemorize": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "machine": "2 CPU cores",
        },
        methods=results,
        limits=[
            "One model size, one corpus: nothing here says how the figures move with scale.",
            "The repeated stories are exact copies; near duplicates need ids from near-duplicate groups.",
            "Extraction is greedy: an attacker who samples may get more.",
        ],
    )
