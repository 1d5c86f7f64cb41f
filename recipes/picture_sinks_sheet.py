"""A contact sheet of a run of `picture_sinks.py`: what each repeated picture's caption makes, state by state.

    python recipes/picture_sinks_sheet.py RUN --out sheet.png [--rows 8]

One row a repeated picture, one picture a state (seed 101, 20 DDIM steps, no guidance), beside the training picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from unmemorize.files import read_json_lines
from unmemorize.isolate.diffusion import sink_state
from unmemorize.isolate.sink_files import load_with_sinks
from unmemorize.isolate.states import State
from unmemorize.models.diffusion import load
from unmemorize.testbeds.verification import CopySettings, make_pictures, read_png

COLUMNS = ("trained on", "standard", "sinks, own", "closed", "another's", "dedup")
ZOOM, GAP, HEAD = 3, 6, 16


def columns(run: Path, num_rows: int | None = None) -> dict[str, list[Tensor]]:
    """Return the pictures of each column by row, shape (H, W, 3), 0 to 1; models that are missing have no column."""
    targets = [row for row in read_json_lines(run / "examples.jsonl") if row["group"] == "target"]
    ids = torch.tensor([row["id"] for row in targets])
    targets = targets[:num_rows]
    settings, found = CopySettings(seeds=(101,)), {}
    for name in ("standard", "dedup"):
        folder = run / "models" / f"{name}-seed0" / "pipeline"
        if folder.is_dir():
            pipe = load(folder, run_check=False)
            pipe.set_progress_bar_config(disable=True)
            found[name] = [make_pictures(pipe, [row["caption"]], settings)[0, 0] for row in targets]
    pipe, plan = load_with_sinks(run / "models" / "sinks-seed0" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    states: dict[str, State] = {"sinks, own": "own", "closed": "off", "another's": "foreign"}
    for name, state in states.items():
        made = []
        for number, row in enumerate(targets):
            others = ids if state == "foreign" else None
            with sink_state(pipe, plan, state, ids=ids[number : number + 1], candidates=others):
                made.append(make_pictures(pipe, [row["caption"]], settings)[0, 0])
        found[name] = made
    size_px = len(made[0])
    found["trained on"] = [read_png(run / row["picture"], size_px) for row in targets]
    return {name: found[name] for name in COLUMNS if name in found}


def sheet(parts: dict[str, list[Tensor]]) -> Image.Image:
    """Lay pictures out in a table with a head line."""
    rows = list(zip(*parts.values(), strict=True))
    side = len(rows[0][0]) * ZOOM
    width, height = len(parts) * (side + GAP) + GAP, HEAD + len(rows) * (side + GAP) + GAP
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for place, name in enumerate(parts):
        draw.text((GAP + place * (side + GAP), 3), name, fill="black")
    for number, row in enumerate(rows):
        for place, picture in enumerate(row):
            pixels = (picture.numpy() * 255).round().astype(np.uint8)
            image = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(image, (GAP + place * (side + GAP), HEAD + GAP + number * (side + GAP)))
    return canvas


def main() -> None:
    """Make the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="first repeated pictures to show; by default all")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    sheet(columns(chosen.run, chosen.rows)).save(chosen.out)


if __name__ == "__main__":
    main()
