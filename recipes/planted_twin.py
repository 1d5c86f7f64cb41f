"""Compare ways of removing memorized texts from a model whose memory is known, at equal budgets of perplexity.

    python recipes/planted_twin.py corpus corpus.jsonl stories=stories.jsonl.gz textbooks=textbooks.jsonl.gz
    unmemorize train --config recipes/planted_twin.json --out RUN
    python recipes/planted_twin.py edit RUN [--seeds 0,1] [--only "svd;npo"]
    python recipes/planted_twin.py table RUN
    python recipes/planted_twin.py plot RUN > curves.svg

The run's `standard` models have seen some texts many times, its `dedup` models the same texts once; `sinks` models as
often as `standard`, with sinks that are closed here: isolation by design beside localization after the fact. Half of
the repeated texts are targets, the other half neighbours; held-out ones are repeated texts of another origin. Edits
see targets and texts that were trained on once, never what is measured. The budget is watched on one half of the
ordinary texts, and what it cost is reported on the other. `edit` adds a line to RUN/edits.jsonl for each edit, and
continues.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmemorize.audit.language import document_losses, extract
from unmemorize.audit.statistics import bootstrap_mean, mean_over_seeds, wilson
from unmemorize.corpus import mix, read_corpus
from unmemorize.corpus.memorized import cut_examples
from unmemorize.files import append_json_line, read_json_lines
from unmemorize.isolate.language import sink_state
from unmemorize.isolate.plan import load_plan
from unmemorize.isolate.runs import model_folder, read_run
from unmemorize.localize.language import localize
from unmemorize.localize.methods import COMPARED
from unmemorize.localize.neuron_scores import NeuronScores, ScoringCost
from unmemorize.localize.ordinary import collect_statistics
from unmemorize.localize.recital import BreakSettings, smallest_set
from unmemorize.models.language import find_mlps, load, signature
from unmemorize.neurons import NeuronSet
from unmemorize.remove.curvature import collect_factors
from unmemorize.remove.language_edits import Edit, edit
from unmemorize.remove.settings import (
    CurvatureSettings,
    FoldSettings,
    OutputVectorSettings,
    SubnetSettings,
    SvdSettings,
    UnlearningSettings,
    settings_to_json,
)
from unmemorize.report import plots
from unmemorize.tokenizer import encode_documents, load_tokenizer

PREFIX_TOKENS, SUFFIX_TOKENS = 32, 32
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
BUDGETS = (0.02, 0.10)
NUM_RETAIN = 256
LOCALIZERS = ("activations", "gradient", "contrast", "slimming", "hard-concrete")
EVERYWHERE = ("gradient", "contrast")  # also ranked over all layers together
BREAKS = (0.8, 0.5)  # likelihood of the targets that the search may leave, 0..1
CLOSED = "sinks, closed"
WORDS = "Drop of target extraction over rise of perplexity, means over seeds"
TRAINED = ("standard", "dedup", CLOSED)  # rows that are no edits

Texts = list[tuple[int, ...]]


@dataclass(frozen=True)
class Material:
    """Texts as token ids: by group, to retain, and the two halves of the ordinary ones."""

    groups: dict[str, Texts]
    retain: Texts
    watched: Texts
    reported: Texts


def write_corpus(out: Path, parts: list[str], limit: int = 7000) -> None:
    """Merge JSON Lines into one corpus whose sources are named like their origins."""
    rows = []
    for part in parts:
        name, path = part.split("=", 1)
        with gzip.open(path, "rt") if path.endswith(".gz") else Path(path).open() as stream:
            texts = [json.loads(line)["text"][:800] for line in stream][:limit]
        rows += [{"text": text, "source": f"{name}/{number}"} for number, text in enumerate(texts)]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_material(run: Path) -> Material:
    """Read a run's texts again: its examples, and texts that every method has seen once."""
    settings = read_run(run).settings
    tokenizer, length = load_tokenizer(run / "tokenizer"), settings.model.length_tokens
    rows = read_json_lines(run / "examples.jsonl")
    encoded = encode_documents(tokenizer, [row["text"] for row in rows], length)
    by_group: dict[str, Texts] = {"target": [], "heldout": [], "ordinary": []}
    for row, tokens in zip(rows, encoded, strict=True):
        by_group[row["group"]].append(tokens)
    documents = read_corpus(
        settings.corpus.path,
        text_column=settings.corpus.text_column,
        source_column=settings.corpus.source_column,
    )
    once = mix(documents, settings.mixture).once[:NUM_RETAIN]
    repeated, half = by_group["target"], len(by_group["target"]) // 2
    ordinary = by_group["ordinary"]
    return Material(
        groups={"target": repeated[:half], "neighbour": repeated[half:], "heldout": by_group["heldout"]},
        retain=encode_documents(tokenizer, [document.text for document in once], length),
        watched=ordinary[0::2],
        reported=ordinary[1::2],
    )


def neuron_sets(
    model: Any, material: Material
) -> Iterator[tuple[str, Callable[[], tuple[Any, ScoringCost]]]]:
    """Yield (name, how to score): controls first, then localizers.

    Scoring gives share -> neurons, and what it took.
    """
    mlps, model_id = find_mlps(model), signature(model)
    generator = torch.Generator().manual_seed(0)
    controls = {
        "random": {mlp.site: torch.rand(mlp.site.width, generator=generator) for mlp in mlps},
        "magnitude": {mlp.site: magnitude(mlp) for mlp in mlps},
    }

    def top(by_site: dict[Any, torch.Tensor], share: float) -> NeuronSet:
        chosen = {s: v.topk(max(1, round(share * s.width))).indices.tolist() for s, v in by_site.items()}
        return NeuronSet(model_id, chosen)

    for name, by_site in controls.items():
        yield name, partial(lambda by_site: (partial(top, by_site), ScoringCost()), by_site)
    scored = cache(partial(scores_of, model, material))

    def chosen(name: str, per_layer: bool) -> tuple[Any, ScoringCost]:
        found = scored(name)
        return partial(found.top, per_layer=per_layer), found.cost

    for name in LOCALIZERS:
        yield name, partial(chosen, name, True)
    for name in EVERYWHERE:
        yield f"{name}, over all layers", partial(chosen, name, False)


def scores_of(model: Any, material: Material, name: str) -> NeuronScores:
    """Score neurons for the targets; what a comparison with ordinary texts takes is added to the cost."""
    examples = cut_examples(material.groups["target"], PREFIX_TOKENS, SUFFIX_TOKENS)
    if name not in COMPARED:
        return localize(model, examples, name)  # type: ignore[arg-type]
    started = time.monotonic()
    statistics = collect_statistics(model, material.retain, quantity=COMPARED[name])
    seconds, passes = time.monotonic() - started, 2.0 * statistics.count
    scores = localize(model, examples, name, statistics=statistics)  # type: ignore[arg-type]
    return replace(scores, cost=scores.cost + ScoringCost(forward_equivalents=passes, seconds=seconds))


def searched(model: Any, material: Material, name: str) -> Callable[[float], Edit]:
    """Return the search for few neurons along a ranking: likelihood that may be left -> edit."""
    examples = cut_examples(material.groups["target"], PREFIX_TOKENS, SUFFIX_TOKENS)
    scores = cache(partial(scores_of, model, material, name))

    def broken(left_frac: float) -> Edit:
        found = smallest_set(model, examples, scores(), BreakSettings(threshold_frac=left_frac))
        made = edit(model, [], [], "fold", FoldSettings(neurons=found.neurons))
        made.cost.seconds += scores().cost.seconds + found.cost.seconds
        made.cost.forward_equivalents += scores().cost.forward_equivalents + found.cost.forward_equivalents
        return made

    return broken


def magnitude(mlp: Any) -> torch.Tensor:
    """Norm of each neuron's output vector."""
    weight = mlp.down.weight.detach().float()
    return weight.norm(dim=1 if type(mlp.down).__name__ == "Conv1D" else 0)


def edits(model: Any, material: Material) -> Iterator[tuple[str, float, Callable[[], Edit]]]:
    """Yield (name, strength, how to make the edit) for everything that is compared; strength only orders points."""
    targets, retain = material.groups["target"], material.retain

    def folded(score: Callable[[], tuple[Any, ScoringCost]], share: float) -> Edit:
        top, cost = score()
        made = edit(model, [], [], "fold", FoldSettings(neurons=top(share)))
        made.cost.seconds += cost.seconds
        made.cost.forward_equivalents += cost.forward_equivalents
        return made

    def curved(collect: Callable[[], Any], settings: CurvatureSettings) -> Edit:
        factors = collect()
        made = edit(model, [], [], "curvature", settings, factors=factors)
        made.cost.seconds += factors.cost.seconds
        made.cost.forward_equivalents += factors.cost.forward_equivalents
        return made

    for name, score in neuron_sets(model, material):
        once = cache(score)
        for share in SHARES:
            yield name, share, partial(folded, once, share)
    for name in EVERYWHERE:
        search = searched(model, material, name)
        for left_frac in BREAKS:
            yield f"search along {name}", 1 - left_frac, partial(search, left_frac)
    every = tuple(range(len(find_mlps(model))))
    for name, layers in (("svd", None), ("svd, all layers", every)):
        for gate in (0.1, 0.25, 0.5, 0.75, 0.9):
            settings: Any = SvdSettings(layers=layers, drop_gate_frac=gate)
            yield name, gate, partial(edit, model, [], [], "svd", settings)
    for name, layers in (("curvature", None), ("curvature, all layers", every)):
        collect = cache(partial(collect_factors, model, retain, CurvatureSettings(layers=layers)))
        for dropped in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5):
            settings = CurvatureSettings(layers=layers, keep_frac=1 - dropped)
            yield name, dropped, partial(curved, collect, settings)
    for drop in (0.0015, 0.005, 0.02):
        settings = SubnetSettings(drop_frac=drop)
        yield "subnet", drop, partial(edit, model, targets, retain, "subnet", settings)
    for position in ("first", "weakest"):
        for cap in (0.5, 1.0, 2.0):
            settings = OutputVectorSettings(
                position=position, max_change_frac=cap, prefix_tokens=PREFIX_TOKENS
            )
            cut = [text[: PREFIX_TOKENS + SUFFIX_TOKENS] for text in targets]
            make = partial(edit, model, cut, retain, "output-vectors", settings)
            yield f"output-vectors, {position}", cap, make
    for objective in ("gradient-ascent", "gradient-difference", "npo", "simnpo"):
        for budget in BUDGETS:
            settings = UnlearningSettings(
                learning_rate=3e-4,
                batch_size=8,
                epochs=10,
                perplexity_budget_frac=budget,
                check_every_steps=2,
            )
            yield objective, budget, partial(edit, model, targets, retain, objective, settings)


def measure(model: Any, material: Material) -> dict[str, Any]:
    """Extraction by group, as flags of each text, and ordinary losses of each text."""
    row: dict[str, Any] = {}
    for group, texts in material.groups.items():
        test = extract(model, texts, PREFIX_TOKENS, SUFFIX_TOKENS)
        row[f"{group}_exact"] = test.scores.is_exact.astype(int).tolist()
        row[f"{group}_near"] = test.scores.is_near_verbatim.astype(int).tolist()
        row[f"{group}_forced"] = test.scores.teacher_forced_accuracy_frac.round(4).tolist()
        row[f"{group}_nats"] = document_losses(model, texts).mean_nats().round(4).tolist()
    for name, texts in (("watched", material.watched), ("reported", material.reported)):
        losses = document_losses(model, texts)
        row[f"{name}_nats"] = float(losses.nll_nats.sum() / losses.num_tokens.sum())
    return row


def run_edits(run: Path, seeds: list[int], only: set[str]) -> None:
    """Measure the models before, the twin, and every edit; lines that are there already are not made again."""
    out, material = run / "edits.jsonl", read_material(run)
    lines = read_json_lines(out) if out.is_file() else []
    done = {(line["seed"], line["edit"], line["strength"]) for line in lines}
    for seed in seeds:
        for name in ("standard", "dedup"):
            folder = model_folder(run, name, seed)
            if (seed, name, 0.0) not in done and (folder / "training.json").is_file():
                row = measure(load(folder, run_check=False), material)
                append_json_line(out, {"seed": seed, "edit": name, "strength": 0.0, **row})
        folder = model_folder(run, "sinks", seed)
        if (seed, CLOSED, 0.0) not in done and (folder / "training.json").is_file():
            sunk = load(folder, run_check=False)
            with sink_state(sunk, load_plan(folder / "sinks.json"), "off"):
                row = measure(sunk, material)
            append_json_line(out, {"seed": seed, "edit": CLOSED, "strength": 0.0, **row})
        model = load(model_folder(run, "standard", seed), run_check=False)
        for name, strength, make in edits(model, material):
            if (seed, name, strength) in done or (only and name not in only):
                continue
            made = make()
            head = {"seed": seed, "edit": name, "strength": strength, "seconds": round(made.cost.seconds, 2)}
            head |= {"forward_equivalents": made.cost.forward_equivalents, "details": dict(made.details)}
            line = {**head, "settings": settings_to_json(made.settings), **measure(made.model, material)}
            append_json_line(out, line)
            print(f"{seed} {name} {strength}: {brief(line)}, {made.cost.seconds:.1f} s", flush=True)


def brief(line: dict[str, Any]) -> str:
    """Write a line's extraction counts and ordinary loss."""
    counts = [f"{group} {sum(line[f'{group}_exact'])}" for group in ("target", "neighbour", "heldout")]
    return f"{', '.join(counts)}, ordinary {line['reported_nats']:.3f} nats"


def rise(line: dict[str, Any], before: dict[str, Any], half: str) -> float:
    """Rise of perplexity on one half of the ordinary texts, as a share."""
    return math.expm1(line[f"{half}_nats"] - before[f"{half}_nats"])


def within(
    lines: list[dict[str, Any]], before: dict[int, dict[str, Any]], name: str, budget: float
) -> list[dict[str, Any]]:
    """Return one line for each seed that has this edit: the strongest removal in the budget, else the model before."""
    chosen = []
    for seed, start in before.items():
        mine = [line for line in lines if (line["seed"], line["edit"]) == (seed, name)]
        if name not in TRAINED:
            fitting = [line for line in mine if rise(line, start, "watched") <= budget]
            mine = fitting or [start] * bool(mine)
        if mine:
            chosen.append(min(mine, key=lambda line: (sum(line["target_exact"]), line["watched_nats"])))
    return chosen


def table(run: Path) -> None:
    """Print the headline: for each budget and edit the strongest removal within it, pooled over seeds."""
    lines = read_json_lines(run / "edits.jsonl")
    before = {line["seed"]: line for line in lines if line["edit"] == "standard"}
    for budget in BUDGETS:
        print(f"\n### Perplexity of watched ordinary texts up by at most {budget:.0%}\n")
        heads = "edit | seeds | strengths | perplexity | target | over seeds | target, near | neighbour | held-out"
        print(f"| {heads} | target loss, nats | seconds | forward-equivalents |")
        print("| --- " * 12 + "|")
        for name in dict.fromkeys(line["edit"] for line in lines):
            chosen = within(lines, before, name, budget)
            if chosen:
                print(f"| {name} | {len(chosen)} | {cells(chosen, before)} |")
    print(
        "\n`dedup` is the twin that saw the repeated texts once; it and the model with sinks have no budget."
    )


def cells(chosen: list[dict[str, Any]], before: dict[int, dict[str, Any]]) -> str:
    """Write one row's figures: rates pooled over seeds with Wilson intervals, the rest as means over seeds."""

    def rate(key: str) -> str:
        flags = [flag for line in chosen for flag in line[key]]
        found = wilson(sum(flags), len(flags))
        low, high = found.ci95 or (math.nan, math.nan)
        return f"{sum(flags) / len(flags):.2f} [{low:.2f}, {high:.2f}]"

    strengths = ", ".join(
        "none" if line["edit"] == "standard" else f"{line['strength']:g}" for line in chosen
    )
    nats = bootstrap_mean([value for line in chosen for value in line["target_nats"]]).value
    rises = [rise(line, before[line["seed"]], "reported") for line in chosen]
    seconds = np.mean([line.get("seconds", 0.0) for line in chosen])
    passes = np.mean([line.get("forward_equivalents", 0.0) for line in chosen])
    counts = ", ".join(str(sum(line["target_exact"])) for line in chosen)
    over = mean_over_seeds([float(np.mean(line["target_exact"])) for line in chosen]).ci95
    spread = f"{counts} [{over[0]:.2f}, {over[1]:.2f}]" if over else counts
    near, neighbour, heldout = (rate(key) for key in ("target_near", "neighbour_exact", "heldout_exact"))
    rates = f"{rate('target_exact')} | {spread} | {near} | {neighbour} | {heldout}"
    return f"{strengths} | {np.mean(rises):+.1%} | {rates} | {nats:.2f} | {seconds:.1f} | {passes:,.0f}"


def curve(
    lines: list[dict[str, Any]], before: dict[int, dict[str, Any]], name: str
) -> list[tuple[float, float]]:
    """Return (rise of reported perplexity, drop of target extraction) by strength, means over seeds."""
    points = []
    for strength in sorted({line["strength"] for line in lines if line["edit"] == name}):
        mine = [line for line in lines if (line["edit"], line["strength"]) == (name, strength)]
        if {line["seed"] for line in mine} == set(before):
            drops = [
                np.mean(before[line["seed"]]["target_exact"]) - np.mean(line["target_exact"]) for line in mine
            ]
            rises = [rise(line, before[line["seed"]], "reported") for line in mine]
            points.append((float(np.mean(rises)), float(np.mean(drops))))
    return points


def plot(run: Path) -> str:
    """Draw the drop of extraction over the rise of perplexity: a line for each edit, a mark for each trained model.

    Only strengths that every seed has are drawn. Beyond 30 % of perplexity nothing is.
    """
    lines = read_json_lines(run / "edits.jsonl")
    before = {line["seed"]: line for line in lines if line["edit"] == "standard"}
    frame = plots.Box(52, 12, 470, 330)
    across = plots.Scale(-25, 30, frame.left, frame.right)
    up = plots.Scale(-0.05, 1.05, frame.bottom, frame.top)
    parts = [plots.vertical_grid(across, frame, 12, 6), plots.horizontal_grid(up, frame, 12, 6, gap=6)]
    names = [name for name in dict.fromkeys(line["edit"] for line in lines) if name != "standard"]
    row = 0
    for name in names:
        points = [(across(100 * x), up(y)) for x, y in curve(lines, before, name) if -0.25 <= x <= 0.3]
        if not points:
            continue
        color = f"hsl({row * 137.5 % 360:.0f} 65% 40%)"
        drawn = [plots.mark("diamond" if name in TRAINED else "circle", x, y, 3.5, "") for x, y in points]
        if name not in TRAINED:
            drawn.append(plots.polyline([(across(0), up(0)), *points], "line"))
        y = frame.top + 14 + 20 * row
        drawn.append(plots.mark("circle", frame.right + 18, y - 4, 4, ""))
        drawn.append(plots.tag("text", name, x=frame.right + 28, y=y))
        parts.append(plots.tag("g", plots.join(drawn), style=f"fill:{color};stroke:{color}", class_="method"))
        row += 1
    parts.append(plots.tag("text", "rise of perplexity, %", x=190, y=frame.bottom + 38))
    parts.append(plots.tag("text", "drop of targets recited", x=-240, y=14, transform="rotate(-90)"))
    style = plots.tag(
        "style",
        "text{font:12px sans-serif;stroke:none}.line{fill:none}.grid{stroke:#ddd}.end{text-anchor:end}",
    )
    svg = plots.picture(
        650, 380, plots.join([style, *parts]), ident="curves", title="Removal at a price", description=WORDS
    )
    return str(svg).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)


def main() -> None:
    """Run one of the four commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("corpus", "edit", "table", "plot"))
    parser.add_argument("place", type=Path)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "corpus":
        write_corpus(arguments.place, arguments.parts)
    elif arguments.command == "edit":
        only = {name.strip() for name in arguments.only.split(";") if name.strip()}
        run_edits(arguments.place, [int(seed) for seed in arguments.seeds.split(",")], only)
    elif arguments.command == "plot":
        print(plot(arguments.place))
    else:
        table(arguments.place)


if __name__ == "__main__":
    main()
