"""Sample files: drawn images of a mall with a known number of people, and two dialogues about them.

All choices come from `random.Random`, whose numbers are the same on every machine: a seed always gives the
same files.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageEnhance

from vlmtune.demo.drawing import Box, Colour, overlap, shade

Point = tuple[float, float]
WIDTH, HEIGHT = 112, 84  # pixels of a frame
OVERSAMPLING = 4  # frames are drawn this much larger and then reduced, for smooth edges
FOCAL_LENGTH = 96.0  # pixels
CAMERA_HEIGHT = 3.0  # metres above the floor
HALL_HALF_WIDTH, HALL_NEAR, HALL_FAR, HALL_HEIGHT = 4.0, 4.0, 16.0, 5.0  # metres
BAY = 3.0  # metres of wall that one shop takes
# One digit, so that an answer is one token in most vocabularies. In so small a frame more people would hide
# each other.
MAX_PEOPLE = 6
NOISE = 0.06  # share of sensor noise in a frame
PLACES_TRIED = 40  # for each person

MESSAGES = """\
USER: How many people are in this picture of the mall?
ASSISTANT: {count}

사용자: 이 쇼핑몰 사진에 사람이 몇 명 있습니까?
어시스턴트: {count}명
"""

SHIRTS: list[Colour] = [
    (196, 48, 44), (38, 82, 160), (236, 190, 62), (46, 128, 84),
    (240, 240, 236), (40, 42, 50), (148, 78, 150), (226, 122, 52),
]  # fmt: skip
TROUSERS: list[Colour] = [(34, 38, 56), (62, 62, 66), (92, 78, 62), (44, 66, 104), (24, 24, 26)]
SKIN: list[Colour] = [(242, 206, 176), (224, 178, 142), (172, 122, 86), (112, 76, 54)]
HAIR: list[Colour] = [(28, 22, 20), (70, 46, 30), (122, 84, 48), (150, 146, 142)]
SIGNS: list[Colour] = [
    (206, 58, 60),
    (44, 104, 178),
    (58, 146, 92),
    (228, 164, 46),
    (122, 70, 150),
    (36, 148, 156),
]


@dataclass(frozen=True)
class Camera:
    """A fixed camera: its vanishing point in the frame (pixels), and the colours of its part of the mall."""

    name: str
    vanishing_point: Point
    wall: Colour
    floor: Colour

    def project(self, x: float, y: float, z: float) -> Point:
        """The pixel of the oversampled frame where a place is seen.

        Args:
            x, y, z: metres to the right of the hall's middle, above the floor, and from the camera.
        """
        left, top = self.vanishing_point
        across = left + FOCAL_LENGTH * x / z
        down = top + FOCAL_LENGTH * (CAMERA_HEIGHT - y) / z
        return across * OVERSAMPLING, down * OVERSAMPLING


CAMERAS = [
    Camera("entrance", (56.0, 14.0), wall=(206, 198, 184), floor=(202, 190, 170)),
    Camera("food_court", (44.0, 16.0), wall=(196, 176, 152), floor=(176, 160, 146)),
    Camera("north_hall", (68.0, 12.0), wall=(188, 198, 206), floor=(188, 190, 192)),
    Camera("west_hall", (52.0, 17.0), wall=(212, 208, 198), floor=(160, 172, 170)),
]


@dataclass(frozen=True)
class Person:
    """Where somebody stands (metres), how tall they are (metres) and how they look."""

    x: float
    z: float
    height: float
    shirt: Colour
    trousers: Colour
    skin: Colour
    hair: Colour
    seen_from_behind: bool

    def box(self, camera: Camera) -> Box:
        """The pixels of the oversampled frame that this person takes."""
        left, top = camera.project(self.x - 0.3, self.height, self.z)
        right, bottom = camera.project(self.x + 0.3, 0.0, self.z)
        return left, top, right, bottom


def write_mall(folder: Path | str, frames: int = 96, seed: int = 0) -> None:
    """Write `frames` images of 112x84 pixels, their counts and two example dialogues, as a frames folder.

    It holds `frames/seq_000001.jpg` …, `messages.txt` and `labels.csv` (columns id, count, camera). A folder
    that has the CSV is complete.
    """
    folder = Path(folder)
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    (folder / "messages.txt").write_text(MESSAGES, encoding="utf-8")
    scenery = {camera: _draw_scenery(camera, Random(f"{seed} {camera.name}")) for camera in CAMERAS}
    rng = Random(seed)
    rows = []
    for number in range(1, frames + 1):
        camera, people = rng.choice(CAMERAS), rng.randint(0, MAX_PEOPLE)
        frame = _draw_frame(scenery[camera], camera, _place_people(people, camera, rng), rng)
        frame.save(folder / "frames" / f"seq_{number:06d}.jpg", quality=90)
        rows.append((number, people, camera.name))
    unfinished = folder / "labels.csv.part"
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("id", "count", "camera"), *rows])
    unfinished.replace(folder / "labels.csv")


def _place_people(number: int, camera: Camera, rng: Random) -> list[Person]:
    """`number` people, farthest first. Each stands at the least crowded of PLACES_TRIED random places."""
    people: list[Person] = []
    for _ in range(number):
        candidates = [_random_person(camera, rng) for _ in range(PLACES_TRIED)]
        boxes = [_widened(person.box(camera)) for person in people]
        overlaps = [
            max((overlap(_widened(candidate.box(camera)), box) for box in boxes), default=0.0)
            for candidate in candidates
        ]
        people.append(candidates[overlaps.index(min(overlaps))])
    return sorted(people, key=lambda person: -person.z)


def _random_person(camera: Camera, rng: Random) -> Person:
    z = rng.uniform(4.9, 9.5)
    margin = 4.0  # pixels between a person's middle and the frame's edge
    left, right = ((edge - camera.vanishing_point[0]) * z / FOCAL_LENGTH for edge in (margin, WIDTH - margin))
    x = rng.uniform(max(left, -2.9), min(right, 2.9))
    looks = rng.choice(SHIRTS), rng.choice(TROUSERS), rng.choice(SKIN), rng.choice(HAIR)
    return Person(x, z, rng.uniform(1.55, 1.85), *looks, seen_from_behind=rng.random() < 0.5)


def _widened(box: Box) -> Box:
    """The box with the distance that people keep to each other: 4 pixels of the frame on either side."""
    return box[0] - 4 * OVERSAMPLING, box[1], box[2] + 4 * OVERSAMPLING, box[3]


def _draw_frame(scenery: Image.Image, camera: Camera, people: list[Person], rng: Random) -> Image.Image:
    oversampled = scenery.copy()
    draw = ImageDraw.Draw(oversampled)
    for person in people:
        _draw_person(draw, person, camera)
    frame = oversampled.reduce(OVERSAMPLING)  # a Lanczos filter takes 4 ms longer
    frame = ImageEnhance.Brightness(frame).enhance(rng.uniform(0.85, 1.1))
    noise = Image.frombytes("L", (WIDTH, HEIGHT), rng.randbytes(WIDTH * HEIGHT)).convert("RGB")
    return Image.blend(frame, noise, NOISE)


def _draw_scenery(camera: Camera, rng: Random) -> Image.Image:
    """The empty hall, in the oversampled frame's size: floor, shops along both walls, an entrance, plants."""
    image = Image.new("RGB", (WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING), shade(camera.wall, 1.12))
    draw = ImageDraw.Draw(image)
    _draw_floor(draw, camera)
    _draw_far_wall(draw, camera, rng)
    for side in (-HALL_HALF_WIDTH, HALL_HALF_WIDTH):
        for bay in range(int((HALL_FAR - HALL_NEAR) / BAY)):
            _draw_shop(draw, camera, side, HALL_FAR - bay * BAY, rng)
        _draw_plant(draw, camera, side * 0.86, rng.uniform(9.0, 13.0), rng)
    return image


def _draw_floor(draw: ImageDraw.ImageDraw, camera: Camera) -> None:
    for depth in range(int(HALL_FAR), 1, -1):
        for column in range(int(-HALL_HALF_WIDTH), int(HALL_HALF_WIDTH)):
            corners = [(column, depth), (column + 1, depth), (column + 1, depth - 1), (column, depth - 1)]
            tone = (0.93 if (column + depth) % 2 else 1.0) * (1.06 - 0.012 * depth)  # the far end is darker
            draw.polygon(
                [camera.project(x, 0.0, z) for x, z in corners],
                shade(camera.floor, tone),
                shade(camera.floor, tone * 0.9),
            )


def _draw_far_wall(draw: ImageDraw.ImageDraw, camera: Camera, rng: Random) -> None:
    """The wall at the far end with the entrance and a sign over it."""

    def rectangle(half_width: float, bottom: float, top: float) -> list[Point]:
        corners = ((-half_width, bottom), (half_width, bottom), (half_width, top), (-half_width, top))
        return [camera.project(x, y, HALL_FAR) for x, y in corners]

    draw.polygon(rectangle(HALL_HALF_WIDTH, 0.0, HALL_HEIGHT), shade(camera.wall, 0.9))
    _draw_panel(draw, rectangle(1.8, 0.0, 2.4), (150, 178, 190))
    _draw_panel(draw, rectangle(2.4, 2.8, 3.5), rng.choice(SIGNS))


def _draw_shop(draw: ImageDraw.ImageDraw, camera: Camera, side: float, far: float, rng: Random) -> None:
    """One bay of a side wall that ends `far` metres away: wall, lit window, sign."""

    def quad(start: float, end: float, bottom: float, top: float) -> list[Point]:
        return [
            camera.project(side, y, far - z)
            for z, y in ((start, bottom), (end, bottom), (end, top), (start, top))
        ]

    draw.polygon(quad(0.0, BAY, 0.0, HALL_HEIGHT), shade(camera.wall, 0.82))
    _draw_panel(draw, quad(0.3, BAY - 0.3, 0.15, 2.3), shade((236, 224, 180), rng.uniform(0.75, 1.05)))
    _draw_panel(draw, quad(0.3, BAY - 0.3, 2.55, 3.2), rng.choice(SIGNS))


def _draw_panel(draw: ImageDraw.ImageDraw, corners: list[Point], colour: Colour) -> None:
    draw.polygon(corners, colour, shade(colour, 0.6), width=2)


def _draw_plant(draw: ImageDraw.ImageDraw, camera: Camera, x: float, z: float, rng: Random) -> None:
    for _ in range(14):
        leaf, height, radius = x + rng.uniform(-0.3, 0.3), rng.uniform(0.6, 1.4), rng.uniform(0.12, 0.24)
        colour = (rng.randint(30, 70), rng.randint(96, 146), rng.randint(40, 76))
        draw.ellipse(
            [
                camera.project(leaf - radius, height + radius, z),
                camera.project(leaf + radius, height - radius, z),
            ],
            colour,
        )
    pot = [(x - 0.22, 0.5), (x + 0.22, 0.5), (x + 0.16, 0.0), (x - 0.16, 0.0)]
    draw.polygon([camera.project(across, up, z) for across, up in pot], (142, 92, 62))


def _draw_person(draw: ImageDraw.ImageDraw, person: Person, camera: Camera) -> None:
    def box(left: float, top: float, right: float, bottom: float) -> list[Point]:
        """Corners in metres from the person's place; heights as a share of the person's height."""
        corners = ((left, top), (right, bottom))
        return [camera.project(person.x + across, up * person.height, person.z) for across, up in corners]

    pixels = FOCAL_LENGTH * OVERSAMPLING / person.z  # in a metre
    draw.ellipse(box(-0.32, 0.04, 0.36, -0.04), shade(camera.floor, 0.62))  # shadow
    for left, right in ((-0.16, -0.02), (0.02, 0.16)):
        draw.rounded_rectangle(box(left, 0.52, right, 0.0), pixels * 0.04, person.trousers)
    for left, right in ((-0.3, -0.19), (0.19, 0.3)):
        draw.rounded_rectangle(box(left, 0.81, right, 0.46), pixels * 0.05, shade(person.shirt, 0.8))
    draw.rounded_rectangle(box(-0.2, 0.83, 0.2, 0.47), pixels * 0.08, person.shirt)
    draw.rectangle(box(-0.05, 0.86, 0.05, 0.82), person.skin)  # neck
    draw.ellipse(box(-0.115, 0.99, 0.115, 0.84), person.skin)
    first_degree = 0 if person.seen_from_behind else 180
    draw.pieslice(box(-0.125, 1.0, 0.125, 0.85), first_degree, 360, fill=person.hair)
