"""The number that a text tells, in digits, English words or Korean numerals."""

import re
from collections.abc import Iterable

from vlmtune.evaluation.text import normalize

MAX_DIGITS = 15  # a float holds no more exactly


def _values(first: int, step: int, text: str) -> dict[str, int]:
    return {word: first + place * step for place, word in enumerate(text.split())}


def _either(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(sorted(words, key=len, reverse=True))})"


_ONES = _values(1, 1, "one two three four five six seven eight nine")
_TEENS = _values(10, 1, "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
_TENS = _values(20, 10, "twenty thirty forty fifty sixty seventy eighty ninety")
_NOTHING = {"zero": 0, "none": 0, "nobody": 0, "no one": 0}
_NATIVE_ONES = (
    _values(1, 1, "하나 둘 셋 넷 다섯 여섯 일곱 여덟 아홉")
    | _values(1, 1, "한 두 세 네")
    | {"석": 3, "넉": 4}
)
_NATIVE_TENS = _values(10, 10, "열 스물 서른 마흔 쉰 예순 일흔 여든 아흔") | {"스무": 20}
_SINO_ONES = _values(1, 1, "일 이 삼 사 오 육 칠 팔 구")
# A scale multiplies what stands before it: a small one the last numeral, a large one all since the last
# large one.
_SMALL = {"hundred": 100, "십": 10, "백": 100, "천": 1000}
_LARGE = {"thousand": 1000, "million": 10**6, "만": 10**4, "억": 10**8}
_ALL = (
    _ONES | _TEENS | _TENS | _NOTHING | _NATIVE_ONES | _NATIVE_TENS | _SINO_ONES | {"영": 0} | _SMALL | _LARGE
)
_NUMERAL = re.compile(_either(_ALL))

_BELOW_100 = rf"(?:{_either(_TENS)}(?:\s{_either(_ONES)})?|{_either(_TEENS | _ONES)})"
_BELOW_1000 = rf"(?:(?:{_BELOW_100}\s)?hundred(?:\s(?:and\s)?{_BELOW_100})?|{_BELOW_100})"
_ENGLISH = (
    rf"\b(?:{_either(_NOTHING)}|{_BELOW_1000}(?:\s(?:thousand|million)(?:\s(?:and\s)?{_BELOW_1000})?)*)\b"
)
# Nearly all Korean numerals are also syllables of other words (이 is "this", 네 "yes", 세 in 세계 "world"). So
# they count at the beginning
# of a word and before a counter; long native ones also alone, perhaps with a particle; any as the whole text.
_COUNTERS = _either(
    ["명", "분", "사람", "마리", "개", "권", "장", "병", "잔", "채", "그루", "송이", "켤레", "쌍", "살"]
)
_NATIVE = rf"(?:{_either(_NATIVE_TENS)}{_either(_NATIVE_ONES)}?|{_either(_NATIVE_ONES)})"
_LONG = _either(word for word in {**_NATIVE_ONES, **_NATIVE_TENS} if len(word) > 1 and word != "스무")
_SINO = rf"(?:{_either(_SINO_ONES)}?[십백천만억])+{_either(_SINO_ONES)}?"
_KOREAN = (
    rf"(?<![가-힣])(?:(?:(?:{_SINO})?{_NATIVE}|(?![십백천만억]{_COUNTERS}){_SINO})(?=\s?{_COUNTERS}|\s대)|[십백천만](?=명)"
    rf"|{_either(_NATIVE_TENS)}?(?:{_LONG}|[둘셋넷](?![가-힣])|[둘셋넷](?=[이입은을로의만예])))|^{_either(_ALL)}+$"
)
_DIGITS = r"(?P<digits>(?<![\d.])-?\d+(?:\.\d+)?)(?P<scale>[천만억]*)"  # 3만 too
_NUMBER = re.compile(f"{_DIGITS}|{_ENGLISH}|{_KOREAN}")


def number(text: str) -> float | None:
    """The first number that a text tells, or None.

    It is in digits of any script (with thousands separators, a decimal point, a minus sign), in English
    words up to the millions ("none",
    "no one" and "nobody" are 0), or in Korean numerals, which count before a counter (세 명, 열두 마리, 이십삼 개), or
    alone where they are
    long native ones (다섯입니다), or as the whole text (삼). What has more than 15 digits is no number.
    """
    for found in _NUMBER.finditer(normalize(text)):
        if found["digits"] is None:
            return float(_add_up(_NUMERAL.findall(found.group())))
        if len(found["digits"]) <= MAX_DIGITS:
            return float(found["digits"]) * _add_up(found["scale"] or "일")
    return None


def _add_up(numerals: Iterable[str]) -> int:
    """The value of numerals in a row: ["three", "hundred", "twenty", "five"] is 325, ["이", "만", "삼", "천"] is
    23000."""
    total = section = last = 0
    for numeral in numerals:
        value = _ALL[numeral]
        if numeral in _LARGE:
            total, section, last = total + max(section + last, 1) * value, 0, 0
        elif numeral in _SMALL:
            section, last = section + max(last, 1) * value, 0
        else:
            last += value
    return total + section + last
