"""How well localization and removal work on testbeds whose memory is known: one command, one row a testbed.

    unmemorize testbed diffusion --out runs/testbed-0 --seed 0        (and 1, 2)
    python recipes/diffusion_testbed.py runs/testbed-0 runs/testbed-1 runs/testbed-2 --out runs/localization

For every testbed: the gate on memorized and ordinary prompts of the memorized model; its targets localized, switched
off and edited; pictures of every state beside a placebo, the first layer and the twin; and on the injected model the
neurons found against the neurons that hold the pictures. Everything is kept in run folders and continued.
Prints tables of means over testbeds with 95 % intervals (Student t), and writes them to `testbeds.md`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from unmemorize.audit.detection import detection, recall_precision
from unmemorize.audit.diffusion import audit_pictures
from unmemorize.audit.localized import localized_prompts, site_neurons
from unmemorize.audit.pictures import PromptCase
from unmemorize.audit.statistics import mean_over_seeds
from unmemorize.audit.ways import PictureAuditSettings, Way
from unmemorize.cli import ProgressPrinter
from unmemorize.files import read_json, write_atomic, write_json
from unmemorize.localize.activations import collect_statistics
from unmemorize.localize.calibration import best_pair, calibrate
from unmemorize.localize.diffusion import localize_into
from unmemorize.localize.passes import NemoSettings
from unmemorize.localize.results import PromptResult
from unmemorize.models.diffusion import find_sites, fingerprint, load
from unmemorize.neurons import NeuronSet, load_neurons, union
from unmemorize.records import LocalizedPrompt, Measure, PictureAudit
from unmemorize.remove.diffusion_edits import edit_values
from unmemorize.remove.diffusion_moments import collect_second_moments
from unmemorize.report import write_report
from unmemorize.testbeds.diffusion import Testbed, load_testbed
from unmemorize.verbs.states import own_neurons, states

FORMAT = "unmemorize.recipe.testbed"
NUM_CALIBRATION, NUM_ORDINARY, NUM_CAPTIONS = 50, 20, 1000
PROTECTION = 100  # times that a prompt to protect counts among ordinary captions


def main(words: list[str] | None = None) -> Path:
    """Evaluate every testbed; returns where the tables are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("testbeds", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-seeds", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.5)
    chosen = parser.parse_args(words)
    rows = [evaluated(load_testbed(folder), chosen.out / folder.name, chosen) for folder in chosen.testbeds]
    text = "\n\n".join([_localization_table(rows), _state_table(rows)])
    print(text)
    return write_atomic(chosen.out / "testbeds.md", text + "\n")


def evaluated(testbed: Testbed, out: Path, chosen: Any) -> dict[str, Any]:
    """Evaluate one testbed, or read what was found before."""
    path = out / "evaluation.json"
    if path.exists():
        return read_json(path, format=FORMAT, version=1)
    progress = ProgressPrinter(sys.stderr)
    value: dict[str, Any] = {"format": FORMAT, "format_version": 1, "testbed": testbed.folder.name}
    value |= _memorized(testbed, out / "memorized", chosen, progress)
    value |= _injected(testbed, out / "injected", progress)
    write_json(path, value)
    return value


def _prepared(pipe: Any, testbed: Testbed, out: Path, progress: ProgressPrinter) -> tuple[Any, NemoSettings]:
    """Collect activation statistics and calibrate all three thresholds on ordinary captions."""
    captions = testbed.captions()[:NUM_CAPTIONS]
    statistics = collect_statistics(pipe, captions, path=out / "statistics.safetensors", progress=progress)
    threshold = calibrate(
        pipe, captions[:NUM_CALIBRATION], path=out / "calibration.json", progress=progress
    ).threshold
    settings = NemoSettings()
    return statistics, replace(settings, search=settings.search.at(threshold))


def _memorized(testbed: Testbed, out: Path, chosen: Any, progress: ProgressPrinter) -> dict[str, Any]:
    pipe = load(testbed.model("memorized"), run_check=False)
    statistics, settings = _prepared(pipe, testbed, out, progress)
    targets = [prompt.prompt for prompt in testbed.of_group("target")]
    results = localize_into(out, pipe, targets, statistics, settings, progress=progress)
    neurons = load_neurons(out / "neurons.json")
    gate = {
        prompt.prompt: best_pair(pipe, prompt.prompt, settings)
        for prompt in testbed.prompts
        if prompt.group != "target"
    }
    scores = [result.best_pair for result in results]
    scores += [gate[p.prompt] for p in testbed.prompts if p.group in ("neighbour", "heldout")]
    ordinary = [gate[prompt.prompt] for prompt in testbed.of_group("ordinary")]
    audit = _audited(testbed, pipe, results, neurons, gate, settings, out, chosen, progress)
    write_report([out])
    return {
        "auc": _plain(detection(scores, ordinary).auc),
        "ordinary_passing_frac": sum(s > settings.search.gate_threshold for s in ordinary) / len(ordinary),
        "threshold": settings.search.gate_threshold,
        "num_broken": sum(result.is_memorized and not result.is_replaced for result in results),
        "num_targets": len(results),
        "neurons_per_prompt": [sum(map(len, result.refined)) for result in results],
        "sample_forwards": [result.cost.sample_forwards for result in results],
        "num_neurons": len(neurons),
        "num_searched": sum(site.width for site in statistics.sites),
        "states": {state.state: _figures(audit, state.state) for state in audit.states},
    }


def _audited(
    testbed: Testbed,
    pipe: Any,
    results: list[PromptResult],
    neurons: NeuronSet,
    gate: dict[str, float],
    settings: NemoSettings,
    out: Path,
    chosen: Any,
    progress: ProgressPrinter,
) -> PictureAudit:
    """Audit the model as it is, neurons off, edited in two ways, rivals, and the twin."""
    targets = [prompt.prompt for prompt in testbed.of_group("target")]
    moments = collect_second_moments(pipe, testbed.captions()[:NUM_CAPTIONS])
    twin = load(testbed.model("twin"), run_check=False)
    sites = find_sites(pipe)
    own = own_neurons(results, fingerprint(pipe), sites)
    ways = states(pipe, neurons, rivals="placebo first-layer adjusted", own=own, others={"twin": twin})
    others = [p.prompt for p in testbed.prompts if p.group in ("neighbour", "heldout")]
    protecting = collect_second_moments(pipe, testbed.captions()[:NUM_CAPTIONS] + others * PROTECTION)
    strangers = [prompt.prompt for prompt in testbed.of_group("ordinary")[NUM_ORDINARY:]][: len(targets)]
    edits = {
        "edited": ("Closed-form edit of the rows found.", targets, moments, neurons, 0.01),
        "edited-layers": ("Closed-form edit of all searched layers.", targets, moments, None, 0.01),
        "edited-protecting": ("The same, other memorized prompts protected.", targets, protecting, None, 0.1),
        "edited-placebo": (
            "As edited-layers, for as many other ordinary prompts.",
            strangers,
            moments,
            None,
            0.01,
        ),
    }
    for name, (text, prompts, ordinary, rows, strength) in edits.items():
        edited = edit_values(pipe, prompts, ordinary, neurons=rows, strength=strength)
        is_rival = name == "edited-placebo"
        way = Way(state=name, label=name, pipe=edited, description=text, identity=fingerprint(edited))
        ways.append(replace(way, is_rival=is_rival))
    groups = {prompt.prompt: prompt.group for prompt in testbed.prompts}
    kept = [prompt for prompt in testbed.prompts if prompt.group != "ordinary"]
    kept += testbed.of_group("ordinary")[:NUM_ORDINARY]
    threshold = settings.search.gate_threshold
    gated = [
        LocalizedPrompt(prompt=text, group=groups[text], best_pair=score, is_memorized=score > threshold)
        for text, score in gate.items()
    ]
    return audit_pictures(
        [PromptCase(prompt=p.prompt, group=p.group, pictures=(p.picture,)) for p in kept],
        ways,
        PictureAuditSettings(
            seeds=tuple(range(1000, 1000 + chosen.num_seeds)),
            num_steps=chosen.num_steps,
            guidance=chosen.guidance,
        ),
        out,
        localized=[*localized_prompts(results, groups), *gated],
        sites=site_neurons(sites, neurons, results),
        gate_threshold=threshold,
        title=f"Testbed {testbed.folder.name}",
        headline="after",
        progress=progress,
    )


def _injected(testbed: Testbed, out: Path, progress: ProgressPrinter) -> dict[str, Any]:
    """Hold what is found on the injected model against the neurons that hold its pictures."""
    truth = testbed.truth()
    if not truth:
        return {"injected": []}
    pipe = load(testbed.model("injected"), run_check=False)
    statistics, settings = _prepared(pipe, testbed, out, progress)
    rows = []
    for ranking in ("unusual", "gradient"):
        folder = out / ranking
        results = localize_into(
            folder, pipe, list(truth), statistics, replace(settings, ranking=ranking), progress=progress
        )
        for result in results:
            found = result.neurons(fingerprint(pipe), statistics.sites)
            true = union([NeuronSet(found.model_id, dict(truth[result.prompt].indices))])
            quality = recall_precision(found, true, sites=statistics.sites)
            rows.append(
                {
                    "ranking": ranking,
                    "prompt": result.prompt,
                    "is_memorized": result.is_memorized,
                    "is_broken": result.is_memorized and not result.is_replaced,
                    "num_found": len(found),
                    "num_true": len(true),
                    "recall": quality.recall_frac,
                    "precision": quality.precision_frac,
                    "random_recall": quality.random_recall_frac,
                    "random_precision": quality.random_precision_frac,
                    "sample_forwards": result.cost.sample_forwards,
                }
            )
    return {"injected": rows}


def _figures(audit: PictureAudit, state: str) -> dict[str, Any]:
    """Return, for one state, how much of each memorized group is copied, and how far ordinary pictures are kept.

    Shares and means over the prompts of one testbed carry no interval here: testbeds are the unit.
    """
    found = next(one for one in audit.states if one.state == state)
    threshold = audit.copy_thresholds["structure"]
    figures: dict[str, Any] = {"num_neurons": found.num_neurons, "copy_threshold": threshold}
    for group in ("target", "neighbour", "heldout"):
        best = [max(row.copy_similarity[state]) for row in audit.prompts if row.group == group]
        figures[f"{group}_copied"] = sum(one >= threshold for one in best) / len(best)
        figures[f"{group}_similarity"] = sum(best) / len(best)
    for one in found.groups:
        if one.group == "ordinary":
            figures["ordinary_kept"] = _plain(one.similarities[0].kept_similarity)
    return figures


def _plain(measure: Measure | None) -> float | None:
    return None if measure is None else measure.value


def _mean(values: list[float | None], digits: int = 2) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "-"
    measure = mean_over_seeds(known)
    if measure.value is None or measure.ci95 is None:
        return " ".join(f"{value:.{digits}f}" for value in known)
    return f"{measure.value:.{digits}f} [{measure.ci95[0]:.{digits}f}, {measure.ci95[1]:.{digits}f}]"


def _localization_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| figure | over testbeds |", "| --- | --- |"]
    lines.append(
        f"| AUC of the gate's score, memorized against ordinary | {_mean([r['auc'] for r in rows], 3)} |"
    )
    passing = [r["ordinary_passing_frac"] for r in rows]
    lines.append(f"| ordinary prompts that pass the gate | {_mean(passing)} |")
    broken = [r["num_broken"] / r["num_targets"] for r in rows]
    lines.append(f"| targets whose memory the found set breaks by the score | {_mean(broken)} |")
    counts = [sum(r["neurons_per_prompt"]) / r["num_targets"] for r in rows]
    lines.append(f"| neurons per target (of {rows[0]['num_searched']}) | {_mean(counts, 1)} |")
    forwards = [sum(r["sample_forwards"]) / r["num_targets"] for r in rows]
    lines.append(f"| sample-forwards per target | {_mean(forwards, 0)} |")
    for ranking in ("unusual", "gradient"):
        for name in ("recall", "precision", "random_recall", "random_precision"):
            found = [
                [one[name] for one in r["injected"] if one["ranking"] == ranking and one[name] is not None]
                for r in rows
            ]
            values = [sum(one) / len(one) if one else None for one in found]
            lines.append(
                f"| injected neurons, ranking {ranking}: {name.replace('_', ' ')} | {_mean(values)} |"
            )
    return "\n".join(lines)


def _state_table(rows: list[dict[str, Any]]) -> str:
    columns = ("target_copied", "target_similarity", "neighbour_copied", "heldout_copied", "ordinary_kept")
    heads = ("targets copied", "targets' similarity", "neighbours copied", "held-out copied", "ordinary kept")
    lines = [f"| state | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for state in rows[0]["states"]:
        cells = [_mean([row["states"][state][column] for row in rows]) for column in columns]
        lines.append(f"| {state} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
