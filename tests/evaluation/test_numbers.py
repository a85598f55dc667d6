"""Which number a text tells, and which texts tell none."""

import pytest

from vlmtune.evaluation.numbers import first_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # digits
        ("3", 3), ("There are 3 people.", 3), ("3명입니다.", 3), ("３", 3), ("１，２３４명", 1234),
        ("1,234.5 kg", 1234.5),
        ("-5 degrees", -5), ("3.", 3), ("3-4", 3), ("3 or 4", 3), ("0", 0), ("٣", 3), ("३", 3),
        ("frame12", 12),
        ("3만 명", 30_000), ("2천만 원", 20_000_000),
        # English words
        ("three", 3), ("There are Three people.", 3), ("twenty-one cats", 21),
        ("one hundred and twenty three", 123), ("a hundred", 100),
        ("two thousand five hundred", 2500), ("three hundred twenty five thousand and six", 325_006),
        ("two million", 2_000_000),
        ("two and three", 2), ("Five, maybe 6", 5), ("none", 0), ("No one is here.", 0), ("Nobody", 0),
        ("zero", 0),
        # Korean numerals
        ("세 명", 3), ("세명입니다.", 3), ("네, 세 명입니다", 3),
        ("이 사진에는 열두 명이 있습니다.", 12), ("스물세 마리", 23),
        ("스무 명", 20), ("두 사람이 세 대의 차를 봅니다", 2), ("다섯입니다", 5), ("열둘입니다.", 12),
        ("둘이 있어요", 2), ("하나", 1), ("이십삼 개", 23),
        ("백이십 명", 120), ("백스물세 명", 123), ("이천삼백사십오 명", 2345), ("이만 명", 20_000),
        ("십 명", 10), ("십명", 10),
        ("삼", 3), ("영", 0),
        ("둘러보면 네 명", 4), ("천장에 두 개", 2),
    ],
)  # fmt: skip
def test_a_number(text: str, expected: float) -> None:
    assert first_number(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "No.", "no idea", "someone", "a stone", "often", "하늘이 맑습니다", "네, 그렇습니다",
        "이 사람", "한국 사람", "세계의 모든 것",
        "나무 사이 개가",
        "만개한 꽃", "천장", "아무도 없습니다", "9" * 16, "USER:",
    ],
)  # fmt: skip
def test_no_number(text: str) -> None:
    assert first_number(text) is None
