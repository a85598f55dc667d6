"""Normalize texts of any script for comparison, and split them into words."""

import re
import unicodedata

# Scripts without spaces between words: each of their characters counts as a word, as in the mixed
# segmentation of MLQA's evaluation (Lewis et al. 2020). Hangul is not among them: Korean has spaces.
_UNSPACED = re.compile(
    r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)")  # 12,345
_NUMBER_MARKS = re.compile(r"(?<=\d)\.(?=\d)|(?<!\w)-(?=\d)")
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")  # don't is one word
_PLACEHOLDERS = {".": "\ue000", "-": "\ue001"}  # private-use characters, which are not punctuation


def normalize(text: str) -> str:
    """Remove differences that do not matter: Unicode forms (NFKC), case, punctuation, extra white space.

    NFKC makes full-width letters and digits plain and joins Hangul. A decimal point and the sign of a number
    stay, because 3.5 and 35 must not become equal. Thousands separators are removed: 1,000 becomes 1000.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace(
        "\u2212", "-"
    )
    text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    text = _NUMBER_MARKS.sub(lambda match: _PLACEHOLDERS[match.group()], _APOSTROPHE.sub("", text))
    text = "".join(
        " " if unicodedata.category(character).startswith("P") else character for character in text
    )
    for mark, placeholder in _PLACEHOLDERS.items():
        text = text.replace(placeholder, mark)
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """Split the normalized text into words; into characters for scripts without spaces between words."""
    return _UNSPACED.sub(r" \1 ", normalize(text)).split()
