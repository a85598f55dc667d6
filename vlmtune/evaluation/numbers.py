"""Find the number in a text, written in digits, English words or Korean numerals."""

import re
from collections.abc import Iterable

from vlmtune.evaluation.text import normalize

MAX_DIGITS = 15  # a float cannot represent more digits exactly


def _numbered(first: int, step: int, text: str) -> dict[str, int]:
    """The words of `text` with the values first, first + step, …"""
    return {word: first + place * step for place, word in enumerate(text.split())}


def _alternation(words: Iterable[str]) -> str:
    """A regular expression that matches any of the words, the longest first."""
    return f"(?:{'|'.join(sorted(words, key=len, reverse=True))})"


_ONES = _numbered(1, 1, "one two three four five six seven eight nine")
_TEENS = _numbered(10, 1, "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
_TENS = _numbered(20, 10, "twenty thirty forty fifty sixty seventy eighty ninety")
_ZERO_WORDS = {"zero": 0, "none": 0, "nobody": 0, "no one": 0}
_NATIVE_ONES = (
    _numbered(1, 1, "하나 둘 셋 넷 다섯 여섯 일곱 여덟 아홉")
    | _numbered(1, 1, "한 두 세 네")
    | {"석": 3, "넉": 4}
)
_NATIVE_TENS = _numbered(10, 10, "열 스물 서른 마흔 쉰 예순 일흔 여든 아흔") | {"스무": 20}
_SINO_ONES = _numbered(1, 1, "일 이 삼 사 오 육 칠 팔 구")
# A scale multiplies what comes before it: a small scale the last numeral, a large scale everything since the
# last large scale.
_SMALL = {"hundred": 100, "십": 10, "백": 100, "천": 1000}
_LARGE = {"thousand": 1000, "million": 10**6, "만": 10**4, "억": 10**8}
_VALUES = (
    _ONES
    | _TEENS
    | _TENS
    | _ZERO_WORDS
    | _NATIVE_ONES
    | _NATIVE_TENS
    | _SINO_ONES
    | {"영": 0}
    | _SMALL
    | _LARGE
)
_NUMERAL = re.compile(_alternation(_VALUES))

_BELOW_100 = rf"(?:{_alternation(_TENS)}(?:\s{_alternation(_ONES)})?|{_alternation(_TEENS | _ONES)})"
_BELOW_1000 = rf"(?:(?:{_BELOW_100}\s)?hundred(?:\s(?:and\s)?{_BELOW_100})?|{_BELOW_100})"
_SCALED = rf"(?:\s(?:thousand|million)(?:\s(?:and\s)?{_BELOW_1000})?)*"
_ENGLISH = rf"\b(?:{_alternation(_ZERO_WORDS)}|{_BELOW_1000}{_SCALED})\b"
# Nearly all Korean numerals are also syllables of other words: 이 is "this", 네 "yes", 세계 "world".
# So a numeral counts only at the start of a word and before a counter. A long native numeral also counts
# alone, perhaps with a particle, and any numeral counts as the whole text.
_COUNTERS = _alternation(
    ["명", "분", "사람", "마리", "개", "권", "장", "병", "잔", "채", "그루", "송이", "켤레", "쌍", "살"]
)
_NATIVE = rf"(?:{_alternation(_NATIVE_TENS)}{_alternation(_NATIVE_ONES)}?|{_alternation(_NATIVE_ONES)})"
_LONG = _alternation(word for word in {**_NATIVE_ONES, **_NATIVE_TENS} if len(word) > 1 and word != "스무")
_SINO = rf"(?:{_alternation(_SINO_ONES)}?[십백천만억])+{_alternation(_SINO_ONES)}?"
_KOREAN = (
    rf"(?<![가-힣])(?:(?:(?:{_SINO})?{_NATIVE}|(?![십백천만억]{_COUNTERS}){_SINO})(?=\s?{_COUNTERS}|\s대)|[십백천만](?=명)"
    rf"|{_alternation(_NATIVE_TENS)}?(?:{_LONG}|[둘셋넷](?![가-힣])|[둘셋넷](?=[이입은을로의만예])))|^{_alternation(_VALUES)}+$"
)
_DIGITS = r"(?P<digits>(?<![\d.])-?\d+(?:\.\d+)?)(?P<scale>[천만억]*)"  # 3만 too
_NUMBER = re.compile(f"{_DIGITS}|{_ENGLISH}|{_KOREAN}")


def first_number(text: str) -> float | None:
    """The first number in a text, or None.

    A number is written in one of these ways:

    - digits of any script, with thousands separators, a decimal point or a minus sign;
    - English words up to the millions, where "none", "no one" and "nobody" are 0;
    - Korean numerals before a counter (세 명, 열두 마리, 이십삼 개), long native numerals alone
      (다섯입니다), or any numeral as the whole text (삼).

    Digits longer than MAX_DIGITS are skipped.
    """
    return next(
        (value for value in map(_value, _NUMBER.finditer(normalize(text))) if value is not None), None
    )


def split_numbers(text: str) -> tuple[list[float], str]:
    """All numbers of a text, and the normalized text around them with `#` in place of each number."""
    normalized = normalize(text)
    values = [value for value in map(_value, _NUMBER.finditer(normalized)) if value is not None]
    return values, _NUMBER.sub("#", normalized)


def _value(match: re.Match[str]) -> float | None:
    """The value of a match of `_NUMBER`; None for too many digits."""
    if match["digits"] is None:
        return float(_numeral_value(_NUMERAL.findall(match.group())))
    if len(match["digits"]) > MAX_DIGITS:
        return None
    return float(match["digits"]) * _numeral_value(match["scale"] or "일")


def _numeral_value(numerals: Iterable[str]) -> int:
    """The value of consecutive numerals, such as 325 for ["three", "hundred", "twenty", "five"]."""
    total = section = last = 0
    for numeral in numerals:
        value = _VALUES[numeral]
        if numeral in _LARGE:
            total, section, last = total + max(section + last, 1) * value, 0, 0
        elif numeral in _SMALL:
            section, last = section + max(last, 1) * value, 0
        else:
            last += value
    return total + section + last
