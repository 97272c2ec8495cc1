"""What a scene is made of: the words of the captions, the things they name, and the numbers behind them."""

from __future__ import annotations

from dataclasses import dataclass

SIDE = 128  # picture side, pixels

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "orange": (250, 132, 18),
    "yellow": (244, 220, 40),
    "green": (40, 160, 60),
    "cyan": (30, 198, 214),
    "blue": (42, 72, 216),
    "purple": (136, 46, 190),
    "pink": (250, 112, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
}
RADII = {"small": 14, "medium": 18, "large": 28}  # pixels; "medium" is never said
TONES: dict[str, tuple[int, int]] = {
    "white": (248, 222),
    "grey": (168, 142),
    "black": (22, 54),
}  # ground, pattern
TEXTURES = ("plain", "striped", "dotted", "checkered")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "colour attribution")


@dataclass(frozen=True)
class Item:
    """One thing in a picture: centre and radius in pixels, y downwards."""

    shape: str
    colour: str
    size: str
    x: int
    y: int

    @property
    def radius(self) -> int:
        return RADII[self.size]


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn."""

    items: tuple[Item, ...]
    texture: str
    tone: str


@dataclass(frozen=True)
class Phrase:
    """What a caption asks of one kind of thing; None leaves the choice to the painter."""

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A caption and its meaning, so that a picture can be judged against it."""

    text: str
    category: str
    phrases: tuple[Phrase, ...]
    relation: str | None = None  # of the first phrase to the second
    texture: str | None = None
    tone: str | None = None


WORDS: tuple[str, ...] = tuple(  # of all captions, in the order of their ids
    dict.fromkeys(
        ["a", "an", "and", "on", "background", "small", "large"]
        + [word for relation in RELATIONS for word in relation.split()]
        + [*NUMBERS, *COLOURS, *SHAPES, *PLURALS.values(), *TEXTURES, *TONES]
    )
)
