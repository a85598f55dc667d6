"""Sample files to try vlmtune on: drawn pictures of a mall with a known number of people, and questions
about construction terms.

All choices come from `random.Random`, whose numbers are the same on every machine, so that a seed always
gives the same rows.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageEnhance

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom

WIDTH, HEIGHT = 112, 84  # pixels of a frame
OVERSAMPLING = 4  # drawn this much larger, then reduced: smooth edges
FOCAL_LENGTH = 96.0  # pixels
CAMERA_HEIGHT = 3.0  # metres above the floor
HALL_HALF_WIDTH, HALL_NEAR, HALL_FAR, HALL_HEIGHT = 4.0, 4.0, 16.0, 5.0  # metres
BAY = 3.0  # metres of wall that one shop takes
# one digit, so that an answer is one token in most vocabularies; more would hide each other in so small a
# frame
MAX_PEOPLE = 6
NOISE = 0.06  # share of sensor noise in a frame

MESSAGES = """\
USER: How many people are in this picture of the mall?
ASSISTANT: {count}

사용자: 이 쇼핑몰 사진에 사람이 몇 명 있습니까?
어시스턴트: {count}명
"""

SHIRTS: list[Colour] = [
    (196, 48, 44), (38, 82, 160), (236, 190, 62), (46, 128, 84), (240, 240, 236), (40, 42, 50), (148, 78, 150), (226, 122, 52),
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
    """A fixed camera: where its vanishing point lies in the frame (pixels) and what its part of the mall
    looks like."""

    name: str
    vanishing_point: Point
    wall: Colour
    floor: Colour

    def project(self, x: float, y: float, z: float) -> Point:
        """The pixel, of the oversampled picture, of a place x metres right of the hall's middle, y above the
        floor and z away."""
        left, top = self.vanishing_point
        return (left + FOCAL_LENGTH * x / z) * OVERSAMPLING, (
            top + FOCAL_LENGTH * (CAMERA_HEIGHT - y) / z
        ) * OVERSAMPLING


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
        """The pixels, of the oversampled picture, that this person takes."""
        left, top = camera.project(self.x - 0.3, self.height, self.z)
        right, bottom = camera.project(self.x + 0.3, 0.0, self.z)
        return left, top, right, bottom


def write_mall(folder: Path | str, frames: int = 96, seed: int = 0) -> None:
    """Write `frames` pictures of 112x84 pixels, their counts and two example dialogues, as a frames folder.

    The folder then holds `frames/seq_000001.jpg` …, `messages.txt` and `labels.csv` (columns id, count,
    camera). The CSV comes last:
    a folder that has it is whole.
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


def write_instructions(path: Path | str, seed: int = 0) -> None:
    """Write the 60 questions about construction terms, Korean and English in the seed's order, as
    instruction JSONL."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(instruction_rows())
    Random(seed).shuffle(rows)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    unfinished.replace(path)


def instruction_rows() -> Iterator[dict[str, str]]:
    """The rows of `write_instructions`, Korean first, in the order of the tables below."""
    for questions, terms in ((KOREAN_QUESTIONS, KOREAN_TERMS), (ENGLISH_QUESTIONS, ENGLISH_TERMS)):
        for number, (term, meaning) in enumerate(terms.items()):
            yield {"instruction": questions[number % len(questions)], "input": term, "output": meaning}


def sample_texts() -> list[str]:
    """All text of the sample files, with the words that prompts add: what a tokenizer for them should
    know."""
    dialogues = [MESSAGES.format(count=count) for count in range(10)]
    return [
        *dialogues,
        *("\n".join(row.values()) for row in instruction_rows()),
        "USER: ASSISTANT: User: Assistant: System: user assistant system",
    ]


def _place_people(number: int, camera: Camera, rng: Random) -> list[Person]:
    """That many people, farthest first, each at the freest of a few dozen places, so that few overlap."""
    people: list[Person] = []
    for _ in range(number):
        candidates = [_somebody(camera, rng) for _ in range(40)]
        taken = [_widened(person.box(camera)) for person in people]
        people.append(
            min(
                candidates,
                key=lambda candidate: max(
                    (_overlap(_widened(candidate.box(camera)), box) for box in taken), default=0.0
                ),
            )
        )
    return sorted(people, key=lambda person: -person.z)


def _somebody(camera: Camera, rng: Random) -> Person:
    z = rng.uniform(4.9, 9.5)
    margin = 4.0  # pixels between a person's middle and the frame's edge
    left, right = ((edge - camera.vanishing_point[0]) * z / FOCAL_LENGTH for edge in (margin, WIDTH - margin))
    x = rng.uniform(max(left, -2.9), min(right, 2.9))
    looks = rng.choice(SHIRTS), rng.choice(TROUSERS), rng.choice(SKIN), rng.choice(HAIR)
    return Person(x, z, rng.uniform(1.55, 1.85), *looks, seen_from_behind=rng.random() < 0.5)


def _widened(box: Box) -> Box:
    """With the space that people keep to each other: 4 pixels of the frame on either side."""
    return box[0] - 4 * OVERSAMPLING, box[1], box[2] + 4 * OVERSAMPLING, box[3]


def _overlap(one: Box, other: Box) -> float:
    """The common area over the smaller one's area: 0 to 1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(0.0, width) * max(0.0, height) / smaller


def _draw_frame(scenery: Image.Image, camera: Camera, people: list[Person], rng: Random) -> Image.Image:
    picture = scenery.copy()
    draw = ImageDraw.Draw(picture)
    for person in people:
        _draw_person(draw, person, camera)
    frame = picture.reduce(OVERSAMPLING)  # 4 ms less than a Lanczos filter takes
    frame = ImageEnhance.Brightness(frame).enhance(rng.uniform(0.85, 1.1))
    noise = Image.frombytes("L", (WIDTH, HEIGHT), rng.randbytes(WIDTH * HEIGHT)).convert("RGB")
    return Image.blend(frame, noise, NOISE)


def _draw_scenery(camera: Camera, rng: Random) -> Image.Image:
    """The empty hall: tiled floor, shops along both walls, an entrance at the far end, plants. Size: the
    oversampled frame's."""
    picture = Image.new("RGB", (WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING), _shade(camera.wall, 1.12))
    draw = ImageDraw.Draw(picture)
    for depth in range(int(HALL_FAR), 1, -1):
        for column in range(int(-HALL_HALF_WIDTH), int(HALL_HALF_WIDTH)):
            corners = [(column, depth), (column + 1, depth), (column + 1, depth - 1), (column, depth - 1)]
            tone = (0.93 if (column + depth) % 2 else 1.0) * (1.06 - 0.012 * depth)  # the far end is darker
            draw.polygon(
                [camera.project(x, 0.0, z) for x, z in corners],
                _shade(camera.floor, tone),
                _shade(camera.floor, tone * 0.9),
            )
    far = [
        (-HALL_HALF_WIDTH, 0.0),
        (HALL_HALF_WIDTH, 0.0),
        (HALL_HALF_WIDTH, HALL_HEIGHT),
        (-HALL_HALF_WIDTH, HALL_HEIGHT),
    ]
    draw.polygon([camera.project(x, y, HALL_FAR) for x, y in far], _shade(camera.wall, 0.9))
    _draw_panel(
        draw,
        [camera.project(x, y, HALL_FAR) for x, y in [(-1.8, 0), (1.8, 0), (1.8, 2.4), (-1.8, 2.4)]],
        (150, 178, 190),
    )
    _draw_panel(
        draw,
        [camera.project(x, y, HALL_FAR) for x, y in [(-2.4, 2.8), (2.4, 2.8), (2.4, 3.5), (-2.4, 3.5)]],
        rng.choice(SIGNS),
    )
    for side in (-HALL_HALF_WIDTH, HALL_HALF_WIDTH):
        for bay in range(int((HALL_FAR - HALL_NEAR) / BAY)):
            _draw_shop(draw, camera, side, HALL_FAR - bay * BAY, rng)
        _draw_plant(draw, camera, side * 0.86, rng.uniform(9.0, 13.0), rng)
    return picture


def _draw_shop(draw: ImageDraw.ImageDraw, camera: Camera, side: float, far: float, rng: Random) -> None:
    """One bay of a side wall that ends `far` metres away: wall, lit window, sign."""

    def quad(start: float, end: float, bottom: float, top: float) -> list[Point]:
        return [
            camera.project(side, y, far - z)
            for z, y in ((start, bottom), (end, bottom), (end, top), (start, top))
        ]

    draw.polygon(quad(0.0, BAY, 0.0, HALL_HEIGHT), _shade(camera.wall, 0.82))
    _draw_panel(draw, quad(0.3, BAY - 0.3, 0.15, 2.3), _shade((236, 224, 180), rng.uniform(0.75, 1.05)))
    _draw_panel(draw, quad(0.3, BAY - 0.3, 2.55, 3.2), rng.choice(SIGNS))


def _draw_panel(draw: ImageDraw.ImageDraw, corners: list[Point], colour: Colour) -> None:
    draw.polygon(corners, colour, _shade(colour, 0.6), width=2)


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
        """Metres from where the person stands, heights as a share of the person's."""
        corners = ((left, top), (right, bottom))
        return [camera.project(person.x + across, up * person.height, person.z) for across, up in corners]

    pixels = FOCAL_LENGTH * OVERSAMPLING / person.z  # in a metre
    draw.ellipse(box(-0.32, 0.04, 0.36, -0.04), _shade(camera.floor, 0.62))  # shadow
    for left, right in ((-0.16, -0.02), (0.02, 0.16)):
        draw.rounded_rectangle(box(left, 0.52, right, 0.0), pixels * 0.04, person.trousers)
    for left, right in ((-0.3, -0.19), (0.19, 0.3)):
        draw.rounded_rectangle(box(left, 0.81, right, 0.46), pixels * 0.05, _shade(person.shirt, 0.8))
    draw.rounded_rectangle(box(-0.2, 0.83, 0.2, 0.47), pixels * 0.08, person.shirt)
    draw.rectangle(box(-0.05, 0.86, 0.05, 0.82), person.skin)  # neck
    draw.ellipse(box(-0.115, 0.99, 0.115, 0.84), person.skin)
    draw.pieslice(
        box(-0.125, 1.0, 0.125, 0.85),
        *((0, 360) if person.seen_from_behind else (180, 360)),
        fill=person.hair,
    )


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


KOREAN_QUESTIONS = [
    "다음 건설 용어를 설명하세요.",
    "건설 현장에서 이 말은 무슨 뜻입니까?",
    "이 용어의 뜻을 한 문장으로 쓰세요.",
]
ENGLISH_QUESTIONS = [
    "Explain this construction term.",
    "What does this word mean on a building site?",
    "Define this term in one sentence.",
]

KOREAN_TERMS = {
    "거푸집": "콘크리트가 굳을 때까지 모양을 잡아 주는 임시 틀입니다.",
    "동바리": "거푸집과 굳지 않은 콘크리트의 무게를 아래에서 받치는 기둥입니다.",
    "비계": "높은 곳에서 일할 수 있도록 건물 바깥에 세우는 임시 발판 구조물입니다.",
    "철근": "콘크리트가 약한 당기는 힘을 대신 받도록 넣는 강철 막대입니다.",
    "양생": "콘크리트가 제 강도를 내도록 물기와 온도를 지켜 주는 일입니다.",
    "타설": "섞은 콘크리트를 거푸집 안에 부어 넣는 작업입니다.",
    "슬럼프 시험": "굳지 않은 콘크리트가 얼마나 묽은지 원뿔 틀로 재는 시험입니다.",
    "기초": "건물의 무게를 땅에 고르게 전하는 가장 아래 구조입니다.",
    "말뚝": "무른 땅을 지나 단단한 층까지 박아 건물을 받치는 긴 기둥입니다.",
    "옹벽": "흙이 무너지지 않도록 뒤에서 미는 힘을 버티는 벽입니다.",
    "흙막이": "땅을 팔 때 둘레의 흙이 무너지지 않게 막는 임시 구조물입니다.",
    "터파기": "기초를 놓을 자리를 만들려고 땅을 파내는 작업입니다.",
    "되메우기": "기초를 만든 뒤 파낸 자리를 흙으로 다시 채우는 작업입니다.",
    "보": "바닥의 무게를 받아 기둥으로 전하는 가로 부재입니다.",
    "기둥": "위층의 무게를 아래로 전하는 세로 부재입니다.",
    "슬래브": "사람과 물건의 무게를 받는 판 모양의 바닥 구조입니다.",
    "내력벽": "위에서 오는 무게를 받는 벽이어서 함부로 헐 수 없습니다.",
    "커튼월": "무게를 받지 않고 건물 바깥을 덮는 가벼운 외벽입니다.",
    "방수": "물이 건물 안으로 스며들지 않도록 막는 공사입니다.",
    "단열재": "열이 드나드는 것을 줄이려고 벽과 지붕에 넣는 재료입니다.",
    "줄눈": "벽돌이나 타일 사이의 틈을 모르타르로 채운 선입니다.",
    "모르타르": "시멘트와 모래를 물로 갠 것으로 벽돌을 붙이는 데 씁니다.",
    "신축 이음": "온도에 따라 늘고 주는 움직임을 받아 주려고 일부러 둔 틈입니다.",
    "앵커 볼트": "기계나 기둥을 콘크리트에 고정하려고 묻는 볼트입니다.",
    "피복 두께": "철근 겉면에서 콘크리트 겉면까지의 거리로 녹과 불을 막아 줍니다.",
    "크레인": "무거운 자재를 들어 올려 옮기는 기계입니다.",
    "안전모": "떨어지는 물건에서 머리를 지키려고 현장에서 꼭 쓰는 모자입니다.",
    "준공": "공사가 모두 끝나 건물을 쓸 수 있게 된 상태입니다.",
    "공정표": "어떤 작업을 언제 시작하고 끝낼지 적은 계획표입니다.",
    "감리": "공사가 설계와 법에 맞게 되는지 살피고 지도하는 일입니다.",
}

ENGLISH_TERMS = {
    "formwork": "A temporary mould that holds concrete in shape until it has set.",
    "shoring": "Props that carry formwork and wet concrete from below until the concrete can carry itself.",
    "scaffold": "A temporary structure outside a building that lets people work safely at height.",
    "rebar": "Steel bars placed in concrete to take the pulling forces that concrete cannot.",
    "curing": "Keeping concrete moist and warm long enough for it to reach its strength.",
    "screed": "A thin, level layer of mortar laid over a floor slab before the finish.",
    "slump test": "A test with a cone-shaped mould that shows how fluid fresh concrete is.",
    "footing": "The widened base under a wall or column that spreads its load over the ground.",
    "pile": "A long column driven or bored through soft ground down to a firm layer.",
    "retaining wall": "A wall that holds back soil and resists its sideways push.",
    "underpinning": "Strengthening the foundation of a building that already stands.",
    "excavation": "Digging out the ground to make room for foundations or a basement.",
    "backfill": "Soil put back around a foundation after it has been built.",
    "beam": "A horizontal member that carries the load of a floor to the columns.",
    "column": "A vertical member that carries the load of the floors above down to the foundation.",
    "lintel": "A short beam over a door or window that carries the wall above the opening.",
    "load-bearing wall": "A wall that carries weight from above and must not be removed without support.",
    "curtain wall": "A light outer wall that covers a building and carries no load but its own.",
    "flashing": "Thin strips of metal that keep rain out where a roof meets a wall.",
    "insulation": "Material in walls and roofs that slows the flow of heat.",
    "grout": "A fluid mix that fills the gaps between tiles or around anchors.",
    "mortar": "A paste of cement, sand and water that binds bricks together.",
    "expansion joint": "A gap left on purpose so that parts can grow and shrink with temperature.",
    "anchor bolt": "A bolt set in concrete that fixes a column or a machine in place.",
    "concrete cover": "The distance from the steel to the surface of the concrete, which keeps out rust and fire.",
    "tower crane": "A tall fixed crane that lifts heavy materials over the whole site.",
    "hard hat": "A helmet that protects the head from falling objects on site.",
    "punch list": "The list of small faults to be mended before a building is handed over.",
    "critical path": "The chain of tasks that decides the earliest day on which a project can end.",
    "change order": "A written agreement to alter the work, price or time of a building contract.",
}
