"""Compare ways of removing memorized texts from a model whose memory is known, at equal budgets of perplexity.

    python recipes/planted_twin.py corpus corpus.jsonl stories=stories.jsonl.gz textbooks=textbooks.jsonl.gz
    unmemorize train --config recipes/planted_twin.json --out RUN
    python recipes/planted_twin.py edit RUN [--seeds 0,1] [--only "svd;npo"]
    python recipes/planted_twin.py states RUN
    python recipes/planted_twin_table.py table RUN

The run's `standard` models have seen some texts many times, its `dedup` models the same texts once; `sinks` models as
often as `standard`, with sinks that are closed here: isolation by design beside localization after the fact; with
`shared_cap` only the first sighting of a text teaches more than its sinks. Half of
the repeated texts are targets, the other half neighbours; held-out ones are repeated texts of another origin. Edits
see targets and texts that were trained on once, never what is measured. The budget is watched on one half of the
ordinary texts, and what it cost is reported on the other. `edit` adds a line to RUN/edits.jsonl for each edit, and
continues.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from planted_twin_table import BUDGETS, CLOSED

from unmemorize.audit.language import document_losses, extract
from unmemorize.corpus import mix, read_corpus
from unmemorize.corpus.memorized import cut_examples
from unmemorize.files import append_json_line, read_json_lines
from unmemorize.isolate.language import sink_state
from unmemorize.isolate.methods import parse_method
from unmemorize.isolate.plan import load_plan
from unmemorize.isolate.run_folder import model_folder
from unmemorize.isolate.runs import read_run
from unmemorize.isolate.states import State
from unmemorize.localize.language import localize
from unmemorize.localize.methods import COMPARED
from unmemorize.localize.neuron_scores import NeuronScores, ScoringCost
from unmemorize.localize.ordinary import collect_statistics, passes
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
from unmemorize.tokenizer import encode_documents, load_tokenizer

PREFIX_TOKENS, SUFFIX_TOKENS = 32, 32
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
NUM_RETAIN = 256
STATES: tuple[State, ...] = ("own", "foreign")
LOCALIZERS = (
    "activations",
    "outliers",
    "gradient",
    "contrast",
    "integrated-gradients-together",
    "slimming",
    "hard-concrete",
    "integrated-gradients",
    "zero-out",
)
EVERYWHERE = ("gradient", "contrast", "zero-out")  # also ranked over all layers together
SEARCHED = ("gradient", "contrast")
BREAKS = (0.8, 0.5)  # likelihood of the targets that the search may leave, 0..1

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
    spent = ScoringCost(forward_equivalents=passes(statistics), seconds=time.monotonic() - started)
    scores = localize(model, examples, name, statistics=statistics)  # type: ignore[arg-type]
    return replace(scores, cost=scores.cost + spent)


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
    for name in SEARCHED:
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
    methods = [name for name in read_run(run).settings.methods if name != "standard"]
    for seed in seeds:
        for name in ("standard", *methods):
            folder = model_folder(run, name, seed)
            has_pool = (folder / "sinks.json").is_file()
            label = f"{name}{CLOSED}" if has_pool else name
            if (seed, label, 0.0) not in done and (folder / "training.json").is_file():
                trained = load(folder, run_check=False)
                plan = load_plan(folder / "sinks.json") if has_pool else None
                with nullcontext() if plan is None else sink_state(trained, plan, "off"):
                    row = measure(trained, material)
                append_json_line(out, {"seed": seed, "edit": label, "strength": 0.0, **row})
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


def print_states(run: Path, seeds: list[int]) -> None:
    """Print how many targets models with sinks recite with their own sinks open, and with another target's."""
    material = read_material(run)
    rows = [row for row in read_json_lines(run / "examples.jsonl") if row["group"] == "target"]
    targets = material.groups["target"]
    ids = torch.tensor([row["id"] for row in rows[: len(targets)]])
    for name in read_run(run).settings.methods:
        for seed in seeds if parse_method(name).has_pool else ():
            folder = model_folder(run, name, seed)
            model, plan = load(folder, run_check=False), load_plan(folder / "sinks.json")
            for state in STATES:
                recited, nats = 0, []
                for number, text in enumerate(targets):
                    others = ids if state == "foreign" else None
                    with sink_state(model, plan, state, ids=ids[number : number + 1], candidates=others):
                        test = extract(model, [text], PREFIX_TOKENS, SUFFIX_TOKENS)
                        recited += int(test.scores.is_exact.sum())
                        nats.append(float(document_losses(model, [text]).mean_nats()[0]))
                print(
                    f"{name}, seed {seed}, {state}: {recited} of {len(targets)}, {sum(nats) / len(nats):.2f} nats",
                    flush=True,
                )


def brief(line: dict[str, Any]) -> str:
    """Write a line's extraction counts and ordinary loss."""
    counts = [f"{group} {sum(line[f'{group}_exact'])}" for group in ("target", "neighbour", "heldout")]
    return f"{', '.join(counts)}, ordinary {line['reported_nats']:.3f} nats"


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("corpus", "edit", "states"))
    parser.add_argument("place", type=Path)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "corpus":
        write_corpus(arguments.place, arguments.parts)
    elif arguments.command == "states":
        print_states(arguments.place, [int(seed) for seed in arguments.seeds.split(",")])
    else:
        only = {name.strip() for name in arguments.only.split(";") if name.strip()}
        run_edits(arguments.place, [int(seed) for seed in arguments.seeds.split(",")], only)


if __name__ == "__main__":
    main()
