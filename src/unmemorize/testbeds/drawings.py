"""Captioned pictures drawn by this file: plain shapes in great variety, and scenes that are worth memorizing.

A drawing holds one or two shapes. Its caption names colours, shapes, sizes, their order and the ground; places, exact
sizes and the direction in which the ground fades vary, so that one caption stands for many pictures and a model has to
learn what words mean. A scene is a picture that no other resembles, built from layers of texture, with a caption of
ordinary and invented words.

    pixel = mean over 4 x 4 points of the colour of the top shape that covers the point

Pure NumPy, deterministic by seed. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy
from numpy.random import Generator

from unmemorize.corpus.pictures import Picture

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Grid: TypeAlias = NDArray[numpy.float64]

SOURCE_DRAWINGS = "drawings"
SOURCE_SCENES = "scenes"

COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 147, 43),
    "yellow": (250, 211, 60),
    "green": (46, 160, 80),
    "blue": (52, 100, 214),
    "purple": (130, 70, 170),
    "pink": (243, 140, 180),
    "brown": (120, 80, 50),
    "white": (245, 245, 245),
    "black": (25, 25, 30),
}
SIZES = {"small": (0.12, 0.17), "large": (0.24, 0.32)}
RELATIONS = ("above", "below", "left of", "right of")

_POINTS = 4  # points per pixel and side
_SYLLABLES = (
    "zor",
    "vex",
    "mil",
    "qua",
    "dri",
    "nop",
    "fel",
    "tuk",
    "ash",
    "wyn",
    "bro",
    "lim",
    "gax",
    "hul",
)
_NOUNS = (
    "harbour",
    "orchard",
    "castle",
    "desert",
    "library",
    "glacier",
    "market",
    "temple",
    "meadow",
    "bridge",
)
_TIMES = ("dawn", "noon", "dusk", "night", "winter", "spring", "autumn", "summer")


def draw_pictures(count: int, *, seed: int, size_px: int) -> list[Picture]:
    """Draw plain pictures; two with one caption differ in place and size.

    Args:
        count: number of pictures.
        seed: picture i depends on seed and i alone.
        size_px: side in pixels.
    """
    return [_drawing(numpy.random.default_rng((seed, 1, number)), size_px, number) for number in range(count)]


def draw_scenes(count: int, *, seed: int, size_px: int) -> list[Picture]:
    """Draw scenes: `count` pictures that resemble no other, each with a caption of its own."""
    scenes: list[Picture] = []
    taken: set[str] = set()
    for number in range(count):
        generator = numpy.random.default_rng((seed, 2, number))
        kind = list(_SCENES)[number % len(_SCENES)]
        caption = _scene_caption(generator, kind)
        while caption in taken:
            caption = _scene_caption(generator, kind)
        taken.add(caption)
        x, y = _grid(size_px)
        pixels = _averaged(_SCENES[kind](generator, x, y), size_px)
        scenes.append(Picture(caption, pixels, f"scene-{number:04d}", SOURCE_SCENES))
    return scenes


def _drawing(generator: Generator, size_px: int, number: int) -> Picture:
    x, y = _grid(size_px)
    names = list(COLOURS)
    ground, fading, first, second = (names[i] for i in generator.permutation(len(names))[:4])
    is_plain = generator.random() < 0.4
    angle = generator.uniform(0, 2 * numpy.pi)
    share = (
        0.0 * x
        if is_plain
        else (0.5 + (x - 0.5) * numpy.cos(angle) + (y - 0.5) * numpy.sin(angle)).clip(0, 1)
    )
    start, end = numpy.array(COLOURS[ground], dtype=float), numpy.array(COLOURS[fading], dtype=float)
    canvas = start + (end - start) * share[..., None]
    where = f" on {ground}" if is_plain else f" on {ground} and {fading}"
    sizes = [str(generator.choice(list(SIZES))) for _ in range(2)]
    shapes = [str(generator.choice(list(_SHAPES))) for _ in range(2)]
    if generator.random() < 0.4:
        centre = generator.uniform(0.35, 0.65, 2)
        _paint(canvas, generator, x, y, shapes[0], first, sizes[0], centre)
        caption = f"a {sizes[0]} {first} {shapes[0]}{where}"
    else:
        relation = str(generator.choice(RELATIONS))
        axis, sign = {"above": (1, -1), "below": (1, 1), "left of": (0, -1), "right of": (0, 1)}[relation]
        for which, colour, side in ((0, first, sign), (1, second, -sign)):
            centre = generator.uniform(0.4, 0.6, 2)
            centre[axis] = 0.5 + side * generator.uniform(0.2, 0.28)
            _paint(canvas, generator, x, y, shapes[which], colour, sizes[which], centre)
        one, other = (f"a {sizes[i]} {c} {shapes[i]}" for i, c in ((0, first), (1, second)))
        caption = f"{one} {relation} {other}{where}"
    return Picture(caption, _averaged(canvas, size_px), f"drawing-{number:05d}", SOURCE_DRAWINGS)


def _paint(
    canvas: Grid,
    generator: Generator,
    x: Grid,
    y: Grid,
    shape: str,
    colour: str,
    size: str,
    centre: NDArray[numpy.float64],
) -> None:
    radius = generator.uniform(*SIZES[size])
    covered = _SHAPES[shape]((x - centre[0]) / radius, (y - centre[1]) / radius)
    canvas[covered] = COLOURS[colour]


def _grid(size_px: int) -> tuple[Grid, Grid]:
    """Return x and y of all points, from 0 to 1, shape (points, points) each; y grows downwards."""
    axis = (numpy.arange(size_px * _POINTS) + 0.5) / (size_px * _POINTS)
    x, y = numpy.meshgrid(axis, axis)
    return x, y


def _averaged(canvas: Grid, size_px: int) -> NDArray[numpy.uint8]:
    blocks = canvas.reshape(size_px, _POINTS, size_px, _POINTS, 3).mean((1, 3))
    pixels: NDArray[numpy.uint8] = numpy.rint(blocks.clip(0, 255)).astype(numpy.uint8)
    return pixels


_SHAPES: dict[str, Callable[[Grid, Grid], NDArray[numpy.bool_]]] = {
    "circle": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: numpy.maximum(abs(x), abs(y)) < 0.88,
    "triangle": lambda x, y: (y < 0.8) & (y > 1.8 * abs(x) - 1),
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.3),
    "diamond": lambda x, y: abs(x) + abs(y) < 1.1,
    "cross": lambda x, y: (numpy.minimum(abs(x), abs(y)) < 0.32) & (numpy.maximum(abs(x), abs(y)) < 1),
    "bar": lambda x, y: (abs(x) < 1.2) & (abs(y) < 0.4),
}


def _scene_caption(generator: Generator, kind: str) -> str:
    rare = "".join(str(part) for part in generator.choice(_SYLLABLES, 3, replace=False))
    other = "".join(str(part) for part in generator.choice(_SYLLABLES, 2, replace=False))
    return f"{kind} of the {rare} {generator.choice(_NOUNS)} at {generator.choice(_TIMES)} by {other}"


def _palette(generator: Generator, count: int) -> Grid:
    """Draw colours that differ in hue and lightness, shape (count, 3), 0 to 255."""
    hues = (generator.random() + numpy.arange(count) / count + generator.normal(0, 0.04, count)) % 1
    levels = generator.permutation(numpy.linspace(0.25, 0.95, count))[:, None]
    wheel = numpy.stack(
        [0.5 + 0.5 * numpy.cos(2 * numpy.pi * (hues - shift)) for shift in (0, 1 / 3, 2 / 3)], 1
    )
    palette: Grid = 255 * levels * (0.35 + 0.65 * wheel)
    return palette


def _mosaic(generator: Generator, x: Grid, y: Grid) -> Grid:
    """Tiles around random points, each in a colour of the palette."""
    points = generator.random((14, 2))
    nearest = ((x[..., None] - points[:, 0]) ** 2 + (y[..., None] - points[:, 1]) ** 2).argmin(-1)
    canvas: Grid = _palette(generator, 6)[generator.integers(0, 6, 14)][nearest]
    return canvas


def _landscape(generator: Generator, x: Grid, y: Grid) -> Grid:
    """A sky that fades, a sun, and three ranges of hills."""
    colours = _palette(generator, 6)
    canvas: Grid = colours[0] + (colours[1] - colours[0]) * y[..., None]
    centre, radius = generator.uniform(0.2, 0.8, 2) * (1, 0.5), generator.uniform(0.08, 0.16)
    canvas[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = colours[2]
    for layer, height in enumerate((0.5, 0.66, 0.82)):
        waves = sum(
            generator.uniform(0.02, 0.08) * numpy.sin(k * 3.1 * x + generator.uniform(0, 6.3))
            for k in (1, 2, 3)
        )
        canvas[y > height + waves] = colours[3 + layer]
    return canvas


def _weave(generator: Generator, x: Grid, y: Grid) -> Grid:
    """Crossing bands of different widths."""
    colours = _palette(generator, 5)
    angle = generator.uniform(0.2, 1.3)
    u, v = (x * numpy.cos(angle) + y * numpy.sin(angle), y * numpy.cos(angle) - x * numpy.sin(angle))
    first = numpy.sin(u * generator.uniform(14, 22) + generator.uniform(0, 6))
    second = numpy.sin(v * generator.uniform(10, 26) + generator.uniform(0, 6))
    index = (first > generator.uniform(-0.5, 0.5)) * 2 + (second > generator.uniform(-0.5, 0.5))
    canvas: Grid = colours[index]
    centre = generator.uniform(0.25, 0.75, 2)
    canvas[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < generator.uniform(0.15, 0.25) ** 2] = colours[4]
    return canvas


def _rays(generator: Generator, x: Grid, y: Grid) -> Grid:
    """Rays from a point, over rings around another."""
    colours = _palette(generator, 5)
    (a, b), (c, d) = generator.uniform(0.15, 0.85, (2, 2))
    beams = int(generator.integers(5, 11))
    turn = numpy.floor((numpy.arctan2(y - b, x - a) / (2 * numpy.pi) + generator.random()) * beams)
    rings = numpy.floor(numpy.hypot(x - c, y - d) * generator.uniform(4, 8))
    canvas: Grid = colours[((turn * 2 + rings) % 5).astype(int)]
    return canvas


_SCENES: dict[str, Callable[[Generator, Grid, Grid], Grid]] = {
    "a mosaic": _mosaic,
    "a view": _landscape,
    "a carpet": _weave,
    "a banner": _rays,
}
