"""How well a similarity measure tells changed copies from other pictures of the same kind.

    python benchmarks/similarity.py FILE.npz [--sscd MODEL] [--num 900] [--seed 0]

FILE.npz holds one array `images` of shape (N, H, W, 3) or (N, H, W), uint8. A third of the drawn pictures is changed in
each way and compared with all. The table gives the similarity of a changed copy to its original (median and 5 %
quantile), how often it is nearer to it than to every other picture, and how often it passes the similarity that 99 %
(95 %) of the unchanged pictures do not have to any other.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from unmemorize.audit.pictures import Picture
from unmemorize.audit.similarity import sscd, structure


def as_bytes(values: np.ndarray) -> Picture:
    """Round and clip to 8 bits."""
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def jpeg(picture: Picture) -> Picture:
    """Store as JPEG of quality 30 and read back."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=30)
    return np.array(Image.open(buffer))


def shifted(picture: Picture, part: float) -> Picture:
    """Shift right by a part of the width; the first column is continued."""
    step = max(1, round(part * picture.shape[1]))
    return np.concatenate([np.repeat(picture[:, :1], step, 1), picture[:, :-step]], axis=1)


def changes(seed: int) -> dict[str, Callable[[Picture], Picture]]:
    """Name the ways in which a copy may differ."""
    generator = np.random.default_rng(seed)
    return {
        "noise of 25": lambda p: as_bytes(p + generator.normal(0, 25, p.shape)),
        "JPEG 30": jpeg,
        "brightness + 30": lambda p: as_bytes(p.astype(float) + 30),
        "contrast x 0.6": lambda p: as_bytes((p.astype(float) - 128) * 0.6 + 128),
        "blur of 1/43 of a side": lambda p: np.array(
            Image.fromarray(p).filter(ImageFilter.GaussianBlur(p.shape[0] / 43))
        ),
        "red x 0.8, blue x 1.15": lambda p: as_bytes(p * np.array([0.8, 1.0, 1.15])),
        "shift of 1/64": lambda p: shifted(p, 1 / 64),
        "shift of 1/32": lambda p: shifted(p, 1 / 32),
        "shift of 1/16": lambda p: shifted(p, 1 / 16),
        "mirrored": lambda p: np.ascontiguousarray(p[:, ::-1]),
    }


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--sscd", type=Path)
    parser.add_argument("--num", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = np.load(arguments.file)["images"]
    images = np.repeat(images[..., None], 3, -1) if images.ndim == 3 else images
    order = np.random.default_rng(arguments.seed).permutation(len(images))[: arguments.num]
    originals = [images[place] for place in order]
    measure = structure() if arguments.sscd is None else sscd(arguments.sscd)
    vectors = measure.embed(originals)
    table = (vectors @ vectors.T).fill_diagonal_(-1)
    nearest = table.max(1).values
    strict, loose = nearest.quantile(0.99), nearest.quantile(0.95)
    num = len(originals) // 3
    print(
        f"{measure.name}, {len(originals)} pictures: nearest other {nearest.median():.2f} (median), "
        f"{loose:.3f} (95 %), {strict:.3f} (99 %), largest {nearest.max():.3f}\n"
    )
    print(
        "| change | median | 5 % | nearer than any other | passes 99 % | passes 95 % |\n| --- "
        + "| --- " * 5
        + "|"
    )
    for name, change in changes(arguments.seed).items():
        copies = measure.embed([change(picture) for picture in originals[:num]])
        compared = copies @ vectors.T
        own = compared.diagonal().clone()
        compared.fill_diagonal_(-1)
        shares = [own > compared.max(1).values, own > strict, own > loose]
        cells = [f"{own.median():.3f}", f"{own.quantile(0.05):.3f}"]
        cells += [f"{share.float().mean():.0%}" for share in shares]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
