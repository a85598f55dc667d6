"""Phrases that the preflight's page and its text share."""

from vlmtune.preflight.wording import FORMAT_NAMES, counted, listed


def test_a_noun_follows_its_number() -> None:
    assert [counted(1, "row"), counted(0, "row"), counted(2_000, "row")] == ["1 row", "0 rows", "2,000 rows"]


def test_one_kind_needs_no_number() -> None:
    assert listed({"JPEG": 30}) == "JPEG"
    assert listed({"JPEG": 3000, "PNG": 2}) == "JPEG 3,000, PNG 2"
    assert listed({"jsonl": 1, "hub": 2}, FORMAT_NAMES) == "JSONL 1, Hub dataset 2"
