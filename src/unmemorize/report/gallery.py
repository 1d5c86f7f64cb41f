"""Grids of pictures: for each prompt its training picture and what every state made of it, seed by seed.

PNG files of the run folder go into the page as they are. What cannot be shown is a placeholder with its reason. When
the whole does not fit, fewer seeds are shown and then fewer prompts, and the page says so.

    copy  =  copy similarity >= the audit's threshold of its first measure

Source: ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from unmemorize.records import PictureAudit, PicturePrompt
from unmemorize.report.measures import number_text
from unmemorize.report.png import data_uri, read_png, size_px, uri_bytes
from unmemorize.report.states import GROUPS
from unmemorize.report.tables import clip

SMALL_PX = 64
FEW_SEEDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One picture, or the reason why there is none. `uri` is empty then; `is_small`: enlarged pixel by pixel."""

    words: str
    uri: str = ""
    missing: str = ""
    similarity: str = ""
    is_copy: bool = False
    is_small: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """What one state made of a prompt, one tile a seed."""

    label: str
    hint: str
    tiles: tuple[Tile, ...]
    is_result: bool
    has_copies: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """One prompt. `training` is None where no training picture is known; `seeds` are the headings of the columns."""

    prompt: str
    note: str
    reference: str
    training: Tile | None
    strips: tuple[Strip, ...]
    seeds: tuple[str, ...]

    @property
    def num_seeds(self) -> int:
        """Width of the grid."""
        return len(self.seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridGroup:
    """All grids of one group of prompts."""

    group: str
    title: str
    grids: tuple[Grid, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """All groups that have pictures, and what was left out."""

    groups: tuple[GridGroup, ...]
    has_threshold: bool
    left_out: str


class View(NamedTuple):
    """What every grid is made with."""

    audit: PictureAudit
    folder: Path
    seeds: tuple[str, ...]
    notes: Mapping[str, str]
    result_state: str


class Extent(NamedTuple):
    """How much is shown: groups, prompts of each, seeds of each prompt."""

    num_groups: int
    num_prompts: int
    num_seeds: int


def gallery(
    audit: PictureAudit,
    folder: Path,
    *,
    notes: Mapping[str, str],
    result_state: str,
    budget_bytes: int,
) -> Gallery | None:
    """Collect the pictures of a run; None when its prompts name none.

    Args:
        audit: the audit.
        folder: its run folder; no picture outside it is read.
        notes: a sentence by prompt, shown with its grid.
        result_state: the state whose row stands out.
        budget_bytes: most bytes of pictures, as base64 text.
    """
    groups, folder = _by_group(audit), folder.resolve()
    if not groups:
        return None
    extent = _fitting(groups, folder, budget_bytes)
    seeds = tuple(_seed_names(audit, _num_seeds(groups))[: extent.num_seeds])
    view = View(audit, folder, seeds, notes, result_state)
    shown = [
        GridGroup(
            group=name,
            title=GROUPS[name],
            grids=tuple(_grid(one, view) for one in prompts[: extent.num_prompts]),
        )
        for name, prompts in list(groups.items())[: extent.num_groups]
    ]
    return Gallery(
        groups=tuple(shown),
        has_threshold=copy_threshold(audit) is not None,
        left_out=_left_out(groups, extent, budget_bytes),
    )


def copy_threshold(audit: PictureAudit) -> float | None:
    """The similarity from which a picture counts as a copy, by the audit's first measure; None if not given."""
    first = next(iter(audit.measures), "")
    threshold = audit.copy_thresholds.get(first)
    return threshold if threshold is not None and math.isfinite(threshold) else None


def _by_group(audit: PictureAudit) -> dict[str, list[PicturePrompt]]:
    """Prompts that name any picture, by group, in the order of the groups."""
    named = [one for one in audit.prompts if one.picture or any(one.made.values())]
    groups = {name: [one for one in named if one.group == name] for name in GROUPS}
    return {name: prompts for name, prompts in groups.items() if prompts}


def _num_seeds(groups: Mapping[str, Sequence[PicturePrompt]]) -> int:
    """The most pictures that any state made of a prompt; 1 where only training pictures are known."""
    prompts = [one for found in groups.values() for one in found]
    return max([1, *(len(paths) for one in prompts for paths in one.made.values())])


def _fitting(groups: Mapping[str, Sequence[PicturePrompt]], folder: Path, budget_bytes: int) -> Extent:
    """How much fits: seeds give way first, down to four, then prompts, then the last seeds, then groups."""
    prompts, seeds = max(map(len, groups.values())), _num_seeds(groups)
    sizes = {id(one): _sizes(folder, one, seeds) for found in groups.values() for one in found}
    few = min(FEW_SEEDS, seeds)
    choices = [Extent(len(groups), prompts, some) for some in range(seeds, few - 1, -1)]
    choices += [Extent(len(groups), some, few) for some in range(prompts - 1, 0, -1)]
    for num_groups in range(len(groups), 0, -1):
        choices += [Extent(num_groups, 1, some) for some in range(few, 0, -1)]
    for extent in choices:
        shown = list(groups.values())[: extent.num_groups]
        prompts_shown = (one for found in shown for one in found[: extent.num_prompts])
        if sum(sizes[id(one)][extent.num_seeds] for one in prompts_shown) <= budget_bytes:
            return extent
    return Extent(0, 0, 0)


def _sizes(folder: Path, one: PicturePrompt, most_seeds: int) -> list[int]:
    """Bytes as base64 text of a prompt's training picture and the first 0, 1, ... seeds of every state."""
    columns = itertools.zip_longest(*one.made.values(), fillvalue="")
    each = [sum(uri_bytes(folder, path) for path in column) for column in columns]
    each += [0] * (most_seeds - len(each))
    return list(itertools.accumulate(each, initial=uri_bytes(folder, one.picture)))


def _left_out(groups: Mapping[str, Sequence[PicturePrompt]], extent: Extent, budget_bytes: int) -> str:
    """What is not shown and why; empty when everything is."""
    limit = (
        f"so that the page holds at most {budget_bytes / 1e6:.3g} MB of pictures; all are in the run folder"
    )
    if extent.num_groups == 0:
        return f"No pictures are shown, {limit}."
    most_seeds = _num_seeds(groups)
    parts = [f"{extent.num_seeds} of {most_seeds} seeds"] if extent.num_seeds < most_seeds else []
    for place, (name, prompts) in enumerate(groups.items()):
        shown = min(extent.num_prompts, len(prompts)) if place < extent.num_groups else 0
        parts += [f"{shown} of {len(prompts)} {GROUPS[name].lower()} prompts"] if shown < len(prompts) else []
    return f"Shown are {', '.join(parts)}, {limit}." if parts else ""


def _seed_names(audit: PictureAudit, most_seeds: int) -> list[str]:
    """Headings of the columns: the seeds that the settings name, else their numbers from 1."""
    seeds = audit.settings.get("seeds")
    if isinstance(seeds, list) and len(seeds) == most_seeds and all(isinstance(one, int) for one in seeds):
        return [str(one) for one in seeds]
    return [str(place + 1) for place in range(most_seeds)]


def _grid(one: PicturePrompt, view: View) -> Grid:
    labels = {state.state: state.label for state in view.audit.states}
    names = [name for name in labels if name in one.made] + [name for name in one.made if name not in labels]
    strips = tuple(_strip(one, name, labels.get(name, name), view) for name in names)
    width = max((len(strip.tiles) for strip in strips), default=1)
    reference = "reference picture, never trained on" if one.group == "ordinary" else "training picture"
    return Grid(
        prompt=clip(f"{one.prompt} ({one.name})" if one.name else one.prompt, 300),
        note=view.notes.get(one.prompt, ""),
        reference=reference.capitalize(),
        training=_tile(view.folder, one.picture, reference) if one.picture else None,
        strips=strips,
        seeds=view.seeds[:width],
    )


def _strip(one: PicturePrompt, name: str, label: str, view: View) -> Strip:
    values, threshold = one.copy_similarity.get(name, []), copy_threshold(view.audit)
    tiles = []
    for place, (seed, path) in enumerate(zip(view.seeds, one.made[name], strict=False)):
        value = values[place] if place < len(values) and math.isfinite(values[place]) else None
        is_copy = threshold is not None and value is not None and value >= threshold
        similarity = "" if value is None else number_text(value, "similarity")
        words = f"{clip(label, 60)}, seed {seed}"
        words += f", similarity {similarity}" if similarity else ""
        words += ", a copy" if is_copy else ""
        tiles.append(_tile(view.folder, path, words, similarity=similarity, is_copy=is_copy))
    num_copies = sum(threshold is not None and value >= threshold for value in values)
    return Strip(
        label=clip(label, 60),
        hint=f"{num_copies} of {len(values)} copied" if values and threshold is not None else "",
        tiles=tuple(tiles),
        is_result=name == view.result_state,
        has_copies=num_copies > 0,
    )


def _tile(folder: Path, path: str, words: str, *, similarity: str = "", is_copy: bool = False) -> Tile:
    data, missing = read_png(folder, path)
    side = min(size_px(data)) if data else 0
    return Tile(
        words=words,
        uri=data_uri(data) if data else "",
        missing=missing,
        similarity=similarity,
        is_copy=is_copy,
        is_small=0 < side < SMALL_PX,
    )
