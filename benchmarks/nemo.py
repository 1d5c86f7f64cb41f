"""Compare the modes of diffusion localization on the recorded NeMo pipeline, per prompt: passes, seconds, neurons.

    python benchmarks/nemo.py FOLDER [--prompts 0,1,5] [--literal]

FOLDER holds `pipeline/`, `prompts.json` and `statistics.npz`. By default compat looks up passes that it has made
before; `--literal` makes every pass that the released code makes, which is what its wall time has to be measured with.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from unmemorize.localize.diffusion import localize
from unmemorize.localize.passes import NemoSettings
from unmemorize.localize.scores import import_statistics
from unmemorize.models.diffusion import find_sites, load


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", default="")
    parser.add_argument("--literal", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load(arguments.folder / "pipeline", run_check=False)
    statistics = import_statistics(arguments.folder / "statistics.npz", find_sites(pipe), count=200)
    prompts = json.loads((arguments.folder / "prompts.json").read_text())
    if arguments.prompts:
        chosen = {int(index) for index in arguments.prompts.split(",")}
        prompts = [prompt for prompt in prompts if prompt["index"] in chosen]
    compat = NemoSettings(mode="compat", is_reusing=not arguments.literal)
    localize(pipe, [prompts[0]["text"]], statistics)  # libraries are imported outside the clock
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}\n")
    print(
        "| prompt | compat asks | fast | ratio | compat s | fast s | ratio | compat neurons | fast neurons |"
    )
    print("| --- " * 9 + "|")
    totals = [0, 0, 0.0, 0.0]
    for prompt in prompts:
        found = []
        for settings in (compat, NemoSettings()):
            started = time.monotonic()
            (result,) = localize(pipe, [prompt["text"]], statistics, settings)
            found.append((result, time.monotonic() - started))
        (slow, slow_s), (quick, quick_s) = found
        asked, used = slow.cost.sample_forwards, quick.cost.sample_forwards
        totals = [a + b for a, b in zip(totals, (asked, used, slow_s, quick_s), strict=True)]
        sets = [
            " ".join(f"{layer}:{index}" for layer, chosen in enumerate(result.refined) for index in chosen)
            or "-"
            for result in (slow, quick)
        ]
        print(
            f"| {prompt['index']} | {asked} | {used} | {asked / used:.1f} | {slow_s:.1f} | {quick_s:.1f} | "
            f"{slow_s / quick_s:.1f} | {sets[0]} | {sets[1]} |",
            flush=True,
        )
    print(
        f"| all | {totals[0]} | {totals[1]} | {totals[0] / totals[1]:.1f} | {totals[2]:.1f} | {totals[3]:.1f} | "
        f"{totals[2] / totals[3]:.1f} | | |"
    )


if __name__ == "__main__":
    main()
