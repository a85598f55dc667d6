"""Lines on how data was read."""

from vlmtune.data.notes import note_lines, unused_line


def test_lines_have_their_counts() -> None:
    assert unused_line({"field id": 2000, "column 메모": 1}) == "field id (2,000 rows), column 메모 (1 row)"
    assert note_lines({"a mark": 3, "all data": 0}) == ["a mark (3 rows)", "all data"]
