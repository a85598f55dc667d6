"""Which answers are counts, and which are a few short ones."""

import pytest

from vlmtune.evaluation.answer_kinds import MAX_CLASSES, answer_classes, answer_kind


@pytest.mark.parametrize(
    ("kind", "references"),
    [
        ("count", ["3", "0", "12"]),
        ("count", ["There are 3 people.", "There is one person.", "There are 12 people."]),
        ("count", ["There are 3 people."] * 27 + ["There is one.", "Nobody.", "I see 2 of them."]),
        ("count", ["세 명", "5명", "두 명", "12명"]),
        ("number", ["36.6", "37.2"]),
        ("number", ["2019", "1998"]),
        ("number", ["-3", "4"]),
        ("text", ["yes", "no"]),
        ("text", ["12:30", "08:15"]),
        ("text", ["2024-05-01", "2024-06-12"]),
        ("text", ["007", "012"]),
        ("text", ["A red Ford of 12", "3 blue cars near a tree", "Bus 5 to Seoul", "Gate 7, row 3"]),
        ("text", []),
    ],
)
def test_kinds(kind: str, references: list[str]) -> None:
    assert answer_kind(references) == kind


def test_classes_are_few_short_and_repeated() -> None:
    assert answer_classes(["Yes", "no", "yes.", "No"] * 2) == ["Yes", "no"]
    assert answer_classes(["예", "아니요", "예", "예"]) == ["예", "아니요"]
    assert answer_classes(["a"] * 9) is None, "one answer is no confusion"
    assert answer_classes([str(number) for number in range(MAX_CLASSES + 1)] * 4) is None
    assert answer_classes(["one answer", "another"]) is None, "each once"
    assert answer_classes(["a sentence that is too long for a cell", "b"] * 4) is None
