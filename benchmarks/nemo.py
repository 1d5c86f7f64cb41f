"""Compare the modes of diffusion localization on the recorded NeMo pipeline: passes, seconds, neurons, memory.

    python benchmarks/nemo.py FOLDER [--prompts 0,1,5] [--literal] [--repeats 3] [--compat-repeats 1]

FOLDER holds `pipeline/`, `prompts.json` and `statistics.npz`. Three searches of each prompt, interleaved: compat, fast,
and fast with the gradient ranking. By default compat looks up passes that it has made before; `--literal` makes every
pass that the released code makes, which is what its wall time has to be measured with. Seconds are medians, of the wall
and of the processor (which other work on a shared machine moves less); a backward pass counts as two sample-forwards.
"By compat's measure" scores the other sets as compat would: ten samples, those it kept, its similarity and its
threshold. MB is the peak of the process during the search, beyond what it held before.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics as summary
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmemorize.localize.diffusion import localize
from unmemorize.localize.neuron_statistics import import_statistics
from unmemorize.localize.passes import NemoSettings, first_step
from unmemorize.localize.results import PromptResult
from unmemorize.localize.scores import map_similarity
from unmemorize.models.diffusion import find_sites, load

COLUMNS = (
    "prompt | planted | search | sample-forwards | ratio | s | ratio | processor s | ratio | MB | neurons | "
    "by compat's measure | threshold"
)


def main() -> None:
    """Print one Markdown table, three lines a prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", default="")
    parser.add_argument("--literal", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compat-repeats", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load(arguments.folder / "pipeline", run_check=False)
    statistics = import_statistics(arguments.folder / "statistics.npz", find_sites(pipe), count=200)
    prompts = json.loads((arguments.folder / "prompts.json").read_text())
    if arguments.prompts:
        chosen = {int(index) for index in arguments.prompts.split(",")}
        prompts = [prompt for prompt in prompts if prompt["index"] in chosen]
    searches = {
        "compat": NemoSettings(mode="compat", is_reusing=not arguments.literal),
        "fast": NemoSettings(),
        "gradient": NemoSettings(ranking="gradient"),
    }
    list(localize(pipe, [prompts[0]["text"]], statistics))  # libraries are imported outside the clock
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}\n")
    print(f"| {COLUMNS} |\n{'| --- ' * (COLUMNS.count('|') + 1)}|")
    totals = {name: [0.0, 0.0, 0.0] for name in searches}
    for prompt in prompts:
        runs: dict[str, list[Run]] = {name: [] for name in searches}
        for repeat in range(arguments.repeats):
            for name, settings in searches.items():
                if name != "compat" or repeat < arguments.compat_repeats:
                    runs[name].append(measured(pipe, prompt["text"], statistics, settings))
        slow = runs["compat"][0].result
        for name, found in runs.items():
            totals[name] = [a + b for a, b in zip(totals[name], medians(found), strict=True)]
            figures = with_ratios(medians(found), medians(runs["compat"]))
            print(line(pipe, statistics, prompt, name, found, slow, figures), flush=True)
    for name, total in totals.items():
        print(f"| all | | {name} | {with_ratios(total, totals['compat'])} | | | | |")


@dataclass(frozen=True)
class Run:
    """One search: its result, wall and processor time in seconds, and memory on top in megabytes."""

    result: PromptResult
    wall_s: float
    processor_s: float
    peak_mb: float


def measured(pipe: Any, prompt: str, statistics: Any, settings: NemoSettings) -> Run:
    """Localize one prompt and measure it."""
    before_mb = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak; Linux only
    wall_s, processor_s = time.monotonic(), time.process_time()
    (result,) = localize(pipe, [prompt], statistics, settings)
    wall_s, processor_s = time.monotonic() - wall_s, time.process_time() - processor_s
    return Run(result, wall_s, processor_s, memory_mb("VmHWM") - before_mb)


def memory_mb(field: str) -> float:
    """Read a field of the process's memory from the operating system, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(entry.split()[1]) / 1024 for entry in lines if entry.startswith(field))


def medians(found: list[Run]) -> list[float]:
    """Return sample-forwards, and medians of wall and processor time in seconds."""
    forwards = float(found[0].result.cost.sample_forwards)
    times = (summary.median(run.wall_s for run in found), summary.median(run.processor_s for run in found))
    return [forwards, *times]


def with_ratios(figures: list[float], base: list[float]) -> str:
    """Format figures, each with how many times smaller it is than the base."""
    ratios = [slow / quick for slow, quick in zip(base, figures, strict=True)]
    parts = [f"{figures[0]:.0f} | {ratios[0]:.1f}"]
    parts += [f"{value:.2f} | {ratio:.1f}" for value, ratio in zip(figures[1:], ratios[1:], strict=True)]
    return " | ".join(parts)


def line(
    pipe: Any, statistics: Any, prompt: Any, name: str, found: list[Run], slow: PromptResult, figures: str
) -> str:
    """Format one search of one prompt."""
    result = found[0].result
    neurons = " ".join(f"{layer}:{i}" for layer, some in enumerate(result.refined) for i in some) or "-"
    planted = " ".join(f"{layer}:{i}" for layer, i in prompt["planted"]) or "-"
    measure = threshold = "-"
    if slow.is_memorized and result.refined:
        score = slow.refined_score if result is slow else by_compat(pipe, statistics, prompt, result, slow)
        side = "at most" if score <= slow.threshold else "above"
        measure = f"{score:.3f}"
        threshold = f"{side} {slow.threshold:.3f}{' (replaced)' if slow.is_replaced else ''}"
    peak_mb = f"{max(run.peak_mb for run in found):.0f}"
    return f"| {' | '.join([str(prompt['index']), planted, name, figures, peak_mb, neurons, measure, threshold])} |"


def by_compat(pipe: Any, statistics: Any, prompt: Any, result: PromptResult, slow: PromptResult) -> float:
    """Score a set as compat does, on all samples that compat kept."""
    passes = first_step(pipe, prompt["text"], statistics.sites, NemoSettings(mode="compat"))
    off = frozenset((layer, index) for layer, chosen in enumerate(result.refined) for index in chosen)
    plain, blocked = (passes.maps([(sample, one) for sample in slow.kept]) for one in (frozenset(), off))
    return float(map_similarity(plain, blocked, ranges="call").max())


if __name__ == "__main__":
    main()
