"""Drawn images of toys: what the demo's base model learns to see and to count.

An image shows up to nine things. Most are of a named kind (a star, a lamp, …); the others are stacks of
random shapes without a name. They lie on a plain or patterned ground, or stand in a yard in perspective, with
things in the background that do not count. No image shows people or the demo's mall: an adapter has to learn
these.
"""

from dataclasses import dataclass
from itertools import pairwise
from random import Random

from PIL import Image, ImageDraw

from vlmtune.demo.drawing import Box, Colour, overlap, shade
from vlmtune.demo.toy_kinds import COLOURS, KINDS, NAMES, STANDING, Shape, ellipse, polygon, rectangle

WIDTH, HEIGHT = 112, 84  # pixels of an image, as of the demo's frames
OVERSAMPLING = 2  # images are drawn this much larger and then reduced, for smooth edges
MAX_THINGS = 9
MAX_OVERLAP = 0.35  # of the smaller of two things, so that every thing can be seen
PLACES_TRIED = 30  # for each thing


@dataclass(frozen=True)
class Thing:
    """One thing in an image.

    Attributes:
        kind: a key of KINDS; None for a thing without a name.
        box: its place in pixels of the image.
    """

    kind: str | None
    colour: str
    box: Box

    @property
    def middle(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def area(self) -> float:
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


def draw_toys(rng: Random) -> tuple[Image.Image, list[Thing]]:
    """An image of 112x84 pixels and the 0 to 9 things in it, back to front. Costs about 1.5 ms."""
    image = Image.new("RGB", (WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING))
    draw = ImageDraw.Draw(image)
    yard = rng.random() < 0.6
    horizon = rng.uniform(8, 40)
    if yard:
        _draw_yard(draw, horizon, rng)
    else:
        _draw_ground(draw, rng)
    things: list[Thing] = []
    for kind, colour, aspect in _choose(yard, rng):
        things.append(Thing(kind, colour, _place(things, aspect, horizon if yard else None, rng)))
    things.sort(key=lambda thing: thing.box[3])
    for thing in things:
        _draw_thing(draw, thing, yard, rng)
    return image.reduce(OVERSAMPLING), things


def _choose(yard: bool, rng: Random) -> list[tuple[str | None, str, float]]:
    """Kind, colour and aspect of each thing. Few kinds and colours, so that there is much to count."""
    names = rng.sample(STANDING if yard else NAMES, rng.randint(1, 3))
    colours = rng.sample(list(COLOURS), rng.choice((1, 2, 3, 8)))
    nameless = rng.choice((0.0, 0.0, 0.3, 1.0))  # share of things without a name
    weights = [rng.random() + 0.05 for _ in names]
    chosen: list[tuple[str | None, str, float]] = []
    for _ in range(rng.randint(0, MAX_THINGS)):
        colour = rng.choice(colours)
        if rng.random() < nameless:
            chosen.append((None, colour, rng.uniform(0.28, 0.9)))
        else:
            name = rng.choices(names, weights)[0]
            chosen.append((name, colour, KINDS[name].aspect * rng.uniform(0.9, 1.1)))
    return chosen


def _place(things: list[Thing], aspect: float, horizon: float | None, rng: Random) -> Box:
    """The box of another thing: the first random place without much overlap, else the one with the least."""
    best: tuple[float, Box] | None = None
    for _ in range(PLACES_TRIED):
        box = _anywhere(aspect, rng) if horizon is None else _standing(aspect, horizon, rng)
        overlapping = max((overlap(box, thing.box) for thing in things), default=0.0)
        if best is None or overlapping < best[0]:
            best = overlapping, box
        if overlapping < MAX_OVERLAP * rng.random():
            break
    assert best is not None
    return best[1]


def _anywhere(aspect: float, rng: Random) -> Box:
    height = 9 * 3.6 ** rng.random() / max(1.0, aspect) ** 0.5  # pixels
    width = height * aspect
    left, top = rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height)
    return left, top, left + width, top + height


def _standing(aspect: float, horizon: float, rng: Random) -> Box:
    """A box on the ground, larger nearer to the lower edge.

    A thing has 0.8 to 1.3 times the height of a person, seen by a camera at about 3 m.
    """
    foot = horizon + (HEIGHT - 4 - horizon) * rng.uniform(0.2, 1.0)
    height = max(9.0, (foot - horizon) * rng.uniform(0.45, 0.72)) / max(1.0, aspect) ** 0.5
    width = height * aspect
    middle = rng.uniform(3, WIDTH - 3)
    return middle - width / 2, foot - height, middle + width / 2, foot


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, yard: bool, rng: Random) -> None:
    left, top, right, bottom = (edge * OVERSAMPLING for edge in thing.box)
    width, height = right - left, bottom - top
    if yard and rng.random() < 0.6:
        draw.ellipse(
            (left - width * 0.05, bottom - height * 0.05, right + width * 0.1, bottom + height * 0.05),
            (90, 88, 84),
        )
    colour = _jitter(COLOURS[thing.colour], rng, 14)
    for shape in KINDS[thing.kind].shapes if thing.kind else _stack(rng):
        points = [(left + x * width, top + y * height) for x, y in shape.points]
        fill = shade(shape.colour or colour, shape.shade)
        if shape.form == "o":
            draw.ellipse(points, fill)
        elif shape.form == "r":
            draw.rectangle(points, fill)
        else:
            draw.polygon(points, fill)


def _stack(rng: Random) -> list[Shape]:
    """A thing without a name: two to five random shapes on each other, one of them in the thing's colour."""
    number = rng.randint(2, 5)
    cuts = [0.0, *sorted(rng.uniform(0.12, 0.88) for _ in range(number - 1)), 1.0]
    shapes = []
    for index, (top, bottom) in enumerate(pairwise(cuts)):
        middle, half = rng.uniform(0.42, 0.58), rng.uniform(0.15, 0.42)
        other_colour = None if index == number // 2 else _jitter(rng.choice(list(COLOURS.values())), rng, 40)
        left, right = middle - half, middle + half
        if rng.random() < 0.15:  # two beside each other
            shapes += [
                rectangle(left, top, middle - 0.05, bottom, 1, other_colour),
                rectangle(middle + 0.05, top, right, bottom, 1, other_colour),
            ]
        elif rng.random() < 0.4:
            shapes.append(
                ellipse(left, max(0.0, top - 0.03), right, min(1.0, bottom + 0.03), 1, other_colour)
            )
        elif rng.random() < 0.5:
            shapes.append(rectangle(left, top, right, bottom, 1, other_colour))
        else:
            top_left, top_right = middle - half * rng.random(), middle + half * rng.random()
            shapes.append(
                polygon(
                    (top_left, top), (top_right, top), (right, bottom), (left, bottom), colour=other_colour
                )
            )
    return shapes


def _draw_ground(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    """The whole image in a muted colour: plain, in bands, in tiles or with stains."""
    width, height = WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING
    base = _muted(rng)
    draw.rectangle((0, 0, width, height), base)
    pattern = rng.choice(("plain", "bands", "tiles", "stains"))
    step = rng.randint(12, 50)
    if pattern == "bands":
        slope = rng.uniform(-60, 60)
        for at in range(-step * 4, width + step * 4, 2 * step):
            draw.polygon(
                [(at, 0), (at + step, 0), (at + step + slope, height), (at + slope, height)],
                shade(base, 0.93),
            )
    elif pattern == "tiles":
        for row in range(height // step + 1):
            for column in range(row % 2, width // step + 1, 2):
                draw.rectangle(
                    (column * step, row * step, (column + 1) * step, (row + 1) * step), shade(base, 0.93)
                )
    elif pattern == "stains":
        for _ in range(12):
            x, y, size = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(10, 60)
            draw.ellipse((x - size, y - size, x + size, y + size), _jitter(base, rng, 12))


def _draw_yard(draw: ImageDraw.ImageDraw, horizon: float, rng: Random) -> None:
    """A ground in perspective below the horizon. Walls and boards above it and beside it are no things."""
    width, height, line = WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING, horizon * OVERSAMPLING
    floor, wall = _muted(rng), _muted(rng)
    draw.rectangle((0, 0, width, height), wall)
    draw.rectangle((0, line, width, height), floor)
    vanishing = rng.uniform(0.25, 0.75) * width
    if rng.random() < 0.8:
        _draw_tiles(draw, (vanishing, line - rng.uniform(2, 20)), line, floor, rng)
    for _ in range(rng.randint(0, 7)):  # boards on the wall
        left, top = rng.uniform(-10, width), rng.uniform(-10, line)
        right, bottom = left + rng.uniform(10, 60), min(line, top + rng.uniform(6, 50))
        if bottom > top:
            _draw_board(draw, [(left, top), (right, top), (right, bottom), (left, bottom)], rng)
    for side in (0, width):  # walls that run towards the vanishing point
        if rng.random() < 0.6:
            _draw_side(draw, side, (vanishing, line), _muted(rng), rng)


def _draw_tiles(
    draw: ImageDraw.ImageDraw, to: tuple[float, float], line: float, floor: Colour, rng: Random
) -> None:
    """Every other tile of a floor whose lines run to the point `to`, below `line`."""
    height, tone = HEIGHT * OVERSAMPLING, rng.uniform(0.86, 1.08)
    step, row, bottom = rng.uniform(20, 60), 0, float(height)
    while bottom > line + 4 and row < 14:
        top = to[1] + (bottom - to[1]) * rng.uniform(0.74, 0.84)
        for column in range(-7 - row % 2, 8, 2):
            ends = [
                (column * step, bottom),
                ((column + 1) * step, bottom),
                ((column + 1) * step, top),
                (column * step, top),
            ]
            corners = [(to[0] + x * (y - to[1]) / (height - to[1]), y) for x, y in ends]
            draw.polygon([(x, max(y, line)) for x, y in corners], shade(floor, tone))
        row, bottom = row + 1, top


def _draw_side(
    draw: ImageDraw.ImageDraw, side: float, to: tuple[float, float], colour: Colour, rng: Random
) -> None:
    """A wall along the left or right edge with some boards on it."""

    def at(along: float, up: float) -> tuple[float, float]:
        x = side + (to[0] - side) * along
        return x, to[1] + (foot - to[1]) * (1 - along) + (top - foot) * (1 - along) * up

    foot, top = HEIGHT * OVERSAMPLING * rng.uniform(0.6, 1.2), -HEIGHT * OVERSAMPLING * rng.uniform(0.2, 1.0)
    end = rng.uniform(0.3, 0.7)
    draw.polygon([at(0, 0), at(end, 0), at(end, 1), at(0, 1)], colour)
    for _ in range(rng.randint(0, 4)):
        start, low = rng.uniform(0, end - 0.1), rng.uniform(0.05, 0.7)
        length, tall = rng.uniform(0.05, 0.15), rng.uniform(0.1, 0.4)
        _draw_board(
            draw,
            [at(start, low), at(start + length, low), at(start + length, low + tall), at(start, low + tall)],
            rng,
        )


def _draw_board(draw: ImageDraw.ImageDraw, corners: list[tuple[float, float]], rng: Random) -> None:
    colour = _jitter(rng.choice(list(COLOURS.values())), rng, 40) if rng.random() < 0.5 else _muted(rng)
    draw.polygon(corners, colour, shade(colour, 0.6))


def _muted(rng: Random) -> Colour:
    grey = rng.randint(95, 215)
    return _jitter((grey, grey, grey), rng, 26)


def _jitter(colour: Colour, rng: Random, most: int) -> Colour:
    red, green, blue = (min(255, max(0, channel + rng.randint(-most, most))) for channel in colour)
    return red, green, blue
