import re
from random import Random

from vlmtune.demo import toy_questions
from vlmtune.demo.toys import Thing, draw_toys


def questions_of(images: int, questions: int) -> list[tuple[list[Thing], str, str]]:
    found = []
    for number in range(images):
        rng = Random(number)
        _, things = draw_toys(rng)
        found += [(things, *toy_questions.ask(things, rng)) for _ in range(questions)]
    return found


def test_people_and_the_mall_are_in_no_question_about_an_image() -> None:
    rows = questions_of(300, 12)
    sums = re.compile(
        r"How many people are (\d) people and (\d) more people\?|사람 (\d)명에 (\d)명을 더하면 몇 명입니까\?"
    )
    about = [
        (question, answer)
        for _, question, answer in rows
        if re.search("people|person|사람|명", question + answer)
    ]
    assert about
    for question, answer in about:
        found = sums.fullmatch(question)
        assert found, question
        assert int(answer.removesuffix("명")) == sum(int(number) for number in found.groups() if number)
    assert not [
        question for _, question, _ in rows if re.search("mall|쇼핑|frame|CCTV|visitor|사람들|손님", question)
    ]


def test_counts_are_right_in_both_languages() -> None:
    korean = {name: english for english, name in toy_questions.KOREAN.items()}
    english_rows = korean_rows = 0
    for things, question, answer in questions_of(300, 12):
        if match := re.fullmatch(r"How many (\w+) do you see\?", question):
            name = match[1]
            number = (
                len(things)
                if name == "things"
                else sum(
                    thing.kind is not None and toy_questions._plural(thing.kind) == name for thing in things
                )
            )
            assert answer == str(number)
            english_rows += 1
        elif (match := re.fullmatch(r"(\S+?)[은는] 몇 (\S+)입니까\?", question)) and match[1] in korean:
            assert answer == f"{sum(thing.kind == korean[match[1]] for thing in things)}{match[2]}"
            korean_rows += 1
    assert english_rows > 50 and korean_rows > 50


def test_what_is_not_there_is_none_and_what_is_unclear_is_not_asked() -> None:
    box = (10.0, 10.0, 30.0, 30.0)
    twins = [Thing("car", "red", box), Thing("tree", "blue", (10.2, 10.2, 30.2, 30.2))]
    for seed in range(50):
        assert toy_questions.far_side(twins, Random(seed)) is None
        assert toy_questions.largest(twins, Random(seed)) is None
        assert toy_questions.more(twins, Random(seed)) is None
        assert (
            toy_questions.colour_of([Thing("car", "red", box), Thing("car", "blue", box)], Random(seed))
            is None
        )
        question, answer = toy_questions.count_kind([], Random(seed))
        assert answer.startswith("0"), question
        assert toy_questions.ask([], Random(seed))


def test_sides_and_sizes() -> None:
    things = [Thing("cup", "red", (5, 40, 15, 50)), Thing("house", "blue", (60, 10, 100, 60))]
    answers = {toy_questions.far_side(things, Random(seed)) for seed in range(100)}
    assert {
        ("Which thing is farthest on the left?", "cup"),
        ("가장 오른쪽에 있는 것은 무엇입니까?", "집"),
    } <= answers
    assert {
        turn and turn[1] for turn in (toy_questions.largest(things, Random(seed)) for seed in range(20))
    } == {
        "house",
        "집",
    }


def test_korean_particles_follow_the_last_sound() -> None:
    assert [toy_questions._with(word, "이", "가") for word in ("원", "네모", "별", "나무")] == [
        "원이",
        "네모가",
        "별이",
        "나무가",
    ]
    assert [toy_questions._with(word, "을", "를") for word in ("3명", "2대", "4권")] == [
        "3명을",
        "2대를",
        "4권을",
    ]
