"""Which token positions should activations be averaged over? Ranks of planted neurons on the recorded NeMo pipeline.

    python benchmarks/token_positions.py FOLDER [--search]

FOLDER holds `pipeline/`, `prompts.json` and `captions.txt`. For every kind of position, statistics are collected over
the captions and every neuron is ranked by absolute z-score (1: the most unusual; -: it does not vary). `--search`
also runs the fast search on each memorized prompt and counts its sample-forwards; without it no denoiser pass is made.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from unmemorize.localize.activations import activations_of, collect_statistics
from unmemorize.localize.diffusion import localize
from unmemorize.localize.scores import z_scores
from unmemorize.models.diffusion import load


def main() -> None:
    """Print one Markdown table, a line for each kind of position."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--search", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load(arguments.folder / "pipeline", run_check=False)
    captions = (arguments.folder / "captions.txt").read_text().splitlines()
    prompts = [
        prompt
        for prompt in json.loads((arguments.folder / "prompts.json").read_text())
        if prompt["role"] == "memorized"
    ]
    names = " | ".join(f"{prompt['index']} ({prompt['rule']})" for prompt in prompts)
    print(f"| positions | {names} |\n{'| --- ' * (len(prompts) + 1)}|")
    for kind in ("all", "start", "words", "end", "padding", "tail"):
        statistics = collect_statistics(pipe, captions, positions=kind)  # type: ignore[arg-type]
        cells = []
        for prompt in prompts:
            (activations,) = activations_of(pipe, [prompt["text"]], statistics.sites, kind)
            z = [
                z_scores(a, m, s)
                for a, m, s in zip(activations, statistics.means, statistics.stds, strict=True)
            ]
            everyone = sorted(
                ((layer, i) for layer, some in enumerate(z) for i in range(len(some))),
                key=lambda neuron: -abs(float(z[neuron[0]][neuron[1]])),
            )
            ranks = [
                str(everyone.index((layer, i)) + 1) if z[layer][i] else "-" for layer, i in prompt["planted"]
            ]
            cell = ", ".join(ranks)
            if arguments.search:
                (result,) = localize(pipe, [prompt["text"]], statistics)
                cell += f"; {result.cost.sample_forwards}"
            cells.append(cell)
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
