"""DEL: drop the neurons found for each memorized text; measure it, the other memorized texts, and ordinary text.

    python benchmarks/del.py MODEL EXAMPLES [--methods random,magnitude,...] [--shares 0.001,0.005] [--neurons FOLDER]

MODEL is a model folder, or a run folder of `unmemorize train` (then its standard model of seed 0, and EXAMPLES may be
the same folder). EXAMPLES has target and ordinary texts (JSON Lines with `text` and `group`, or a run folder). Methods
other than the controls are those of `unmemorize.localize.language`. With --neurons, FOLDER holds one neuron file for
each text, named like the example: `target-0000.json`. Rows are means over texts with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from unmemorize.audit.deletion import Deletion, DeletionSettings, delete_each, memorized
from unmemorize.audit.model import read_examples
from unmemorize.isolate.run_folder import model_folder
from unmemorize.models.language import find_mlps, load, signature
from unmemorize.neurons import NeuronSet, load_neurons
from unmemorize.records import Measure
from unmemorize.tokenizer import load_tokenizer

CONTROLS = ("random", "magnitude")


def control(name: str, model: Any, share: float, seed: int) -> NeuronSet:
    """Draw random neurons, or take those with the longest output vectors; equally many in every layer."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for mlp in find_mlps(model):
        weight = mlp.down.weight.detach().float()
        norms = weight.norm(dim=1 if type(mlp.down).__name__ == "Conv1D" else 0)
        values = norms if name == "magnitude" else torch.rand(mlp.site.width, generator=generator)
        chosen[mlp.site] = values.topk(max(1, round(share * mlp.site.width))).indices.tolist()
    return NeuronSet(signature(model), chosen)


def found(name: str, model: Any, text: tuple[int, ...], settings: DeletionSettings) -> Any:
    """Score neurons for one text with a localizer of the library."""
    from unmemorize.corpus.memorized import MemorizedExample
    from unmemorize.localize.language import localize

    cut = settings.prefix_tokens + settings.suffix_tokens
    example = MemorizedExample(
        prefix=text[: settings.prefix_tokens], suffix=text[settings.prefix_tokens : cut]
    )
    return localize(model, [example], name)


def cell(measure: Measure, scale: float = 1.0) -> str:
    """Write a mean with its interval, or that it was refused."""
    if measure.value is None or measure.ci95 is None:
        return "refused"
    low, high = measure.ci95
    return f"{measure.value * scale:.1f} [{low * scale:.1f}, {high * scale:.1f}]"


def print_row(name: str, share: float, result: Deletion, found_s: float) -> None:
    """Print one row of the table."""
    measures = result.measures()
    accuracies = [
        cell(measures[key], 100) for key in ("self_accuracy_change_frac", "neighbour_accuracy_change_frac")
    ]
    distances = [cell(measures[f"{who}_distance_change_characters"]) for who in ("self", "neighbour")]
    rise = cell(measures["perplexity_rise_frac"], 100)
    print(
        f"| {name} | {share:.1%} | {' | '.join(accuracies + distances)} | {rise} | {found_s:.2f} |",
        flush=True,
    )


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("examples", type=Path)
    parser.add_argument("--methods", default="random,magnitude")
    parser.add_argument("--shares", default="0.001,0.005")
    parser.add_argument("--neurons", type=Path)
    parser.add_argument("--lengths", default="32,48")
    parser.add_argument("--limit", type=int, default=32, help="texts to delete")
    parser.add_argument("--ordinary", type=int, default=200, help="ordinary texts for perplexity")
    parser.add_argument("--length-tokens", type=int, default=1024, help="longer texts are cut")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.model
    folder = folder if (folder / "model.safetensors").is_file() else model_folder(folder, "standard", 0)
    model, tokenizer = load(folder, run_check=False), load_tokenizer(folder)
    prefix, suffix = (int(length) for length in arguments.lengths.split(","))
    settings = DeletionSettings(prefix_tokens=prefix, suffix_tokens=suffix)
    context = getattr(model.config, "max_position_embeddings", None) or arguments.length_tokens
    examples = read_examples(arguments.examples, tokenizer, min(arguments.length_tokens, context))
    targets = [example for example in examples if example.group == "target"]
    ordinary = [example.tokens for example in examples if example.group == "ordinary"][: arguments.ordinary]
    numbers = memorized(model, [example.tokens for example in targets], tokenizer.decode, settings)
    kept = [targets[number] for number in numbers][: arguments.limit]
    texts = [example.tokens for example in kept]
    print(
        f"{len(numbers)} of {len(targets)} texts are memorized, {len(kept)} used; torch {torch.__version__}\n"
    )
    print(
        "| method | share | self acc, points | neighbour acc | self dist, characters | neighbour dist ",
        end="",
    )
    print("| perplexity, % | s per text |\n" + "| --- " * 8 + "|")
    if arguments.neurons is not None:
        sets = [load_neurons(arguments.neurons / f"{example.name}.json") for example in kept]
        print_row(
            "from files", 0.0, delete_each(model, texts, sets, ordinary, tokenizer.decode, settings), 0.0
        )
    shares = [float(share) for share in arguments.shares.split(",")]
    for name in filter(None, arguments.methods.split(",")):
        started_s = time.monotonic()
        scored = [] if name in CONTROLS else [found(name, model, text, settings) for text in texts]
        took_s = (time.monotonic() - started_s) / max(1, len(texts))
        for share in shares:
            if name in CONTROLS:
                sets = [control(name, model, share, seed) for seed in range(len(texts))]
            else:
                sets = [scores.top(share, per_layer=True) for scores in scored]
            result = delete_each(model, texts, sets, ordinary, tokenizer.decode, settings)
            print_row(name, share, result, took_s)


if __name__ == "__main__":
    main()
