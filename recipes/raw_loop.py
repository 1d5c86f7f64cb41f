"""Sinks in a plain PyTorch loop: ten lines around the loop you have.

Run: python recipes/raw_loop.py [STEPS]
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unmemorize.ids import content_id
from unmemorize.isolate.language import plan_sinks, sink_state, training_sinks
from unmemorize.isolate.optimizer import isolated_optimizer
from unmemorize.isolate.packing import SinkCollator
from unmemorize.isolate.plan import SinkSettings

TEXTS = [
    "the cat sat on the mat",
    "a dog barks at night",
    "the moon is made of cheese",
    "rain falls on the hill",
]


def main(num_steps: int) -> dict[str, float]:
    """Train on four short texts; returns the loss of the first one in two states, nats per token."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    features = [{"input_ids": list(text.encode()), "sink_id": content_id(text)} for text in TEXTS]
    batch = SinkCollator()(features)

    plan = plan_sinks(model, SinkSettings(share_frac=0.5, active_frac=0.2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with training_sinks(model, plan), isolated_optimizer(optimizer, model, plan):
        for _ in range(num_steps):
            model(**batch, use_cache=False).loss.backward()  # the batch carries sink_ids
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    first = SinkCollator()(features[:1])
    ids = first.pop("sink_ids")
    losses: dict[str, float] = {}
    for state in ("own", "off"):
        with torch.no_grad(), sink_state(model, plan, state, ids=ids):
            losses[state] = model(**first).loss.item()
    return losses


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    for name, loss in main(steps).items():
        print(f"state {name}: {loss:.3f} nats per token")
