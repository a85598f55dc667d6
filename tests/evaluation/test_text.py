"""What counts as the same text, in several scripts."""

import unicodedata

import pytest

from vlmtune.evaluation.text import normalize, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Hello,   World! ", "hello world"),
        ("There’re 3 people.", "therere 3 people"),
        ("don't", "dont"),
        ("３명입니다。", "3명입니다"),
        ("ＡＢＣ", "abc"),
        ("「세 명」", "세 명"),
        ("Straße", "strasse"),
        ("İstanbul", "i̇stanbul"),
        ("1,234,567 people", "1234567 people"),
        ("1,23", "1 23"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("−4 °C", "-4 °c"),
        ("3-4", "3 4"),
        ("well-known", "well known"),
        ("사과, 배", "사과 배"),
        ("संख्या: ३।", "संख्या ३"),
        ("...", ""),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected
    assert normalize(expected) == expected


def test_hangul_stays_and_its_two_spellings_are_one() -> None:
    joined = "세 명이 있습니다"
    assert normalize(unicodedata.normalize("NFD", joined)) == joined


def test_numbers_that_differ_stay_different() -> None:
    assert len({normalize(text) for text in ("35", "3.5", "-3.5", "3 5", "3,500")}) == 5


def test_words_of_scripts_with_and_without_spaces() -> None:
    assert words("The two people.") == ["the", "two", "people"]
    assert words("사람이 세 명 있습니다.") == ["사람이", "세", "명", "있습니다"]
    assert words("三个人 and 2") == ["三", "个", "人", "and", "2"]
    assert words("ひとが3にん") == ["ひ", "と", "が", "3", "に", "ん"]
