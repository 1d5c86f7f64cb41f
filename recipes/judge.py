"""Train a small CLIP on drawings, to judge whether pictures made by a testbed's models show what was asked for.

    python recipes/judge.py --out JUDGE
    unmemorize audit RUN --clip JUDGE --reference JUDGE/unseen

The drawings are like those of `unmemorize testbed diffusion`, of another seed than any testbed's. It prints how well
the judge tells the caption of a drawing that it has not seen among 100, and among wordings of the same caption with one
colour changed; a judge that cannot tell these apart says nothing about small losses of quality. Those 100 drawings are
written too: no model was trained on them, so that KID can compare with them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from unmemorize.audit.prompt_alignment import ClipAlignment, clip_pixels
from unmemorize.corpus.pictures import Picture
from unmemorize.files import write_atomic
from unmemorize.models.base import quiet_transformers
from unmemorize.testbeds.drawings import COLOURS, draw_pictures
from unmemorize.testbeds.material import encoded_png
from unmemorize.testbeds.pipeline import caption_tokenizer

NUM_TEST = 100


def small_clip(tokenizer: Any, size_px: int) -> CLIPModel:
    """Make a CLIP of 0.6 million parameters for pictures of `size_px`, untrained."""
    shape = {"num_attention_heads": 4, "num_hidden_layers": 3}
    text = {
        **shape,
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        **shape,
        "hidden_size": 96,
        "intermediate_size": 192,
        "image_size": size_px,
        "patch_size": 4,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def train(
    model: CLIPModel, tokenizer: Any, drawings: Sequence[Picture], steps: int, batch_size: int, rate: float
) -> None:
    """Train with CLIP's own loss: each drawing is to find its caption in the batch, and the other way round."""
    captions = [drawing.caption for drawing in drawings]
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt")
    pixels = clip_pixels(model, [drawing.pixels for drawing in drawings])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(drawings), (batch_size,), generator=generator)
        output = model(
            input_ids=tokens["input_ids"][rows],
            attention_mask=tokens["attention_mask"][rows],
            pixel_values=pixels[rows],
            return_loss=True,
        )
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {output.loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval()


def tested(judge: ClipAlignment, drawings: Sequence[Picture]) -> dict[str, float]:
    """Return how often a drawing's caption is the likeliest, 0..1: of all, and of one-colour changes of itself."""
    captions = [drawing.caption for drawing in drawings]
    among = one_colour = 0
    for number, drawing in enumerate(drawings):
        every = judge.scores(captions, [drawing.pixels] * len(captions))
        among += captions[int(every.argmax())] == captions[number]
        changed = [captions[number], *reworded(captions[number])]
        one_colour += int(judge.scores(changed, [drawing.pixels] * len(changed)).argmax()) == 0
    return {"among all": among / len(drawings), "among changes of one colour": one_colour / len(drawings)}


def reworded(caption: str) -> list[str]:
    """Write a caption with one colour after the other replaced by each that it does not have."""
    words, found = caption.split(), []
    for place, word in enumerate(words):
        if word in COLOURS:
            others = [colour for colour in COLOURS if colour not in words]
            found += [" ".join([*words[:place], colour, *words[place + 1 :]]) for colour in others]
    return found


def main() -> None:
    """Train, test and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size-px", type=int, default=24)
    parser.add_argument("--num-drawings", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=99)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(chosen.seed)
    every = draw_pictures(chosen.num_drawings + NUM_TEST, seed=chosen.seed, size_px=chosen.size_px)
    drawings, unseen = every[NUM_TEST:], every[:NUM_TEST]
    tokenizer: Any = caption_tokenizer([drawing.caption for drawing in every], 16)
    model = small_clip(tokenizer, chosen.size_px)
    train(model, tokenizer, drawings, chosen.steps, chosen.batch_size, 2e-3)
    judge = ClipAlignment(name=chosen.out.name, model=model, tokenizer=tokenizer)
    for name, share in tested(judge, unseen).items():
        print(f"right caption {name}: {share:.2f} of {len(unseen)} unseen drawings")
    for number, drawing in enumerate(unseen):
        write_atomic(chosen.out / "unseen" / f"{number:03}.png", encoded_png(drawing.pixels))
    with quiet_transformers():
        model.save_pretrained(chosen.out)
        tokenizer.save_pretrained(chosen.out)


if __name__ == "__main__":
    main()
