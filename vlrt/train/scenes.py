"""What stands where in each frame of a made-up clip, and its pixels.

Knows shapes, colours and places on a square that is 1 wide; what leaves it on one side comes back on the other. Knows
no question and no file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

OVERSAMPLING = 3  # pixels drawn per pixel and side, so that slow shapes move by less than one

COLOURS: dict[str, Colour] = {
    "red": (235, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 255),
    "yellow": (240, 220, 40),
    "pink": (250, 110, 220),
    "white": (245, 245, 245),
}
GREY: Colour = (128, 128, 128)

# Corners around (0, 0); a sprite's size scales them.
OUTLINES: dict[str, tuple[Point, ...]] = {
    "circle": tuple((math.sin(k * math.pi / 12), math.cos(k * math.pi / 12)) for k in range(24)),
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": ((0, -1), (1, 0.85), (-1, 0.85)),
    "diamond": ((0, -1), (0.75, 0), (0, 1), (-0.75, 0)),
    "cross": (
        *((-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35)),
        *((0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35)),
    ),
    "bar": ((-1, -0.45), (1, -0.45), (1, 0.45), (-1, 0.45)),
    "cup": ((-0.6, -1), (0.6, -1), (1, 1), (-1, 1)),
    "wall": ((-1, -8), (1, -8), (1, 8), (-1, 8)),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "bar")


@dataclass(frozen=True)
class Sprite:
    """One thing in one frame."""

    shape: str  # a key of OUTLINES
    colour: Colour
    x: float  # of its centre, 0 (left) to 1 (right); taken modulo 1
    y: float  # of its centre, 0 (top) to 1 (bottom); taken modulo 1
    size: float  # half its width, in widths of the frame
    hollow: bool = False  # its outline only


@dataclass(frozen=True)
class Asked:
    """A question with a short answer, and the reasoning in words."""

    question: str
    answer: str
    cot: str
    facts: Mapping[str, int | float | str]


@dataclass(frozen=True)
class Scene:
    """A clip that is not drawn yet, with a question about it.

    Attributes:
        question: asks for something that no single frame tells.
        answer: one of `candidates`.
        candidates: the answers that a single frame leaves open, equally likely.
        caption: what there is to see, in words, without any conclusion from it.
        cot: the reasoning in words, for models that write it.
        frames: what is in each frame, painted in this order.
        background: grey level.
        facts: what the clip was made with, e.g. num_swaps.
        steps: easier questions about the clip, which lead up to its own.
    """

    question: str
    answer: str
    candidates: tuple[str, ...]
    caption: str
    cot: str
    frames: tuple[tuple[Sprite, ...], ...]
    background: int = 40
    facts: Mapping[str, int | float | str] = field(default_factory=dict)
    steps: tuple[Asked, ...] = ()


def on_grid(scene: Scene, squares: int) -> Scene:
    """Return a scene whose shapes are at the centres of `squares` x `squares` squares, each in the one it was in."""

    def moved(sprite: Sprite) -> Sprite:
        if sprite.shape not in SHAPES:
            return sprite
        x, y = ((math.floor(place % 1 * squares) + 0.5) / squares for place in (sprite.x, sprite.y))
        return replace(sprite, x=x, y=y)

    return replace(scene, frames=tuple(tuple(map(moved, sprites)) for sprites in scene.frames))


def draw(sprites: tuple[Sprite, ...], size: int, background: int) -> NDArray[np.uint8]:
    """Return one frame as [size, size, 3] uint8 RGB."""
    side = size * OVERSAMPLING
    picture = Image.new("RGB", (side, side), (background,) * 3)
    pen = ImageDraw.Draw(picture)
    for sprite in sprites:
        outline, pencil = OUTLINES[sprite.shape], max(1, round(0.25 * sprite.size * side))
        for x in _copies(sprite.x, sprite.size):
            for y in _copies(sprite.y, sprite.size):
                corners = [((x + sprite.size * a) * side, (y + sprite.size * b) * side) for a, b in outline]
                pen.polygon(corners, fill=None if sprite.hollow else sprite.colour, outline=sprite.colour, width=pencil)
    return np.asarray(picture.reduce(OVERSAMPLING))


def _copies(centre: float, size: float) -> list[float]:
    """Return where a thing is drawn along one axis: once, or on both sides where it crosses the border."""
    centre %= 1
    return [centre + k for k in (-1, 0, 1) if -size < centre + k < 1 + size]
