"""Pictures of toys: what the demo's base model learns to see and to count before anybody adapts it.

A picture shows up to nine things. Most are of a named kind (a star, a lamp, …), the others are stacks of random parts that have no name.
They lie on a plain or patterned ground, or stand in a yard that is seen in perspective, with things in the back that do not count. No
picture shows people or the demo's mall: those are left for the adapter to learn.
"""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom

WIDTH, HEIGHT = 112, 84  # pixels of a picture, as of the demo's frames
OVERSAMPLING = 2  # drawn this much larger, then reduced: smooth edges
MAX_THINGS = 9
MAX_OVERLAP = 0.35  # of the smaller of two things: whatever is counted can be seen

COLOURS: dict[str, Colour] = {
    "red": (205, 45, 40), "blue": (40, 85, 175), "yellow": (236, 196, 50), "green": (48, 135, 75), "white": (240, 240, 236),
    "black": (36, 38, 44), "purple": (145, 75, 155), "orange": (228, 122, 45),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """An ellipse ("o"), a rectangle ("r") or a polygon ("p") within the unit square, in the thing's colour times `shade` or its own."""

    form: str
    points: tuple[tuple[float, float], ...]
    shade: float = 1.0
    colour: Colour | None = None


@dataclass(frozen=True)
class Kind:
    """What a thing can be: width over height, and parts from back to front. `stands`: it can be put on the ground of a yard."""

    aspect: float
    parts: tuple[Part, ...]
    stands: bool = True


def _o(left: float, top: float, right: float, bottom: float, shade: float = 1.0, colour: Colour | None = None) -> Part:
    return Part("o", ((left, top), (right, bottom)), shade, colour)


def _r(left: float, top: float, right: float, bottom: float, shade: float = 1.0, colour: Colour | None = None) -> Part:
    return Part("r", ((left, top), (right, bottom)), shade, colour)


def _p(*points: tuple[float, float], shade: float = 1.0, colour: Colour | None = None) -> Part:
    return Part("p", points, shade, colour)


WOOD, DARK, GLASS, PALE = (120, 82, 52), (50, 50, 56), (160, 195, 210), (232, 222, 200)
_STAR = ((0.5, 0.0), (0.62, 0.36), (1.0, 0.38), (0.7, 0.61), (0.81, 1.0), (0.5, 0.77), (0.19, 1.0), (0.3, 0.61), (0.0, 0.38), (0.38, 0.36))

KINDS: dict[str, Kind] = {
    "circle": Kind(1.0, (_o(0, 0, 1, 1),), stands=False),
    "square": Kind(1.0, (_r(0, 0, 1, 1),), stands=False),
    "triangle": Kind(1.0, (_p((0.5, 0), (1, 1), (0, 1)),), stands=False),
    "star": Kind(1.0, (_p(*_STAR),), stands=False),
    "cross": Kind(1.0, (_r(0.33, 0, 0.67, 1), _r(0, 0.33, 1, 0.67)), stands=False),
    "moon": Kind(0.8, (_p((0.9, 0), (0.4, 0.05), (0, 0.5), (0.4, 0.95), (0.9, 1), (0.55, 0.75), (0.45, 0.5), (0.55, 0.25)),), stands=False),
    "fish": Kind(1.6, (_o(0, 0, 0.75, 1), _p((0.65, 0.5), (1, 0.05), (1, 0.95), shade=0.8), _o(0.12, 0.3, 0.22, 0.45, 1, DARK)), stands=False),
    "tree": Kind(0.7, (_r(0.4, 0.6, 0.6, 1, 1, WOOD), _o(0, 0, 1, 0.72), _o(0.2, 0.1, 0.6, 0.4, 1.2))),
    "house": Kind(1.0, (_r(0.1, 0.4, 0.9, 1), _p((0.5, 0), (1, 0.42), (0, 0.42), shade=0.6), _r(0.4, 0.65, 0.6, 1, 1, WOOD))),
    "car": Kind(1.7, (_p((0.25, 0), (0.7, 0), (0.82, 0.45), (0.12, 0.45), shade=0.75), _r(0, 0.4, 1, 0.82),
                      _o(0.1, 0.62, 0.34, 1, 1, DARK), _o(0.66, 0.62, 0.9, 1, 1, DARK))),
    "bottle": Kind(0.36, (_r(0.33, 0.08, 0.67, 0.45), _o(0, 0.3, 1, 0.6), _r(0, 0.45, 1, 1), _r(0, 0.6, 1, 0.8, 1, PALE), _r(0.3, 0, 0.7, 0.1, 0.5))),
    "lamp": Kind(0.42, (_r(0.42, 0.3, 0.58, 1, 1, DARK), _r(0.2, 0.93, 0.8, 1, 1, DARK), _p((0.25, 0), (0.75, 0), (1, 0.35), (0, 0.35)))),
    "cone": Kind(0.7, (_p((0.42, 0), (0.58, 0), (0.88, 0.9), (0.12, 0.9)), _p((0.3, 0.4), (0.7, 0.4), (0.77, 0.6), (0.23, 0.6), colour=PALE),
                       _r(0, 0.88, 1, 1, 0.7))),
    "mushroom": Kind(0.85, (_r(0.34, 0.4, 0.66, 1, 1, PALE), _p((0, 0.5), (0.12, 0.18), (0.5, 0), (0.88, 0.18), (1, 0.5)), _o(0.3, 0.1, 0.5, 0.3, 1, PALE))),
    "cup": Kind(1.05, (_o(0.6, 0.2, 1, 0.75, 0.7), _p((0, 0), (0.8, 0), (0.7, 1), (0.1, 1)), _o(0, 0, 0.8, 0.2, 0.5))),
    "flower": Kind(0.6, (_r(0.45, 0.4, 0.55, 1, 1, (60, 120, 60)), _o(0, 0, 0.55, 0.3), _o(0.45, 0, 1, 0.3), _o(0, 0.25, 0.55, 0.55), _o(0.45, 0.25, 1, 0.55),
                           _o(0.33, 0.17, 0.67, 0.38, 1, (240, 200, 60)))),
    "rocket": Kind(0.45, (_p((0, 1), (0.2, 0.6), (0.8, 0.6), (1, 1), shade=0.6), _o(0.18, 0, 0.82, 0.7), _r(0.18, 0.35, 0.82, 0.92), _o(0.35, 0.3, 0.65, 0.46, 1, GLASS))),
    "umbrella": Kind(0.8, (_r(0.46, 0.3, 0.54, 1, 1, DARK), _p((0, 0.45), (0.15, 0.15), (0.5, 0), (0.85, 0.15), (1, 0.45)),
                           _p((0.35, 0.45), (0.5, 0), (0.65, 0.45), shade=0.75))),
}  # fmt: skip
NAMES = tuple(KINDS)
STANDING = tuple(name for name, kind in KINDS.items() if kind.stands)


@dataclass(frozen=True)
class Thing:
    """One thing of a picture: its kind (None: it has no name), its colour and the box that it takes (pixels of the picture)."""

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
    """A picture of 112x84 pixels and the 0 to 9 things in it, back to front. Costs about 1.5 ms."""
    picture = Image.new("RGB", (WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING))
    draw = ImageDraw.Draw(picture)
    yard = rng.random() < 0.6
    horizon = rng.uniform(8, 40)
    if yard:
        _draw_yard(draw, horizon, rng)
    else:
        _draw_ground(draw, rng)
    things = []
    for kind, colour, aspect in _choose(yard, rng):
        things.append(Thing(kind, colour, _place(things, aspect, horizon if yard else None, rng)))
    things.sort(key=lambda thing: thing.box[3])
    for thing in things:
        _draw_thing(draw, thing, yard, rng)
    return picture.reduce(OVERSAMPLING), things


def _choose(yard: bool, rng: Random) -> list[tuple[str | None, str, float]]:
    """What is in the picture: kind, colour and aspect of each thing. Few kinds and few colours, so that there is much to count."""
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
    """The box of another thing: the first of some random places where it hides nothing, else the freest of them."""
    best: tuple[float, Box] | None = None
    for _ in range(30):
        box = _anywhere(aspect, rng) if horizon is None else _standing(aspect, horizon, rng)
        hidden = max((overlap(box, thing.box) for thing in things), default=0.0)
        if best is None or hidden < best[0]:
            best = hidden, box
        if hidden < MAX_OVERLAP * rng.random():
            break
    assert best is not None
    return best[1]


def _anywhere(aspect: float, rng: Random) -> Box:
    height = 9 * 3.6 ** rng.random() / max(1.0, aspect) ** 0.5  # pixels
    width = height * aspect
    left, top = rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height)
    return left, top, left + width, top + height


def _standing(aspect: float, horizon: float, rng: Random) -> Box:
    """On the ground: the nearer to the lower edge, the larger. Things are 0.8 to 1.3 of a man's height, the camera is at 3 m or so."""
    foot = horizon + (HEIGHT - 4 - horizon) * rng.uniform(0.2, 1.0)
    height = max(9.0, (foot - horizon) * rng.uniform(0.45, 0.72)) / max(1.0, aspect) ** 0.5
    width = height * aspect
    middle = rng.uniform(3, WIDTH - 3)
    return middle - width / 2, foot - height, middle + width / 2, foot


def overlap(one: Box, other: Box) -> float:
    """The common area over the smaller one's area: 0 to 1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(0.0, width) * max(0.0, height) / smaller


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, yard: bool, rng: Random) -> None:
    left, top, right, bottom = (edge * OVERSAMPLING for edge in thing.box)
    width, height = right - left, bottom - top
    if yard and rng.random() < 0.6:
        draw.ellipse((left - width * 0.05, bottom - height * 0.05, right + width * 0.1, bottom + height * 0.05), (90, 88, 84))
    colour = _jitter(COLOURS[thing.colour], rng, 14)
    for part in KINDS[thing.kind].parts if thing.kind else _stack(rng):
        points = [(left + x * width, top + y * height) for x, y in part.points]
        fill = _shade(part.colour or colour, part.shade)
        if part.form == "o":
            draw.ellipse(points, fill)
        elif part.form == "r":
            draw.rectangle(points, fill)
        else:
            draw.polygon(points, fill)


def _stack(rng: Random) -> list[Part]:
    """A thing without a name: two to five random parts on top of each other, one of them in the thing's colour."""
    number = rng.randint(2, 5)
    cuts = [0.0, *sorted(rng.uniform(0.12, 0.88) for _ in range(number - 1)), 1.0]
    parts = []
    for at, (top, bottom) in enumerate(zip(cuts, cuts[1:], strict=False)):
        middle, half = rng.uniform(0.42, 0.58), rng.uniform(0.15, 0.42)
        own = None if at == number // 2 else _jitter(rng.choice(list(COLOURS.values())), rng, 40)
        left, right = middle - half, middle + half
        if rng.random() < 0.15:  # two beside each other
            parts += [_r(left, top, middle - 0.05, bottom, 1, own), _r(middle + 0.05, top, right, bottom, 1, own)]
        elif rng.random() < 0.4:
            parts.append(_o(left, max(0.0, top - 0.03), right, min(1.0, bottom + 0.03), 1, own))
        elif rng.random() < 0.5:
            parts.append(_r(left, top, right, bottom, 1, own))
        else:
            parts.append(_p((middle - half * rng.random(), top), (middle + half * rng.random(), top), (right, bottom), (left, bottom), colour=own))
    return parts


def _draw_ground(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    """The whole picture in a muted colour: plain, in bands, in tiles or with stains."""
    width, height = WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING
    base = _muted(rng)
    draw.rectangle((0, 0, width, height), base)
    pattern = rng.choice(("plain", "bands", "tiles", "stains"))
    step = rng.randint(12, 50)
    if pattern == "bands":
        slope = rng.uniform(-60, 60)
        for at in range(-step * 4, width + step * 4, 2 * step):
            draw.polygon([(at, 0), (at + step, 0), (at + step + slope, height), (at + slope, height)], _shade(base, 0.93))
    elif pattern == "tiles":
        for row in range(height // step + 1):
            for column in range(row % 2, width // step + 1, 2):
                draw.rectangle((column * step, row * step, (column + 1) * step, (row + 1) * step), _shade(base, 0.93))
    elif pattern == "stains":
        for _ in range(12):
            x, y, size = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(10, 60)
            draw.ellipse((x - size, y - size, x + size, y + size), _jitter(base, rng, 12))


def _draw_yard(draw: ImageDraw.ImageDraw, horizon: float, rng: Random) -> None:
    """A ground in perspective below the horizon; above it, and at both sides, walls and boards that are no things."""
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


def _draw_tiles(draw: ImageDraw.ImageDraw, to: tuple[float, float], line: float, floor: Colour, rng: Random) -> None:
    """Every other tile of a floor whose lines run to the point `to`, below `line`."""
    height, tone = HEIGHT * OVERSAMPLING, rng.uniform(0.86, 1.08)
    step, row, bottom = rng.uniform(20, 60), 0, float(height)
    while bottom > line + 4 and row < 14:
        top = to[1] + (bottom - to[1]) * rng.uniform(0.74, 0.84)
        for column in range(-7 - row % 2, 8, 2):
            ends = [(column * step, bottom), ((column + 1) * step, bottom), ((column + 1) * step, top), (column * step, top)]
            corners = [(to[0] + x * (y - to[1]) / (height - to[1]), y) for x, y in ends]
            draw.polygon([(x, max(y, line)) for x, y in corners], _shade(floor, tone))
        row, bottom = row + 1, top


def _draw_side(draw: ImageDraw.ImageDraw, side: float, to: tuple[float, float], colour: Colour, rng: Random) -> None:
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
        _draw_board(draw, [at(start, low), at(start + length, low), at(start + length, low + tall), at(start, low + tall)], rng)


def _draw_board(draw: ImageDraw.ImageDraw, corners: list[tuple[float, float]], rng: Random) -> None:
    colour = _jitter(rng.choice(list(COLOURS.values())), rng, 40) if rng.random() < 0.5 else _muted(rng)
    draw.polygon(corners, colour, _shade(colour, 0.6))


def _muted(rng: Random) -> Colour:
    grey = rng.randint(95, 215)
    return _jitter((grey, grey, grey), rng, 26)


def _jitter(colour: Colour, rng: Random, most: int) -> Colour:
    red, green, blue = (min(255, max(0, channel + rng.randint(-most, most))) for channel in colour)
    return red, green, blue


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue
