"""The language or script of a text, by its letters."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

READ_CHARACTERS = 1000  # of a text: naming a letter takes a fraction of a microsecond
SCRIPTS = {
    "HANGUL": "Korean",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "CJK": "Chinese characters",
    "CYRILLIC": "Cyrillic script",
    "ARABIC": "Arabic script",
    "HEBREW": "Hebrew script",
    "THAI": "Thai",
    "DEVANAGARI": "Devanagari",
    "GREEK": "Greek",
    "LATIN": "Latin script",
}


def script_of(text: str) -> str:
    """The language or script of most letters of a text: Korean, Japanese, Latin script, …"""
    counts: Counter[str] = Counter()
    for letter in text[:READ_CHARACTERS]:
        if letter.isalpha():
            counts[SCRIPTS.get(unicodedata.name(letter, "").partition(" ")[0], "another script")] += 1
    if counts["Japanese"]:  # which mixes kana with Chinese characters
        return "Japanese"
    return counts.most_common(1)[0][0] if counts else "no letters"


def script_of_questions(messages: Sequence[dict[str, Any]]) -> str:
    """The language or script of a conversation's user turns."""
    parts = (part for message in messages if message["role"] == "user" for part in message["content"])
    return script_of(" ".join(part["text"] for part in parts if part["type"] == "text"))
