"""What the preflight shows of a row."""

import time

import pytest

from vlmtune.data.facts import error_kind, shortened


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("image path /data/a b.jpg leaves the folder /data: move", "image path … leaves the folder … move"),
        ("image https://host/1.jpg is remote: download it", "image … is remote: download it"),
        ("messages[12].role is 'bot': it must be", "messages[N].role is 'bot': it must be"),
        (
            "frame cam1_2.jpg has a row already, on line 3: keep one",
            "frame … has a row already, on line N: keep one",
        ),
        ("byte 17 of the line is not UTF-8", "byte N of the line is not UTF-8"),
        ("2 <image> marks but 1 image: give each", "N <image> marks but N image: give each"),
    ],
)
def test_reasons_of_one_kind_are_alike(reason: str, kind: str) -> None:
    assert error_kind(reason) == kind


@pytest.mark.parametrize(
    "reason",
    [
        "image path " + "../" + "a/" * 50_000,
        "a/b.c" * 20_000,
        "x" * 100_000 + "://",
        "." * 100_000,
        "1,1" * 40_000,
        ("a/" * 300 + " ") * 300,
    ],
)
def test_a_reason_of_any_length_has_its_kind_at_once(reason: str) -> None:
    start = time.monotonic()
    error_kind(reason)
    assert time.monotonic() - start < 0.2
    assert len(shortened(reason)) <= 1001


def test_a_usual_reason_is_not_shortened() -> None:
    reason = f"image /data/{'folder/' * 50}a.jpg leaves the folder: move it"
    assert shortened(reason) == reason
