"""The kinds and colours of the things in the images of `toys`."""

from dataclasses import dataclass

from vlmtune.demo.drawing import Colour

COLOURS: dict[str, Colour] = {
    "red": (205, 45, 40), "blue": (40, 85, 175), "yellow": (236, 196, 50), "green": (48, 135, 75),
    "white": (240, 240, 236), "black": (36, 38, 44), "purple": (145, 75, 155), "orange": (228, 122, 45),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A part of a thing, within the unit square.

    Attributes:
        form: "o" for an ellipse, "r" for a rectangle, "p" for a polygon.
        shade: factor on the brightness of the colour.
        colour: None for the colour of the thing.
    """

    form: str
    points: tuple[tuple[float, float], ...]
    shade: float = 1.0
    colour: Colour | None = None


@dataclass(frozen=True)
class ToyKind:
    """A kind of thing.

    Attributes:
        aspect: width over height.
        shapes: its parts, from back to front.
        stands: whether it can stand on the ground of a yard.
    """

    aspect: float
    shapes: tuple[Shape, ...]
    stands: bool = True


def ellipse(
    left: float, top: float, right: float, bottom: float, shade: float = 1.0, colour: Colour | None = None
) -> Shape:
    return Shape("o", ((left, top), (right, bottom)), shade, colour)


def rectangle(
    left: float, top: float, right: float, bottom: float, shade: float = 1.0, colour: Colour | None = None
) -> Shape:
    return Shape("r", ((left, top), (right, bottom)), shade, colour)


def polygon(*points: tuple[float, float], shade: float = 1.0, colour: Colour | None = None) -> Shape:
    return Shape("p", points, shade, colour)


_o, _r, _p = ellipse, rectangle, polygon
WOOD, DARK, GLASS, PALE = (120, 82, 52), (50, 50, 56), (160, 195, 210), (232, 222, 200)
_STAR = (
    (0.5, 0.0), (0.62, 0.36), (1.0, 0.38), (0.7, 0.61), (0.81, 1.0),
    (0.5, 0.77), (0.19, 1.0), (0.3, 0.61), (0.0, 0.38), (0.38, 0.36),
)  # fmt: skip
_MOON = (
    (0.9, 0.0), (0.4, 0.05), (0.0, 0.5), (0.4, 0.95), (0.9, 1.0), (0.55, 0.75), (0.45, 0.5), (0.55, 0.25),
)  # fmt: skip

KINDS: dict[str, ToyKind] = {
    "circle": ToyKind(1.0, (_o(0, 0, 1, 1),), stands=False),
    "square": ToyKind(1.0, (_r(0, 0, 1, 1),), stands=False),
    "triangle": ToyKind(1.0, (_p((0.5, 0), (1, 1), (0, 1)),), stands=False),
    "star": ToyKind(1.0, (_p(*_STAR),), stands=False),
    "cross": ToyKind(1.0, (_r(0.33, 0, 0.67, 1), _r(0, 0.33, 1, 0.67)), stands=False),
    "moon": ToyKind(0.8, (_p(*_MOON),), stands=False),
    "fish": ToyKind(1.6, (
        _o(0, 0, 0.75, 1), _p((0.65, 0.5), (1, 0.05), (1, 0.95), shade=0.8),
        _o(0.12, 0.3, 0.22, 0.45, 1, DARK),
    ), stands=False),
    "tree": ToyKind(0.7, (_r(0.4, 0.6, 0.6, 1, 1, WOOD), _o(0, 0, 1, 0.72), _o(0.2, 0.1, 0.6, 0.4, 1.2))),
    "house": ToyKind(1.0, (
        _r(0.1, 0.4, 0.9, 1), _p((0.5, 0), (1, 0.42), (0, 0.42), shade=0.6), _r(0.4, 0.65, 0.6, 1, 1, WOOD),
    )),
    "car": ToyKind(1.7, (
        _p((0.25, 0), (0.7, 0), (0.82, 0.45), (0.12, 0.45), shade=0.75), _r(0, 0.4, 1, 0.82),
        _o(0.1, 0.62, 0.34, 1, 1, DARK), _o(0.66, 0.62, 0.9, 1, 1, DARK),
    )),
    "bottle": ToyKind(0.36, (
        _r(0.33, 0.08, 0.67, 0.45), _o(0, 0.3, 1, 0.6), _r(0, 0.45, 1, 1), _r(0, 0.6, 1, 0.8, 1, PALE),
        _r(0.3, 0, 0.7, 0.1, 0.5),
    )),
    "lamp": ToyKind(0.42, (
        _r(0.42, 0.3, 0.58, 1, 1, DARK), _r(0.2, 0.93, 0.8, 1, 1, DARK),
        _p((0.25, 0), (0.75, 0), (1, 0.35), (0, 0.35)),
    )),
    "cone": ToyKind(0.7, (
        _p((0.42, 0), (0.58, 0), (0.88, 0.9), (0.12, 0.9)),
        _p((0.3, 0.4), (0.7, 0.4), (0.77, 0.6), (0.23, 0.6), colour=PALE),
        _r(0, 0.88, 1, 1, 0.7),
    )),
    "mushroom": ToyKind(0.85, (
        _r(0.34, 0.4, 0.66, 1, 1, PALE), _p((0, 0.5), (0.12, 0.18), (0.5, 0), (0.88, 0.18), (1, 0.5)),
        _o(0.3, 0.1, 0.5, 0.3, 1, PALE),
    )),
    "cup": ToyKind(1.05, (
        _o(0.6, 0.2, 1, 0.75, 0.7), _p((0, 0), (0.8, 0), (0.7, 1), (0.1, 1)), _o(0, 0, 0.8, 0.2, 0.5),
    )),
    "flower": ToyKind(0.6, (
        _r(0.45, 0.4, 0.55, 1, 1, (60, 120, 60)), _o(0, 0, 0.55, 0.3), _o(0.45, 0, 1, 0.3),
        _o(0, 0.25, 0.55, 0.55), _o(0.45, 0.25, 1, 0.55), _o(0.33, 0.17, 0.67, 0.38, 1, (240, 200, 60)),
    )),
    "rocket": ToyKind(0.45, (
        _p((0, 1), (0.2, 0.6), (0.8, 0.6), (1, 1), shade=0.6), _o(0.18, 0, 0.82, 0.7),
        _r(0.18, 0.35, 0.82, 0.92), _o(0.35, 0.3, 0.65, 0.46, 1, GLASS),
    )),
    "umbrella": ToyKind(0.8, (
        _r(0.46, 0.3, 0.54, 1, 1, DARK), _p((0, 0.45), (0.15, 0.15), (0.5, 0), (0.85, 0.15), (1, 0.45)),
        _p((0.35, 0.45), (0.5, 0), (0.65, 0.45), shade=0.75),
    )),
}  # fmt: skip
NAMES = tuple(KINDS)
STANDING = tuple(name for name, kind in KINDS.items() if kind.stands)
