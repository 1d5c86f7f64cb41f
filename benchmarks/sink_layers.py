"""Time of an MLP with sinks: masked against gathered, beside plain MLPs of the stored and of the active width.

    python benchmarks/sink_layers.py [--repeats 7] [--threads 2]

One LLaMA decoder layer at d 512 with 256 shared neurons and 64 sinks per document, batches of 8 documents of 256
tokens, forward and backward, float32 on the CPU or bfloat16 on a GPU. The pool grows from 256 to 16,384 sinks. The
table gives medians over the repeats and the ratio to the masked layer in the same run; all columns run interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unmemorize.isolate.language import plan_sinks, training_sinks
from unmemorize.isolate.plan import SinkSettings

WIDTH, SHARED, SINKS, DOCUMENTS, TOKENS = 512, 256, 64, 8, 256


def build(num_neurons: int, device: str) -> LlamaForCausalLM:
    """Make a one-layer model whose cost is its MLP: tiny vocabulary, one attention head."""
    settings = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=num_neurons,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return LlamaForCausalLM(settings).to(device=device, dtype=dtype)


def seconds(step: Callable[[], None], device: str) -> float:
    """Time one call, in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.randint(0, 64, (DOCUMENTS, TOKENS), device=device)
    rows = torch.arange(1, DOCUMENTS + 1, device=device)
    half = rows.repeat_interleave(TOKENS // 2).view(DOCUMENTS // 2, TOKENS)
    packed = torch.cat([half, half.flip(0)])
    print(
        f"torch {torch.__version__}, {device}, {arguments.threads} threads, median of {arguments.repeats}, ms\n"
    )
    print(
        "| pool | plain, stored | plain, active | masked | gathered | gathered, packed | gathered / masked |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for pool in (256, 1024, 3840, 16384):
        model, active = build(SHARED + pool, device), build(SHARED + SINKS, device)
        settings = SinkSettings(share_frac=SHARED / (SHARED + pool), active_frac=None, sinks_per_id=SINKS)
        plan = plan_sinks(model, settings)

        def train(candidate: LlamaForCausalLM, ids: torch.Tensor | None = None) -> None:
            extra = {} if ids is None else {"sink_ids": ids}
            candidate.zero_grad(set_to_none=True)
            candidate(input_ids=tokens, use_cache=False, **extra).logits.sum().backward()

        def step_with(compute: str, ids: torch.Tensor) -> float:
            with training_sinks(model, plan, compute=compute):
                return seconds(lambda: train(model, ids), device)

        runs: dict[str, Callable[[], float]] = {
            "stored": lambda: seconds(lambda: train(model), device),
            "active": lambda: seconds(lambda: train(active), device),
            "masked": lambda: step_with("masked", rows),
            "gathered": lambda: step_with("gathered", rows),
            "packed": lambda: step_with("gathered", packed),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(arguments.repeats + 1):
            for name, run in runs.items():
                spent = run()
                if repeat:
                    times[name].append(spent)
        ms = {name: 1000 * statistics.median(spent) for name, spent in times.items()}
        cells = " | ".join(f"{ms[name]:.1f}" for name in runs)
        print(f"| {pool} | {cells} | {ms['gathered'] / ms['masked']:.2f} |")


if __name__ == "__main__":
    main()
