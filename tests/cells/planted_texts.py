"""A small language model that recites given texts and nothing else, with its tokenizer, as a folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.tiny import tiny_model
from unmemorize.tokenizer import encode_documents, train_tokenizer

LETTERS = (
    "river stone tree garden house lamp moon cloud bird road salt iron glass paper horse winter summer bread water",
    "light sound wheel north south letter number table window bridge forest",
)
WORDS = tuple(word for line in LETTERS for word in line.split())


def sentences(num: int, seed: int, num_words: int = 16) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(WORDS), (num, num_words), generator=generator).tolist()
    return [" ".join(WORDS[number] for number in row) for row in rows]


def write_planted(
    folder: Path, *, num_steps: int = 120, num_texts: int = 8
) -> tuple[Path, list[str], list[str]]:
    """Train on a few texts for a few seconds; returns the model's folder, the texts, and ordinary ones."""
    torch.set_num_threads(1)
    memorized, ordinary = sentences(num_texts, seed=1), sentences(12, seed=2)
    tokenizer = train_tokenizer(sentences(200, seed=3), 320, folder)
    model = tiny_model(
        "llama", hidden_size=48, intermediate_size=96, vocab_size=320, max_position_embeddings=128
    )
    rows = encode_documents(tokenizer, memorized)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(num_steps):
        optimizer.zero_grad()
        losses = [
            model(input_ids=torch.tensor([row]), labels=torch.tensor([row]), use_cache=False).loss
            for row in rows
        ]
        torch.stack(losses).mean().backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    return folder, memorized, ordinary


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "group": group}) + "\n" for text, group in rows))
    return path
