"""Which pictures a testbed trains on and in which group each is, and the files that say so.

    target      memorized, to be removed
    neighbour   memorized, of the same source, to stay
    heldout     memorized, of the general source
    ordinary    kept out of every training; only the prompt is used

Source: ours.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from unmemorize.corpus.pictures import Picture, read_pictures
from unmemorize.errors import ConfigError, FileFormatError, missing_extra
from unmemorize.files import write_atomic
from unmemorize.records.base import Group
from unmemorize.testbeds.drawings import draw_pictures, draw_scenes
from unmemorize.testbeds.settings import TestbedSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROMPTS_FILE = "prompts.csv"
CAPTIONS_FILE = "captions.txt"

_GROUPS: tuple[Group, ...] = ("target", "neighbour", "heldout", "ordinary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """All pictures of a testbed.

    Attributes:
        general: pictures that every stage trains on.
        targets, neighbours, heldout: the memorized pictures of each group.
        ordinary: pictures that no stage sees.
    """

    general: tuple[Picture, ...]
    targets: tuple[Picture, ...]
    neighbours: tuple[Picture, ...]
    heldout: tuple[Picture, ...]
    ordinary: tuple[Picture, ...]

    @property
    def memorized(self) -> tuple[Picture, ...]:
        """Targets, neighbours, heldout, in this order."""
        return (*self.targets, *self.neighbours, *self.heldout)

    @property
    def captions(self) -> list[str]:
        """Every caption that a model of the testbed may be asked for."""
        return [picture.caption for picture in (*self.general, *self.memorized, *self.ordinary)]

    def digest(self) -> str:
        """Return a digest of all pictures and captions in order."""
        digest = hashlib.sha256()
        for picture in (*self.general, *self.memorized, *self.ordinary):
            digest.update(picture.caption.encode() + b"\0" + picture.pixels.tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class TestbedPrompt:
    """One row of `prompts.csv`.

    Attributes:
        prompt: the caption.
        group: target, neighbour, heldout or ordinary.
        picture: the picture that was trained on; for an ordinary prompt one that fits and was never trained on.
        source: where the picture came from.
    """

    __test__ = False  # not a test, whatever its name says

    prompt: str
    group: Group
    picture: Path
    source: str


def gather(settings: TestbedSettings) -> Material:
    """Read or draw all pictures and deal them out to the groups, by the settings' seed.

    Raises:
        ConfigError: if there are too few pictures with captions of their own.
        DataError: if pictures cannot be read.
    """
    wanted, generator = settings.pictures, numpy.random.default_rng((settings.seed, 3))
    general = _read(wanted.pictures, wanted.caption_column, settings, wanted.limit)
    if general is None:
        count = wanted.num_drawings + wanted.num_ordinary + wanted.num_heldout
        general = draw_pictures(count, seed=settings.seed, size_px=settings.size_px)
    num_scenes = wanted.num_targets + wanted.num_neighbours
    scenes = _read(wanted.targets, wanted.targets_caption_column, settings, None)
    if scenes is None:
        scenes = draw_scenes(num_scenes, seed=settings.seed, size_px=settings.size_px)
    general_captions = {picture.caption for picture in general}
    apart = [i for i in _alone(scenes) if scenes[i].caption not in general_captions]
    chosen = _draw(generator, apart, num_scenes, "pictures to memorize")
    memorized = [scenes[i] for i in chosen]
    num_kept_out = wanted.num_heldout + wanted.num_ordinary
    kept_out = _draw(generator, _alone(general), num_kept_out, "general pictures to hold out")
    heldout, ordinary = kept_out[: wanted.num_heldout], kept_out[wanted.num_heldout :]
    left = sorted(set(range(len(general))) - set(kept_out))
    if not left:
        raise ConfigError(f"no general pictures are left beside {num_kept_out} that are held out; read more")
    return Material(
        general=tuple(general[i] for i in left),
        targets=tuple(memorized[: wanted.num_targets]),
        neighbours=tuple(memorized[wanted.num_targets :]),
        heldout=tuple(general[i] for i in heldout),
        ordinary=tuple(general[i] for i in ordinary),
    )


def _read(
    path: str | None, column: str, settings: TestbedSettings, limit: int | None
) -> list[Picture] | None:
    if path is None:
        return None
    return read_pictures(path, size_px=settings.size_px, caption_column=column, limit=limit)


def _alone(pictures: Sequence[Picture]) -> list[int]:
    """Return the pictures whose caption no other has."""
    counts = Counter(picture.caption for picture in pictures)
    return [i for i, picture in enumerate(pictures) if counts[picture.caption] == 1]


def _draw(generator: numpy.random.Generator, among: list[int], count: int, what: str) -> list[int]:
    if len(among) < count:
        raise ConfigError(
            f"{count} {what} are wanted, only {len(among)} have a caption of their own; ask for fewer"
        )
    return [int(i) for i in generator.permutation(among)[:count]]


def write_material(material: Material, out: Path) -> None:
    """Write the pictures and prompts of all groups, and the captions of the general pictures."""
    rows: list[tuple[str, str, str, str]] = []
    groups = (material.targets, material.neighbours, material.heldout, material.ordinary)
    for group, pictures in zip(_GROUPS, groups, strict=True):
        for number, picture in enumerate(pictures):
            path = f"pictures/{group}-{number:02d}.png"
            write_atomic(out / path, encoded_png(picture.pixels))
            rows.append((picture.caption, group, path, picture.source))
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerows([("prompt", "group", "picture", "source"), *rows])
    captions = dict.fromkeys(picture.caption for picture in material.general)
    write_atomic(out / CAPTIONS_FILE, "".join(f"{caption}\n" for caption in captions))
    write_atomic(out / PROMPTS_FILE, stream.getvalue())


def read_prompts(folder: Path) -> tuple[TestbedPrompt, ...]:
    """Read `prompts.csv` of a testbed.

    Raises:
        FileFormatError: if it is missing, or a row has an unknown group or names a picture that is not there.
    """
    path = folder / PROMPTS_FILE
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise FileFormatError(
            f"cannot read {path}: {error.strerror or error}; build the testbed again"
        ) from error
    prompts: list[TestbedPrompt] = []
    for number, row in enumerate(rows, start=1):
        group = next((name for name in _GROUPS if name == row.get("group")), None)
        picture = folder / (row.get("picture") or "")
        if group is None or not row.get("prompt") or not picture.is_file():
            raise FileFormatError(
                f"{path} row {number} names no prompt, group or picture; build the testbed again"
            )
        prompts.append(
            TestbedPrompt(prompt=row["prompt"], group=group, picture=picture, source=row.get("source") or "")
        )
    return tuple(prompts)


def encoded_png(pixels: NDArray[numpy.uint8]) -> bytes:
    """Encode pixels of shape (H, W, 3), uint8, as PNG."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "images") from error
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
