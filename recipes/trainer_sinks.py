"""Sinks with `transformers.Trainer`: a collator, one `with` line, and `remove_unused_columns=False`.

Run: python recipes/trainer_sinks.py [STEPS] [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from unmemorize.ids import content_id
from unmemorize.isolate.language import plan_sinks, training_sinks
from unmemorize.isolate.optimizer import isolated_optimizer
from unmemorize.isolate.packing import SinkCollator
from unmemorize.isolate.plan import SinkSettings

TEXTS = [
    "the cat sat on the mat",
    "a dog barks at night",
    "the moon is made of cheese",
    "rain falls on the hill",
]


def main(num_steps: int, folder: Path) -> float:
    """Train on four short texts, save model and plan; returns the mean training loss, nats per token."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    plan = plan_sinks(model, SinkSettings(share_frac=0.5, active_frac=0.2))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=num_steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            remove_unused_columns=False,  # or the ids are dropped before the collator sees them
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": list(text.encode()), "sink_id": content_id(text)} for text in TEXTS],
        data_collator=SinkCollator(),
    )
    optimizer = trainer.create_optimizer()
    with training_sinks(model, plan), isolated_optimizer(optimizer, model, plan):
        result = trainer.train()
    model.save_pretrained(folder)
    plan.save(folder / "sinks.json")
    return float(result.training_loss)


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    place = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp())
    print(f"training loss {main(steps, place):.3f} nats per token; model and plan in {place}")
