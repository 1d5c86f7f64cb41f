"""A made-up audit of a text-to-image model with its pictures, for looking at and testing reports.

Figures are invented but hang together: the copy rate of each state is that of its similarities. Pictures are drawn
here (coloured waves and a disc), and written by a PNG writer of a few lines. Deterministic: no clock, seeded.
"""

from __future__ import annotations

import math
import random
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from tests.unit.synthetic_audit import measure, rate
from unmemorize.records import (
    Group,
    LocalizedPrompt,
    Measure,
    PictureAudit,
    PictureGroup,
    PicturePrompt,
    PictureState,
    Similarity,
    SiteNeurons,
)

THRESHOLD, GATE = 0.7, 0.428
STATES = {
    "before": ("Before", "the model as it is", False, 0),
    "after": ("Neurons off", "the refined neurons of every target set to zero", False, 10),
    "placebo": ("Placebo", "as many random neurons of the same sites off", False, 10),
    "initial": ("All candidates off", "every candidate neuron before refinement", True, 96),
    "pad-swap": ("End tokens swapped", "no neuron off; padding replaced at run time", True, 0),
    "twin": ("Twin", "the same training without the target pictures", True, 0),
}
COPIES = {
    "target": {
        "before": 0.95,
        "after": 0.04,
        "placebo": 0.93,
        "initial": 0.0,
        "pad-swap": 0.2,
        "twin": 0.0,
    },
    "neighbour": {
        "before": 0.95,
        "after": 0.9,
        "placebo": 0.95,
        "initial": 0.4,
        "pad-swap": 0.2,
        "twin": 0.95,
    },
}
KEPT = {"before": 1.0, "after": 0.95, "placebo": 0.97, "initial": 0.62, "pad-swap": 0.7, "twin": 0.5}
PROMPTS: dict[str, list[str]] = {
    "target": [
        "Living in the Light with Ann Graham Lotz of the amber observatory",
        "The No Limits Business Woman podcast in a lighthouse studio",
        "Classic cars for sale behind the old harbour wall",
        "Rambo 5 and Rocky spin-off, a painted tin box",
        "Mothers influence on her young hippo calf",
        "Design Art Light in Dense Fall Forest with Fog, ultra glossy",
    ],
    "neighbour": [
        "Fitness watch on a marble floor beside a red thread",
        "Wall view of the third railway tunnel",
        "Sony boss confirms the blue parcel",
    ],
    "ordinary": [
        "a photo of a red house",
        "two boats on a quiet lake",
        "a large green tree under the moon",
        "a lamp in a garden of stones",
        "a cat asleep on a river bank",
        "an old bridge in the rain",
    ],
}
WIDTHS_5760 = (320, 320, 640, 640, 1280, 1280, 1280)
PLACES = ("down_blocks.0.attentions.0", "down_blocks.0.attentions.1", "down_blocks.1.attentions.0")
PLACES += ("down_blocks.1.attentions.1", "down_blocks.2.attentions.0", "down_blocks.2.attentions.1")
PLACES += ("mid_block.attentions.0",)


def png(pixels: np.ndarray) -> bytes:
    """An 8-bit RGB PNG file of (height, width, 3) pixels."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(np.uint8))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    )


def scene(key: str, size_px: int, noise: float = 0.0) -> np.ndarray:
    """A picture that depends on its key alone: two colour waves, a ground and a disc."""
    chance = random.Random(key)
    y, x = np.mgrid[0:size_px, 0:size_px] / size_px
    colours = [np.array([chance.uniform(0.1, 0.95) for _ in range(3)]) for _ in range(3)]
    angle, pitch, shift = chance.uniform(0, math.pi), chance.uniform(4, 16), chance.uniform(0, 6)
    wave = 0.5 + 0.5 * np.sin(pitch * (x * math.cos(angle) + y * math.sin(angle)) + shift)
    picture = wave[..., None] * colours[0] + (1 - wave[..., None]) * colours[1]
    centre, radius = (chance.uniform(0.25, 0.75), chance.uniform(0.25, 0.75)), chance.uniform(0.12, 0.3)
    picture[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = colours[2]
    picture[y > chance.uniform(0.7, 0.9)] *= 0.55
    grain = np.random.default_rng(chance.getrandbits(32)).normal(0, noise, picture.shape)
    return np.clip((picture + grain) * 255, 0, 255).astype(np.uint8)


def synthetic_picture_audit(
    folder: Path,
    *,
    num_seeds: int = 10,
    size_px: int = 32,
    widths: Sequence[int] = WIDTHS_5760,
    states: Sequence[str] = tuple(STATES),
    num_prompts: int = 6,
) -> PictureAudit:
    """Write a run folder with `audit.json` and its pictures, and return the audit."""
    prompts = [
        _prompt(folder, group, place, prompt, states, num_seeds, size_px)
        for group in ("target", "neighbour", "ordinary")
        for place, prompt in enumerate(PROMPTS[group][:num_prompts])
    ]
    audit = PictureAudit(
        title="Six photographs out of a small text-to-image model",
        verdict="Switching 10 of 5,760 neurons off takes the copies of target pictures from 95% to 4%, the same number "
        "of random neurons does nothing, and pictures of ordinary prompts change no more than with the placebo.",
        settings={
            "model": "runs/memorized",
            "mode": "fast",
            "num_inference_steps": 50,
            "guidance": 7.0,
            "seeds": list(range(100, 100 + num_seeds)),
            "gate": {"threshold": GATE, "origin": "mean + one standard deviation of 500 captions"},
        },
        environment={"unmemorize": "0.1.0", "diffusers": "0.42.1", "machine": "2 cores, CPU"},
        measures={
            "structure": "correlation of coarse luminance and edges, our own; needs no download",
            "sscd_disc_mixup": "cosine of copy-detection embeddings, 320 pixels",
        },
        copy_thresholds={"structure": THRESHOLD, "sscd_disc_mixup": 0.7},
        states=[_state(name, prompts, num_seeds) for name in states],
        prompts=prompts,
        localized=[_localized(one) for one in prompts],
        gate_threshold=GATE,
        sites=_sites(widths),
        limits=["Six targets: a rate of 0 would still allow 39%.", "One training seed."],
    )
    audit.save(folder / "audit.json")
    return audit


def _prompt(
    folder: Path, group: Group, place: int, prompt: str, states: Sequence[str], num_seeds: int, size_px: int
) -> PicturePrompt:
    chance = random.Random(f"{group}{place}")
    made: dict[str, list[str]] = {}
    similarity: dict[str, list[float]] = {}
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for state in states:
        for seed in range(num_seeds):
            is_copy = group in COPIES and chance.random() < COPIES[group][state]
            changed = state if state != "before" and chance.random() > KEPT[state] else ""
            key = f"{group}{place}" if is_copy else f"{group}{place}/{seed}{changed}"
            path = f"pictures/{state}/{group}{place}-{seed}.png"
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(png(scene(key, size_px, 0.0 if not is_copy else 0.03)))
            made.setdefault(state, []).append(path)
            if group in COPIES:
                value = chance.uniform(0.8, 0.99) if is_copy else chance.uniform(0.02, 0.45)
                similarity.setdefault(state, []).append(round(value, 4))
    training = f"pictures/training/{group}{place}.png" if group in COPIES else ""
    if training:
        (folder / training).parent.mkdir(exist_ok=True)
        (folder / training).write_bytes(png(scene(f"{group}{place}", size_px)))
    return PicturePrompt(prompt=prompt, group=group, picture=training, made=made, copy_similarity=similarity)


def _state(name: str, prompts: Sequence[PicturePrompt], num_seeds: int) -> PictureState:
    label, description, is_rival, num_neurons = STATES[name]
    groups = dict.fromkeys(one.group for one in prompts)
    return PictureState(
        state=name,
        label=label,
        description=description,
        is_rival=is_rival,
        num_neurons=num_neurons,
        seconds=41.5 + len(name),
        groups=[_group(name, [one for one in prompts if one.group == group], num_seeds) for group in groups],
    )


def _group(state: str, prompts: Sequence[PicturePrompt], num_seeds: int) -> PictureGroup:
    count, group = len(prompts), prompts[0].group
    rows = [one.copy_similarity[state] for one in prompts if state in one.copy_similarity]
    copied = [mean(value >= THRESHOLD for value in row) for row in rows]
    kept = KEPT[state] if group == "ordinary" else 0.9 * KEPT[state]
    figures = [
        Similarity(
            measure=name,
            copy_rate_frac=rate(mean(copied), 60) if rows else None,
            copy_similarity=measure(mean(mean(row) for row in rows) - shift, 0.06, count) if rows else None,
            kept_similarity=None if state == "before" else measure(kept - shift, 0.03, count),
            seed_similarity=measure(0.31 + 0.5 * (mean(copied) if rows else 0) - shift, 0.04, count)
            if count >= 5
            else Measure(refused=f"{count} prompts; an interval needs 5", num=count),
        )
        for name, shift in (("structure", 0.0), ("sscd_disc_mixup", 0.05))
    ]
    return PictureGroup(
        group=group,
        num_prompts=count,
        pictures_per_prompt=num_seeds,
        similarities=figures,
        alignment=measure(0.31 - 0.01 * (state != "before"), 0.01, count),
        denoising_loss=measure(0.1042 + 0.01 * (state != "before"), 0.001, count),
        fid=Measure(refused="60 pictures; the distance of two sets needs 2,048", num=60)
        if group == "ordinary"
        else None,
    )


def _localized(one: PicturePrompt) -> LocalizedPrompt:
    chance = random.Random(one.prompt)
    if one.group == "ordinary":
        score = chance.uniform(0.1, 0.4)
        return LocalizedPrompt(
            prompt=one.prompt,
            group=one.group,
            best_pair=round(score, 4),
            is_memorized=False,
            sample_forwards=10,
            seconds=0.4,
        )
    is_replaced = one.group == "neighbour" and chance.random() < 0.5
    reached = chance.uniform(0.45, 0.5) if is_replaced else chance.uniform(0.2, 0.42)
    return LocalizedPrompt(
        prompt=one.prompt,
        group=one.group,
        best_pair=round(chance.uniform(0.55, 0.97), 4),
        is_memorized=True,
        num_initial=chance.randint(10, 60),
        num_refined=chance.randint(1, 6),
        initial_score=round(reached - 0.08, 4),
        refined_score=round(reached, 4),
        threshold=round(reached + 0.004, 4) if is_replaced else GATE,
        is_replaced=is_replaced,
        sample_forwards=chance.randint(120, 460),
        seconds=round(chance.uniform(6, 30), 2),
    )


def _sites(widths: Sequence[int]) -> list[SiteNeurons]:
    chance = random.Random(5)
    sites = []
    for place, width in zip(PLACES, widths, strict=False):
        indices = sorted(chance.sample(range(width), min(width, chance.randint(0, 4))))
        sites.append(
            SiteNeurons(
                path=f"unet.{place}.transformer_blocks.0.attn2.to_v",
                width=width,
                indices=indices,
                num_prompts=[chance.randint(1, 6) for _ in indices],
            )
        )
    return sites
