"""Scenes for a small vision-language model: coloured shapes and a sign among textured blocks, with questions.

A scene is a picture of 96 x 96 pixels, seen as a grid of 12 x 12 patches. Every shape and every letter of the sign
fills one patch, so that what a question is about is known to the patch. The textured blocks mean nothing; they have
more contrast than the shapes and the sign, so that the pixels alone do not tell what matters.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from salience.core.errors import require

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

GRID = 12  # patches in a row and in a column
PATCH = 8  # pixels in a row and in a column of a patch
SIDE = GRID * PATCH
KINDS = ("colour", "count", "position", "word")
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (210, 50, 45),
    "green": (50, 165, 70),
    "blue": (55, 85, 215),
    "yellow": (230, 210, 60),
    "purple": (150, 55, 180),
    "orange": (240, 130, 30),
}
COUNTS = ("one", "two", "three", "four")
PLACES = ("top", "middle", "bottom")
# no letter tells the word: each stands at its place in several
WORDS = ("ban", "bat", "bar", "bun", "but", "can", "cat", "car", "cut", "pan", "pat", "put")

_MOST = len(COUNTS)
_BLOCK = (2, 4)  # patches in a row or a column of a textured block
_TEXTURED = 56  # of the 144 patches, as long as blocks fit between the shapes
_TRIES = 80
# 5 x 7 pixels, a row for each pair of hexadecimal digits
_LETTERS = {
    "a": "0e11111f111111", "b": "1e11111e11111e", "c": "0e11101010110e", "n": "11191915131311",
    "p": "1e11111e101010", "r": "1e11111e141211", "t": "1f040404040404",
    "u": "1111111111110e",
}  # fmt: skip

# untyped items, since NumPy's names for them differ between versions
_Pixels: TypeAlias = "NDArray[Any]"
Kind = Literal["colour", "count", "position", "word"]


class Question(NamedTuple):
    """What is asked about a scene: its kind, the prompt with "<image>" for the picture, and the right answer."""

    kind: str
    prompt: str
    answer: str


class Shape(NamedTuple):
    """A shape in a patch: its name, colour, row and column."""

    name: str
    colour: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """What is in a picture.

    Two of the four names of shapes stand for one shape each, the other two for one to four each.

    Attributes:
        shapes (tuple[Shape, ...]): in the order in which they were drawn.
        word (str): on the sign.
        sign (tuple[int, int]): row and column of the first letter; the others follow on its right.
        single (tuple[str, str]): names of the shapes that are there once.
        several (tuple[str, str]): names of the shapes that are counted.
        paint (int): seed of the textures, the background and the shades.
    """

    shapes: tuple[Shape, ...]
    word: str
    sign: tuple[int, int]
    single: tuple[str, str]
    several: tuple[str, str]
    paint: int

    @cached_property
    def image(self) -> Image:
        """The picture, RGB, 96 x 96 pixels."""
        from PIL import Image

        return Image.fromarray(_painted(self))

    @property
    def questions(self) -> list[Question]:
        """One question of each of `KINDS`, in their order."""
        every = self.every_question
        return [every[0], every[2], every[5], every[6]]

    @property
    def every_question(self) -> list[Question]:
        """All that can be asked: two colours, two counts, two positions, and the word."""
        found = [self._colour(name) for name in self.single]
        found += [self._count(name) for name in self.several]
        found += [self._position(name) for name in self.single]
        return [*found, Question("word", "<image> what does the sign say?", self.word)]

    def foreground(self, kind: str) -> Tensor:
        """Which patches the question of this kind in `questions` is about.

        Args:
            kind (str): one of `KINDS`.

        Returns:
            Tensor: bool [144], row by row.
        """
        import torch

        require(kind in KINDS, "kind", f"one of {', '.join(KINDS)}", kind)
        marked = torch.zeros(GRID, GRID, dtype=torch.bool)
        if kind == "word":
            row, column = self.sign
            marked[row, column : column + len(self.word)] = True
        else:
            name = {"colour": self.single[0], "count": self.several[0], "position": self.single[1]}[kind]
            for shape in self.shapes:
                marked[shape.row, shape.column] |= shape.name == name
        return marked.flatten()

    def _named(self, name: str) -> list[Shape]:
        return [shape for shape in self.shapes if shape.name == name]

    def _colour(self, name: str) -> Question:
        return Question("colour", f"<image> what colour is the {name}?", self._named(name)[0].colour)

    def _count(self, name: str) -> Question:
        plural = name + ("es" if name.endswith("s") else "s")
        return Question("count", f"<image> how many {plural}?", COUNTS[len(self._named(name)) - 1])

    def _position(self, name: str) -> Question:
        (shape,) = self._named(name)
        place = PLACES[shape.row * len(PLACES) // GRID]
        return Question("position", f"<image> where is the {name}?", place)


def scenes(count: int, seed: int) -> list[Scene]:
    """Scenes that no model of the sandbox was trained on.

    Args:
        count (int): how many, >= 1.
        seed (int): >= 0; the first scenes of a seed are the same for every count.

    Returns:
        list[Scene]: the same for the same arguments. Global random states stay as they were.
    """
    require(count >= 1, "count", ">= 1", count)
    require(seed >= 0, "seed", ">= 0", seed)
    return drawn(count, f"held out {seed}")


def drawn(count: int, stream: str) -> list[Scene]:
    """Scenes of a random stream with this name: how the scenes to train on are kept apart from `scenes`."""
    draw = random.Random(stream)
    return [_scene(draw) for _ in range(count)]


def _scene(draw: random.Random) -> Scene:
    word = draw.choice(WORDS)
    sign = draw.randrange(GRID), draw.randrange(GRID - len(word) + 1)
    free = {(row, column) for row in range(GRID) for column in range(GRID)}
    # a margin keeps the letters apart from shapes on both sides
    free -= {(sign[0], sign[1] + step) for step in range(-1, len(word) + 1)}
    names = draw.sample(SHAPES, len(SHAPES))
    counts = [1, 1, draw.randint(1, _MOST), draw.randint(1, _MOST)]
    places = iter(draw.sample(sorted(free), sum(counts)))
    shapes = [
        Shape(name, draw.choice(list(COLOURS)), *next(places))
        for name, count in zip(names, counts)
        for _ in range(count)
    ]
    single, several = (names[0], names[1]), (names[2], names[3])
    return Scene(tuple(shapes), word, sign, single, several, draw.getrandbits(32))


def _painted(scene: Scene) -> _Pixels:
    """The pixels, uint8 [96, 96, 3]."""
    import numpy as np

    draw = np.random.default_rng(scene.paint)
    slope = np.add.outer(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE))[..., None] * draw.uniform(
        -12, 12
    )
    pixels = draw.uniform(110, 160, 3) * 0.3 + draw.uniform(110, 160) * 0.7 + slope
    pixels = pixels + draw.normal(0, 4, (SIDE, SIDE, 3))
    taken = np.zeros((GRID, GRID), dtype=bool)
    row, column = scene.sign
    taken[row, column : column + len(scene.word)] = True
    for shape in scene.shapes:
        taken[shape.row, shape.column] = True
    _texture(pixels, taken, draw)
    for shape in scene.shapes:
        colour = np.array(COLOURS[shape.colour]) + draw.uniform(-14, 14, 3)
        cell = _cell(pixels, shape.row, shape.column)
        cell[_stencil(shape.name)] = colour + draw.normal(0, 4, 3)
    paper, ink = draw.uniform(185, 205, 3), draw.uniform(60, 85, 3)
    for step, letter in enumerate(scene.word):
        cell = _cell(pixels, row, column + step)
        cell[:] = paper + draw.normal(0, 3, cell.shape)
        cell[_glyph(letter)] = ink
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _texture(pixels: _Pixels, taken: _Pixels, draw: Any) -> None:
    """Paint blocks between what is already taken until enough patches are textured."""
    import numpy as np

    textured = 0
    for _ in range(_TRIES):
        height, width = draw.integers(_BLOCK[0], _BLOCK[1] + 1, 2)
        row, column = draw.integers(GRID - height + 1), draw.integers(GRID - width + 1)
        place = taken[row : row + height, column : column + width]
        if place.any():
            continue
        place[:] = True
        dark, light = draw.uniform(0, 80, 3), draw.uniform(175, 255, 3)
        down, right = np.indices((height * PATCH, width * PATCH))
        pattern = (
            draw.random(down.shape) < 0.5,
            (down // 2 + right // 2) % 2 == 0,
            (down + right) % 4 < 2,
            (down if draw.random() < 0.5 else right) % 4 < 2,
        )[draw.integers(4)]
        block = np.where(pattern[..., None], light, dark) + draw.normal(0, 8, (*pattern.shape, 3))
        top, left = row * PATCH, column * PATCH
        pixels[top : top + height * PATCH, left : left + width * PATCH] = block
        textured += height * width
        if textured >= _TEXTURED:
            return


def _cell(pixels: _Pixels, row: int, column: int) -> _Pixels:
    return pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]


def _stencil(name: str) -> _Pixels:
    """Where a shape is in its patch, bool [8, 8]."""
    import numpy as np

    down, right = np.indices((PATCH, PATCH)) - (PATCH - 1) / 2
    masks: dict[str, _Pixels] = {
        "circle": down**2 + right**2 <= 12.5,
        "square": (abs(down) < 3) & (abs(right) < 3),
        "triangle": (abs(right) <= (down + 4) / 2) & (abs(down) < 4),
        "cross": ((abs(down) < 1) | (abs(right) < 1)) & (abs(down) < 4) & (abs(right) < 4),
    }
    return masks[name]


def _glyph(letter: str) -> _Pixels:
    """Where a letter is in its patch, bool [8, 8]."""
    import numpy as np

    mask = np.zeros((PATCH, PATCH), dtype=bool)
    for row, bits in enumerate(bytes.fromhex(_LETTERS[letter])):
        mask[row, 1:6] = [bits >> shift & 1 for shift in (4, 3, 2, 1, 0)]
    return mask
