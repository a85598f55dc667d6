"""Texts made comparable across scripts: their normal form and their words."""

import re
import unicodedata

# Scripts that put no spaces between words: each of their characters is a word of its own, as in the mixed
# segmentation of MLQA's evaluation
# (Lewis et al. 2020). Hangul is not among them: Korean puts spaces between words.
_UNSPACED = re.compile(
    r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)")  # 12,345
_OF_A_NUMBER = re.compile(r"(?<=\d)\.(?=\d)|(?<!\w)-(?=\d)")
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")  # don't is one word
_KEPT = {".": "\ue000", "-": "\ue001"}  # private characters, which are no punctuation


def normalize(text: str) -> str:
    """A text without what does not count: NFKC (full-width letters and digits, joined Hangul), case,
    punctuation and extra white space.

    A decimal point and the sign of a number stay, and 1,000 is 1000: 3.5 and 35 must not become equal.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace(
        "\u2212", "-"
    )
    text = _THOUSANDS.sub(lambda found: found.group().replace(",", ""), text)
    text = _OF_A_NUMBER.sub(lambda found: _KEPT[found.group()], _APOSTROPHE.sub("", text))
    text = "".join(
        " " if unicodedata.category(character).startswith("P") else character for character in text
    )
    for mark, kept in _KEPT.items():
        text = text.replace(kept, mark)
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """The words of the normalised text; of scripts that put no spaces between words, the characters."""
    return _UNSPACED.sub(r" \1 ", normalize(text)).split()
