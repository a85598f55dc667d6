"""Frames folders: dialogues filled from label rows, and what is said of each fault."""

from pathlib import Path

import pytest
from formats_kit import COUNT, HELLO, IMAGE, frames_folder, png, read, read_good, turn, write_lines
from PIL import Image

from vlmtune.data import scan as scan_module
from vlmtune.data.question_columns import Columns
from vlmtune.data.scan import scan
from vlmtune.errors import DataError


def test_frames_folder(tmp_path: Path) -> None:
    messages = (
        '\nsystem: You count.\nUser: How many\n  people?\nASSISTANT: {{"n": {count}}}\n\n\n'
        "사용자: <image> 여기가 {place}인가요?\n어시스턴트: 네, {place}입니다.\n"
        "사용자:몇 명?\n어시스턴트: {count}명\n"
    )
    labels = '\ufeffid,count,place\r\n\r\n2,7,"몰, 2층"\r\n1,3,광장\r\n'
    folder = frames_folder(tmp_path / "mall", messages, labels)
    (folder / "frames" / "notes.txt").write_text("x")
    rows = read_good(folder, group_by="place")
    assert [row["source"] for row in rows] == [
        f"{folder}/frames/seq_00000{n}.jpg (dialogue {d})" for n in (1, 2) for d in (1, 2)
    ]
    assert [row["images"] for row in rows] == [
        [str(folder / "frames" / f"seq_00000{n}.jpg")] for n in (1, 1, 2, 2)
    ]
    assert [row["group"] for row in rows] == ["광장", "광장", "몰, 2층", "몰, 2층"]
    assert rows[0]["messages"] == [
        turn("system", "You count."),
        turn("user", IMAGE, "How many\npeople?"),
        turn("assistant", '{"n": 3}'),
    ]
    assert rows[3]["messages"] == [
        turn("user", IMAGE, "여기가 몰, 2층인가요?"),
        turn("assistant", "네, 몰, 2층입니다."),
        turn("user", "몇 명?"),
        turn("assistant", "7명"),
    ]


@pytest.mark.parametrize("column", ["image", "file", "filename", "file_name", "Frame", "path", "id"])
@pytest.mark.parametrize(
    "value", ["seq_000002.jpg", "seq_000002", "frames/seq_000002.jpg", "./frames/seq_000002", "2", "000002"]
)
def test_label_row_finds_its_frame(column: str, value: str, tmp_path: Path) -> None:
    rows = read(frames_folder(tmp_path, COUNT, f"count,{column}\n5,{value}\n"))
    assert [(row["source"], row["error"] is None) for row in rows] == [
        (f"{tmp_path}/frames/seq_000001.jpg", False),
        (f"{tmp_path}/frames/seq_000002.jpg", True),
    ]
    assert rows[1]["messages"][1] == turn("assistant", "5 people.")
    assert rows[0]["error"] == "the frame has no row in labels.csv: add one, or take the frame away"


def test_bad_label_rows_lose_nothing_else(tmp_path: Path) -> None:
    names = ("a_1.jpg", "b_1.png", "c_2.JPEG", "d_3.jpg", "e_4.jpg")
    labels = (
        'image,count,note\na_1,1,"two\nlines"\n9,1,x\nc_2,4,\nd_3,3,x,extra\n'
        "1,5,x\nc_2,8,x\ne_4,,x\nb_1,2,x\n"
    )
    rows = read(frames_folder(tmp_path, COUNT, labels, names))
    found = {row["source"].removeprefix(f"{tmp_path}/"): row["error"] for row in rows}
    assert found == {
        "frames/a_1.jpg": None,
        "frames/b_1.png": None,
        "frames/c_2.JPEG": None,
        "frames/d_3.jpg": "the frame has no row in labels.csv: add one, or take the frame away",
        "frames/e_4.jpg": "column 'count' of labels.csv is empty for this frame: fill it in",
        "labels.csv:4": f"image '9' has no frame in {tmp_path}/frames",
        "labels.csv:6": "4 fields where the header has 3: put quotes round text with commas",
        "labels.csv:7": "image '1' fits 2 frames (a_1.jpg, b_1.png): name the file",
        "labels.csv:8": "frame c_2.JPEG has a row already, on line 5: keep one",
    }
    assert rows[2]["messages"][1] == turn("assistant", "4 people.")


def test_frames_without_labels_and_with_semicolons(tmp_path: Path) -> None:
    plain = "USER: What?\nASSISTANT: A mall.\n"
    assert len(read_good(frames_folder(tmp_path / "a", plain, None))) == 2
    rows = read(frames_folder(tmp_path / "b", f"{plain}\n{COUNT}", "id;count\n1;3\n"))
    assert [(row["source"].rpartition("/")[2], row["error"] is None) for row in rows] == [
        ("seq_000001.jpg (dialogue 1)", True),
        ("seq_000001.jpg (dialogue 2)", True),
        ("seq_000002.jpg (dialogue 1)", True),
        ("seq_000002.jpg", False),
    ]


def test_many_frames_are_many_fragments_and_a_changed_frame_changes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "FRAMES_PER_FRAGMENT", 3)
    names = tuple(f"f{number:03d}.png" for number in range(10))
    folder = frames_folder(
        tmp_path, COUNT, "id,count\n" + "".join(f"{number},{number}\n" for number in range(10)), names
    )
    fragments = scan(str(folder))
    assert [len(fragment.frames) for fragment in fragments] == [3, 3, 3, 1]
    assert [row["messages"][1]["content"][0]["text"] for row in read_good(folder)] == [
        f"{number} people." for number in range(10)
    ]
    assert scan(str(folder)) == fragments
    Image.new("RGB", (9, 9)).save(folder / "frames" / "f004.png")
    assert [again == before for again, before in zip(scan(str(folder)), fragments, strict=True)] == [
        True,
        False,
        True,
        True,
    ]


WHOLE_FRAMES: dict[str, tuple[str, str | bytes | None, str]] = {
    "no dialogue": (" \n\n", "id\n1\n", "messages.txt holds no dialogue"),
    "text outside": ("How many?\n", "id\n1\n", "messages.txt:1: text outside a turn"),
    "user at the end": (
        "USER: a\nASSISTANT: b\nUSER: c\n",
        "id\n1\n",
        "messages.txt:3, the last turn, is the user's",
    ),
    "two users": (
        "USER: a\nUSER: b\nASSISTANT: c\n",
        "id\n1\n",
        "messages.txt:2 is a second user turn in a row",
    ),
    "assistant first": (
        "\n\nASSISTANT: c\n",
        "id\n1\n",
        "messages.txt:3 is an assistant turn with no user turn",
    ),
    "system only": ("SYSTEM: c\n", "id\n1\n", "messages.txt:1: the conversation has only a system turn"),
    "empty turn": ("USER: a\nASSISTANT:\n", "id\n1\n", "messages.txt:2: the assistant turn is empty"),
    "stray brace": (
        "USER: a\nASSISTANT: {\n",
        "id\n1\n",
        "messages.txt:2: '{' is no placeholder; write {{ and }}",
    ),
    "empty braces": ("USER: a\nASSISTANT: {}\n", "id\n1\n", "messages.txt:2: '{}' is no placeholder"),
    "two marks": (
        "USER: <image> <image>\nASSISTANT: b\n",
        "id\n1\n",
        "messages.txt:1: the dialogue has 2 <image> marks",
    ),
    "mark in answer": (
        "USER: a\nASSISTANT: <image>\n",
        "id\n1\n",
        "messages.txt:2: only a user turn may hold an <image> mark",
    ),
    "no such column": (
        COUNT,
        "id,people\n1,2\n",
        "messages.txt:2: labels.csv has no column 'count' for {count}; it has: id, people",
    ),
    "no labels": (COUNT, None, "messages.txt:2 uses {count}, but there is no"),
    "no image column": (
        COUNT,
        "count\n1\n",
        "labels.csv names no image: it needs a column image, file, filename",
    ),
    "empty labels": (COUNT, "\n", "labels.csv is empty"),
    "doubled column": (COUNT, "id,count,count\n1,2,3\n", "labels.csv:1: two columns are called 'count'"),
    "open quote": (COUNT, 'id,count\n1,2\n2,"3\n', "labels.csv:3: not CSV"),
    "Korean code page": (
        COUNT,
        "id,count\n1,세명\n".encode("cp949"),
        "labels.csv:2: not UTF-8: save the file as UTF-8",
    ),
}


@pytest.mark.parametrize("case", WHOLE_FRAMES)
def test_frames_folder_that_cannot_be_read(case: str, tmp_path: Path) -> None:
    messages, labels, reason = WHOLE_FRAMES[case]
    with pytest.raises(DataError) as caught:
        scan(str(frames_folder(tmp_path, messages, labels)))
    assert reason in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_frames_folder_with_parts_missing(tmp_path: Path) -> None:
    png(tmp_path / "a" / "frames" / "x.png")
    with pytest.raises(DataError, match=r"has frames/ but no messages\.txt"):
        scan(str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "messages.txt").write_text(COUNT)
    with pytest.raises(
        DataError, match=r"b/frames holds no image that ends in .jpg, .jpeg, .jfif, .* \(files there: 0\)"
    ):
        scan(str(tmp_path / "b"))
    write_lines(tmp_path / "b" / "rows.jsonl", HELLO)
    with pytest.raises(DataError, match=r"holds both messages\.txt and rows\.jsonl"):
        scan(str(tmp_path / "b"))


def test_a_question_in_place_of_messages(tmp_path: Path) -> None:
    folder = frames_folder(tmp_path / "mall", "x", "image,count\nseq_000001.jpg,3\nseq_000002.jpg,4\n")
    (folder / "messages.txt").unlink()
    line = '--question "How many people are there[?]" --answer_column count, or write'
    with pytest.raises(DataError, match=f"mall has frames/ but no messages.txt: give {line}"):
        scan(str(folder))
    rows = read_good(folder, columns=Columns((), "몇 {명}?", "count"))
    assert [row["messages"] for row in rows] == [
        [turn("user", IMAGE, "몇 {명}?"), turn("assistant", number)] for number in ("3", "4")
    ]
    for columns, reason in (
        (Columns((), "How many?", "people"), "--answer_column people: .*labels.csv has no such column"),
        (Columns((), "How many?"), "--answer_column label: .*labels.csv has no such column"),
    ):
        with pytest.raises(DataError, match=reason):
            scan(str(folder), columns=columns)
    (folder / "messages.txt").write_text(COUNT)
    with pytest.raises(DataError, match=r"messages.txt holds the dialogues: leave out --question"):
        scan(str(folder), columns=Columns((), "How many?", "count"))
