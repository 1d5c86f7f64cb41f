"""Attacking pictures with an optimized text embedding, by budget and start, and what targets have beyond controls.

Used by `nemo_robustness.py` and `attack_testbed.py`. Each attack is one line of a file and is made once. Source:
arXiv 2507.16880 (Adam 0.1, batch 8; starts from the own prompt, from noise and from another prompt); controls are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmemorize.audit.attacks import AttackSettings, retrieve
from unmemorize.audit.pictures import Picture, read_picture, resized
from unmemorize.audit.similarity import SimilarityMeasure
from unmemorize.audit.statistics import bootstrap_mean, percentile_measure, refused, wilson
from unmemorize.corpus.prompts import Prompt
from unmemorize.files import append_json_line, read_json_lines
from unmemorize.models.prompts import require_embeddings
from unmemorize.records import Measure, Progress

SEEDS = (1000, 1001, 1002, 1003)
STARTS = ("own prompt", "Gaussian", "other prompt")
COPY = 0.7  # similarity from which the literature calls a picture a copy under SSCD


def attack_all(
    pipe: Any,
    attacked: Sequence[tuple[str, Prompt]],
    path: Path,
    similar: SimilarityMeasure,
    *,
    budgets: Sequence[int],
    other: str,
    num_steps: int,
    guidance: float,
    size_px: int | None,
    tell: Any,
) -> list[dict[str, Any]]:
    """Attack the picture of each (kind, prompt) from every start with every budget; lines that are there are kept."""
    require_embeddings(pipe)
    rows = read_json_lines(path) if path.is_file() else []
    done = {(row["prompt"], row["kind"], row["start"], row["num_steps"]) for row in rows}
    size_px = size_px or int(pipe.unet.config.sample_size * pipe.vae_scale_factor)
    jobs = [(*one, start, budget) for one in attacked for start in STARTS for budget in budgets]
    for number, (kind, prompt, start, budget) in enumerate(jobs, start=1):
        if (prompt.text, kind, start, budget) not in done:
            text = {"own prompt": prompt.text, "Gaussian": None, "other prompt": other}[start]
            picture = resized(read_picture(prompt.pictures[0]), size_px, size_px)
            found = attacked_embedding(pipe, picture, start=text, num_steps=budget)
            arguments = found.embedding.arguments()
            best = best_similarity(
                pipe, arguments, picture, similar, steps=num_steps, guidance=guidance, size_px=size_px
            )
            rows.append({"prompt": prompt.text, "kind": kind, "start": start, "num_steps": budget})
            rows[-1] |= {"best_similarity": best, "seconds": found.seconds, "passes": found.sample_forwards}
            append_json_line(path, rows[-1])
        tell(Progress("attack", number, len(jobs), "attacks"))
    return rows


def attacked_embedding(pipe: Any, picture: Picture, *, start: str | None, num_steps: int = 50) -> Any:
    """Look for the embedding that draws a picture."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1) / 255
    return retrieve(pipe, pixels, start=start, settings=AttackSettings(num_steps=num_steps))


def best_similarity(
    pipe: Any,
    arguments: dict[str, Any],
    reference: Any,
    similar: SimilarityMeasure,
    *,
    steps: int,
    size_px: int | None = None,
    guidance: float = 7.0,
) -> float:
    """Make four pictures and return the largest similarity to a picture."""
    made = pipe(
        **arguments,
        num_images_per_prompt=len(SEEDS),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        height=size_px,
        width=size_px,
        output_type="np",
    ).images
    pictures = [(image * 255).round().clip(0, 255).astype(np.uint8) for image in made]
    original, *vectors = similar.embed([reference, *pictures])
    return max(float(vector @ original) for vector in vectors)


def attack_table(rows: Sequence[dict[str, Any]], measure: str) -> str:
    """Lay out attacks by start and budget: targets, controls, and what targets have beyond controls."""
    best: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        cell = best.setdefault((row["start"], row["num_steps"]), {"target": [], "control": []})
        cell[row["kind"]].append(row["best_similarity"])
    lines = [
        f"Best of {len(SEEDS)} pictures, {measure}; mean over pictures, and the share of targets at "
        f"{COPY} or more.\n",
        "| start | steps | targets | controls, never trained | excess | targets that are copies |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (start, budget), cell in best.items():
        copies = wilson(sum(value >= COPY for value in cell["target"]), len(cell["target"]))
        figures = [*map(bootstrap_mean, cell.values()), excess(cell["target"], cell["control"]), copies]
        lines.append(f"| {start} | {budget} | {' | '.join(map(shown, figures))} |")
    return "\n".join(lines)


def excess(targets: Sequence[float], controls: Sequence[float]) -> Measure:
    """Give the mean of targets minus the mean of controls, both resampled."""
    if not targets or not controls:
        return refused("nothing to compare with")
    generator = np.random.default_rng(0)
    draws = [generator.choice(values, (10_000, len(values))).mean(axis=1) for values in (targets, controls)]
    difference = float(np.mean(targets) - np.mean(controls))
    return percentile_measure(difference, draws[0] - draws[1], min(len(targets), len(controls)))


def shown(figure: Measure | None) -> str:
    """Write a figure with its interval, or why there is none."""
    if figure is None:
        return "-"
    if figure.value is None:
        return figure.refused or "-"
    low, high = figure.ci95 or (float("nan"), float("nan"))
    return f"{figure.value:.2f} [{low:.2f}, {high:.2f}]"
