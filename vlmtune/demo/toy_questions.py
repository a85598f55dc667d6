"""Questions and answers, English and Korean, about the images of `toys`, for the demo's base model.

No question is about people in an image. The base learns the words for people and their numbers from sums
alone ("2 people and 3 more people"), so that an adapter has the vocabulary to answer with, and everything
else to learn. The texts are part of the trained base: changing one means training it again.
"""

from collections.abc import Callable
from random import Random

from vlmtune.demo.toy_kinds import COLOURS, NAMES
from vlmtune.demo.toys import MAX_THINGS, Thing

Turn = tuple[str, str]  # question, answer
Question = Callable[[list[Thing], Random], Turn | None]

KOREAN = {
    "circle": "원", "square": "네모", "triangle": "세모", "star": "별", "cross": "십자", "moon": "달",
    "fish": "물고기", "tree": "나무", "house": "집", "car": "자동차", "bottle": "병", "lamp": "등",
    "cone": "고깔", "mushroom": "버섯", "cup": "컵", "flower": "꽃", "rocket": "로켓", "umbrella": "우산",
    "elephant": "코끼리", "boat": "배", "clock": "시계", "chair": "의자", "cat": "고양이", "horse": "말",
    "book": "책", "bird": "새", "train": "기차", "key": "열쇠", "apple": "사과", "bell": "종",
}  # fmt: skip
ABSENT = tuple(name for name in KOREAN if name not in NAMES)  # never drawn: their number is 0
COUNTERS = {
    "car": "대",
    "fish": "마리",
    "elephant": "마리",
    "cat": "마리",
    "bird": "마리",
    "horse": "마리",
    "book": "권",
    "train": "대",
}
KOREAN_COLOURS = {
    "red": "빨간색", "blue": "파란색", "yellow": "노란색", "green": "초록색",
    "white": "하얀색", "black": "검은색", "purple": "보라색", "orange": "주황색",
}  # fmt: skip
PLURALS = {"fish": "fish", "cross": "crosses"}
SIDES: dict[str, tuple[str, Callable[[Thing], float]]] = {
    "on the left": ("왼쪽", lambda thing: -thing.middle[0]),
    "on the right": ("오른쪽", lambda thing: thing.middle[0]),
    "at the top": ("위", lambda thing: -thing.middle[1]),
    "at the bottom": ("아래", lambda thing: thing.middle[1]),
}
ADDED = (("people", "사람", "명"), ("people", "사람", "명"), ("books", "책", "권"), ("cars", "자동차", "대"))
IMAGE_WORDS = (("picture", "그림"), ("picture", "사진"), ("image", "이미지"))


def ask(things: list[Thing], rng: Random) -> Turn:
    """One question about an image with these things in it, and the answer."""
    named = all(thing.kind for thing in things)
    kinds: list[tuple[Question, int]] = [
        (count_kind, 5),
        (count_all, 2 if named else 6),
        (is_there, 1),
        (add, 1),
    ]
    if things and named:
        kinds += [(count_colour, 2), (count_both, 1), (colour_of, 1), (far_side, 1), (largest, 1), (more, 1)]
    questions, weights = [question for question, _ in kinds], [weight for _, weight in kinds]
    while True:
        turn = rng.choices(questions, weights)[0](things, rng)
        if turn is not None:
            return turn


def count_kind(things: list[Thing], rng: Random) -> Turn:
    name = _some_name(things, rng)
    number = sum(thing.kind == name for thing in things)
    return _how_many(_plural(name), KOREAN[name], COUNTERS.get(name, "개"), number, rng)


def count_all(things: list[Thing], rng: Random) -> Turn:
    return _how_many("things", "물건", "개", len(things), rng)


def count_colour(things: list[Thing], rng: Random) -> Turn:
    colour = rng.choice([*(thing.colour for thing in things), rng.choice(list(COLOURS))])
    number = sum(thing.colour == colour for thing in things)
    return _how_many(f"{colour} things", f"{KOREAN_COLOURS[colour]} 물건", "개", number, rng)


def count_both(things: list[Thing], rng: Random) -> Turn:
    one, other = rng.choice(things), rng.choice(things)
    assert one.kind is not None
    number = sum((thing.kind, thing.colour) == (one.kind, other.colour) for thing in things)
    plural, korean = (
        f"{other.colour} {_plural(one.kind)}",
        f"{KOREAN_COLOURS[other.colour]} {KOREAN[one.kind]}",
    )
    return _how_many(plural, korean, COUNTERS.get(one.kind, "개"), number, rng)


def is_there(things: list[Thing], rng: Random) -> Turn:
    name, (image, korean) = _some_name(things, rng), rng.choice(IMAGE_WORDS)
    present = any(thing.kind == name for thing in things)
    if rng.random() < 0.5:
        return f"Is there {_article(name)} {name} in this {image}?", "Yes" if present else "No"
    return f"이 {korean}에 {_with(KOREAN[name], '이', '가')} 있습니까?", "예" if present else "아니요"


def colour_of(things: list[Thing], rng: Random) -> Turn | None:
    """None where there are things of that kind in several colours."""
    thing = rng.choice(things)
    if thing.kind is None or len({other.colour for other in things if other.kind == thing.kind}) > 1:
        return None
    if rng.random() < 0.5:
        return f"What colour is the {thing.kind}?", thing.colour
    return f"{_with(KOREAN[thing.kind], '은', '는')} 무슨 색입니까?", KOREAN_COLOURS[thing.colour]


def far_side(things: list[Thing], rng: Random) -> Turn | None:
    """What is farthest on a side; None where two things are about as far."""
    english, (korean, distance) = rng.choice(list(SIDES.items()))
    ordered = sorted(things, key=distance)
    if len(ordered) < 2 or distance(ordered[-1]) - distance(ordered[-2]) < 4:  # pixels
        return None
    return _name_it(
        f"Which thing is farthest {english}?", f"가장 {korean}에 있는 것은 무엇입니까?", ordered[-1], rng
    )


def largest(things: list[Thing], rng: Random) -> Turn | None:
    ordered = sorted(things, key=lambda thing: thing.area)
    if len(ordered) < 2 or ordered[-1].area < 1.3 * ordered[-2].area:
        return None
    return _name_it("Which thing is the largest?", "가장 큰 것은 무엇입니까?", ordered[-1], rng)


def more(things: list[Thing], rng: Random) -> Turn | None:
    """Which of two kinds there are more of; None where there are as many."""
    names = sorted({thing.kind for thing in things if thing.kind})
    if len(names) < 2:
        return None
    one, other = rng.sample(names, 2)
    lead = sum((thing.kind == one) - (thing.kind == other) for thing in things)
    if lead == 0:
        return None
    winner = one if lead > 0 else other
    if rng.random() < 0.5:
        return f"Are there more {_plural(one)} or more {_plural(other)}?", _plural(winner)
    return f"{_with(KOREAN[one], '과', '와')} {KOREAN[other]} 중 어느 것이 더 많습니까?", KOREAN[winner]


def add(things: list[Thing], rng: Random) -> Turn:
    """A sum, whose answer is not in the image. People occur in no other question."""
    total = rng.randint(0, MAX_THINGS)
    first = rng.randint(0, total)
    english, korean, counter = rng.choice(ADDED)
    if rng.random() < 0.5:
        return f"How many {english} are {first} {english} and {total - first} more {english}?", str(total)
    added = _with(f"{total - first}{counter}", "을", "를")
    return f"{korean} {first}{counter}에 {added} 더하면 몇 {counter}입니까?", f"{total}{counter}"


def vocabulary(samples: int = 4000) -> list[str]:
    """Texts with every word of the questions and answers, about as often as they occur, for the tokenizer."""
    rng = Random("vocabulary")
    texts = []
    for _ in range(samples):
        things = [
            Thing(rng.choice(NAMES), rng.choice(list(COLOURS)), _box(rng)) for _ in range(rng.randint(1, 4))
        ]
        question, answer = ask(things, rng)
        texts.append(f"USER: {question} ASSISTANT: {answer}")
    return texts


def _box(rng: Random) -> tuple[float, float, float, float]:
    x, y, size = rng.uniform(0, 90), rng.uniform(0, 60), rng.uniform(5, 30)
    return x, y, x + size, y + size


def _some_name(things: list[Thing], rng: Random) -> str:
    """A name to ask for: mostly of a thing in the image, else of one in other images, or in none."""
    present = [thing.kind for thing in things if thing.kind]
    chance = rng.random()
    if present and chance < 0.75:
        return rng.choice(present)
    return rng.choice(NAMES if chance < 0.9 else ABSENT)


def _how_many(plural: str, korean: str, counter: str, number: int, rng: Random) -> Turn:
    image, korean_image = rng.choice(IMAGE_WORDS)
    form = rng.randrange(5)
    if form == 0:
        return f"How many {plural} are in this {image}?", str(number)
    if form == 1:
        return f"How many {plural} do you see?", str(number)
    if form == 2:
        return f"Count the {plural}.", str(number)
    if form == 3:
        return (
            f"이 {korean_image}에 {_with(korean, '이', '가')} 몇 {counter} 있습니까?",
            f"{number}{counter}",
        )
    return f"{_with(korean, '은', '는')} 몇 {counter}입니까?", f"{number}{counter}"


def _name_it(english: str, korean: str, thing: Thing, rng: Random) -> Turn:
    assert thing.kind is not None
    return (english, thing.kind) if rng.random() < 0.5 else (korean, KOREAN[thing.kind])


def _plural(name: str) -> str:
    return PLURALS.get(name, name + "s")


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _with(word: str, after_consonant: str, after_vowel: str) -> str:
    """A Korean word with its particle, which depends on whether the last syllable ends in a consonant."""
    return word + (after_consonant if (ord(word[-1]) - ord("가")) % 28 else after_vowel)
