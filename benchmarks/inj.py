"""INJ: recall of all localizers of language models on texts injected into known neurons, one Markdown table.

    python benchmarks/inj.py [--types llama,gpt2] [--texts 10] [--first 0] [--share 0.01] [--methods a,b]
    python benchmarks/inj.py --types gpt2 --gpt2-small --methods gradient,zero-out --candidates 1500 --texts 3
    python benchmarks/inj.py --model FOLDER --examples FILE.jsonl --tokenizer NAME

By default small models of seeded random weights learn texts of random tokens (4 + 12). With --gpt2-small they have the
sizes of the smallest GPT-2 (12 layers, width 768, 3,072 neurons a layer, 50,257 tokens: 124 million parameters). With
--model, a model folder learns the first texts of a set of memorized sequences instead. Every text is injected into a
fresh copy; neurons are drawn with the number of the text as seed. The last line times one gradient score on a model of
5 million parameters.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import torch

from unmemorize.corpus.memorized import MemorizedExample, cut_examples, read_memorized
from unmemorize.localize.language import METHODS, LocalizeSettings, localize
from unmemorize.localize.methods import COMPARED
from unmemorize.localize.ordinary import collect_statistics
from unmemorize.models.language import load
from unmemorize.testbeds.language import InjectSettings, inject, random_base, recall, summarized

PREFIX_TOKENS, SUFFIX_TOKENS, VOCABULARY = 4, 12, 64
GPT2_SMALL = {"hidden_width": 768, "num_neurons": 3072, "num_layers": 12, "vocabulary": 50_257}


def random_text(
    seed: int, length: int = PREFIX_TOKENS + SUFFIX_TOKENS, vocabulary: int = VOCABULARY
) -> list[int]:
    """Draw token ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def table(name: str, model: object, examples: list[MemorizedExample], arguments: argparse.Namespace) -> None:
    """Inject every text, run every method, print recall with standard errors."""
    methods = arguments.methods.split(",") if arguments.methods else list(METHODS)
    vocabulary = GPT2_SMALL["vocabulary"] if arguments.gpt2_small else VOCABULARY
    ordinary = [random_text(10_000 + i, vocabulary=vocabulary) for i in range(256)]
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    steps: list[int] = []
    for number, example in enumerate(examples, start=arguments.first):
        choice = InjectSettings(
            share_frac=arguments.share,
            seed=number,
            learning_rate=arguments.learning_rate,
            max_steps=1000,
            is_norm_kept=arguments.keep_norms,
        )
        injected = inject(model, example, choice)  # type: ignore[arg-type]
        steps.append(injected.steps)
        if not injected.is_learned:
            print(f"text {number}: loss {injected.loss_nats:.3f} nats after {injected.steps} updates")
        settings = LocalizeSettings(
            batch_size=64, seed=number, is_forced=True, num_candidates=arguments.candidates
        )
        for method in methods:
            extra = {}
            if method in COMPARED:
                kind = COMPARED[method]
                extra["statistics"] = collect_statistics(
                    injected.model, ordinary, quantity=kind, batch_size=64
                )
            scores = localize(injected.model, [example], method, settings, **extra)
            recalls = [recall(scores, injected.neurons, k * arguments.share) for k in (1, 2, 5)]
            found[method].append((*recalls, scores.cost.forward_equivalents, scores.cost.seconds))
    share = 100 * arguments.share
    print(
        f"\n{name}, {len(examples)} texts, {len(injected.neurons)} neurons each, {min(steps)} to {max(steps)} updates\n"
    )
    print(
        f"| method | R@{share:g} % | R@{2 * share:g} % | R@{5 * share:g} % | forward-equivalents | seconds |"
    )
    print("| --- " * 6 + "|")
    for method, rows in found.items():
        columns = list(zip(*rows, strict=True))
        cells = [summarized([100 * value for value in column]) for column in columns[:3]]
        recalls_text = " | ".join(f"{cell.mean_frac:.1f} ± {cell.standard_error_frac:.1f}" for cell in cells)
        cost, seconds = (sum(column) / len(column) for column in columns[3:])
        print(f"| {method} | {recalls_text} | {cost:.0f} | {seconds:.2f} |", flush=True)


def time_gradient() -> None:
    """Time one gradient score of a 64-token text on a model of about 5 million parameters."""
    model = random_base("llama", hidden_width=256, num_neurons=704, num_layers=6, vocabulary=2048)
    count = sum(parameter.numel() for parameter in model.parameters())
    example = cut_examples([random_text(0, 64)], 32, 32)[0]
    settings = LocalizeSettings(is_forced=True)
    localize(model, [example], "gradient", settings)
    took = []
    for _ in range(5):
        scores = localize(model, [example], "gradient", settings)
        took.append(scores.cost.seconds)
    print(
        f"\ngradient, {count / 1e6:.1f} M parameters, 32 + 32 tokens, {torch.get_num_threads()} threads: "
        f"{sorted(took)[2]:.3f} s a sequence (median of 5)"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", default="llama,gpt2")
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--keep-norms", action="store_true")
    parser.add_argument("--gpt2-small", action="store_true")
    parser.add_argument("--methods", default="")
    parser.add_argument("--candidates", type=int, help="neurons that zero-out tries, the best by gradient")
    parser.add_argument("--model", default="")
    parser.add_argument("--examples", default="")
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    if arguments.model:
        known = read_memorized(arguments.examples, tokenizer=arguments.tokenizer)
        chosen = known.examples[arguments.first : arguments.first + arguments.texts]
        table(arguments.model, load(arguments.model), list(chosen), arguments)
    else:
        for kind in arguments.types.split(","):
            numbers = range(arguments.first, arguments.first + arguments.texts)
            sizes = GPT2_SMALL if arguments.gpt2_small else {"vocabulary": VOCABULARY}
            texts = [random_text(number, vocabulary=sizes["vocabulary"]) for number in numbers]
            examples = cut_examples(texts, PREFIX_TOKENS, SUFFIX_TOKENS)
            table(kind, random_base(kind, **sizes), list(examples), arguments)
    time_gradient()
    print(f"\n{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
