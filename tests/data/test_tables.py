"""Tables as spreadsheet programs and pandas save them."""

from pathlib import Path

import pytest

from vlmtune.data.tables import Table, read_table
from vlmtune.errors import DataError


def table(folder: Path, content: bytes) -> Table:
    (folder / "labels.csv").write_bytes(content)
    return read_table(str(folder / "labels.csv"), "labels.csv")


@pytest.mark.parametrize(
    "content",
    [
        b"image,count\na.jpg,3\n",
        b"\xef\xbb\xbfimage;count\r\na.jpg;3\r\n",
        b"image\tcount\ra.jpg\t3\r",
        "image\tcount\r\na.jpg\t3\r\n".encode("utf-16"),
        b'sep=;\r\nimage;count\r\n"a.jpg";3\r\n',
        b"image,count,,,\na.jpg,3,,,\n,,,,\n,,,,\n",
        b"image,count\na.jpg,3,,\n",
        b"image,count,,\na.jpg,3\n",
        b"image,count\na.jpg,3.0\n",
    ],
)
def test_every_program_saves_the_same_table(content: bytes, tmp_path: Path) -> None:
    found = table(tmp_path, content)
    assert (found.columns, [row for _, row in found.rows]) == (["image", "count"], [["a.jpg", "3"]])


def test_line_numbers_count_the_line_of_the_separator(tmp_path: Path) -> None:
    assert table(tmp_path, b"sep=;\nimage;count\na.jpg;3\n").rows == [(3, ["a.jpg", "3"])]


def test_columns_without_a_name(tmp_path: Path) -> None:
    found = table(tmp_path, b",image,,count\n0,a.jpg,,3\n1,b.jpg,,4\n")
    assert found.columns == ["column 1", "image", "count"]
    assert found.rows[1] == (3, ["1", "b.jpg", "4"])


def test_whole_numbers_of_pandas_are_read_and_noted(tmp_path: Path) -> None:
    found = table(tmp_path, b"image,count,metres,note\na,3.0,2.5,nan\nb,,3.0,NULL\nc,10.0,1.0,None\n")
    assert [row for _, row in found.rows] == [
        ["a", "3", "2.5", ""],
        ["b", "", "3.0", ""],
        ["c", "10", "1.0", "None"],
    ]
    assert found.notes == ("column 'count': 2 values such as 3.0 are read as whole numbers",)


def test_rows_of_another_width_stay_as_they_are(tmp_path: Path) -> None:
    assert table(tmp_path, b"image,count\na,1,000\nb\n").rows == [(2, ["a", "1", "000"]), (3, ["b"])]


def test_what_is_no_table(tmp_path: Path) -> None:
    for content, reason in (
        (b"\n\n", "labels.csv is empty"),
        (b"a,a\n1,2\n", "labels.csv:1: two columns are called 'a'"),
        (b'a,b\n1,2\n"3,4\n', "labels.csv:3: not CSV"),
        ("a,b\n1,세\n".encode("cp949"), "labels.csv:2: not UTF-8"),
        ("a,b\n".encode("utf-16")[:-1], "labels.csv: UTF-16 text that is cut off"),
    ):
        with pytest.raises(DataError, match=reason):
            table(tmp_path, content)
