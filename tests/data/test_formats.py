"""Every format is read from real files into the same conversations, and every bad row is named without
losing its neighbours."""

import json
import os
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmtune.data import scan as scan_module
from vlmtune.data.formats import Piece, read_piece
from vlmtune.data.image_paths import ImageRules, RowError
from vlmtune.data.scan import scan
from vlmtune.errors import DataError
from vlmtune.storage import filesystem, join

Row = dict[str, Any]
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *parts: Any) -> Row:
    return {"role": role, "content": [text(part) if isinstance(part, str) else part for part in parts]}


def png(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def read(path: Path | str, **options: Any) -> list[Row]:
    """All rows, read from pickled pieces as a worker would."""
    return [
        row for piece in scan(str(path), **options) for row in read_piece(pickle.loads(pickle.dumps(piece)))
    ]


def read_good(path: Path | str, **options: Any) -> list[Row]:
    rows = read(path, **options)
    assert [row["error"] for row in rows] == [None] * len(rows)
    return rows


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join(
            (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows
        ),
        encoding="utf-8",
    )
    return path


def frames_folder(
    folder: Path,
    messages: str,
    labels: str | bytes | None,
    names: tuple[str, ...] = ("seq_000001.jpg", "seq_000002.jpg"),
) -> Path:
    for name in names:
        png(folder / "frames" / name)
    (folder / "messages.txt").write_text(messages, encoding="utf-8")
    if labels is not None:
        (folder / "labels.csv").write_bytes(labels if isinstance(labels, bytes) else labels.encode())
    return folder


HELLO = {"instruction": "Say hello", "output": "Hello"}
ASKED = turn("user", "Say hello")
ANSWERED = turn("assistant", "Hello")
COUNT = "USER: How many people?\nASSISTANT: {count} people.\n"


# --- good rows ---

SHAPES: dict[str, tuple[Row, list[Row], list[str]]] = {
    "instruction": (HELLO, [ASKED, ANSWERED], []),
    "instruction, empty input": ({**HELLO, "input": ""}, [ASKED, ANSWERED], []),
    "instruction, null input": ({**HELLO, "input": None}, [ASKED, ANSWERED], []),
    "instruction with input": (
        {**HELLO, "input": "in Korean"},
        [turn("user", "Say hello\nin Korean"), ANSWERED],
        [],
    ),
    "instruction with image": (
        {**HELLO, "image": "a.png"},
        [turn("user", IMAGE, "Say hello"), ANSWERED],
        ["a.png"],
    ),
    "instruction with images": (
        {"instruction": "Compare <image> with <image>.", "output": "Same", "images": ["a.png", "sub/b.png"]},
        [turn("user", "Compare", IMAGE, "with", IMAGE, "."), turn("assistant", "Same")],
        ["a.png", "sub/b.png"],
    ),
    "instruction with system": (
        {**HELLO, "system": "Be brief"},
        [turn("system", "Be brief"), ASKED, ANSWERED],
        [],
    ),
    "messages, strings": (
        {
            "messages": [
                {"role": "system", "content": "Be brief"},
                {"role": "user", "content": "<image>\nWhat?"},
                {"role": "assistant", "content": " A cat "},
            ],
            "images": ["a.png"],
        },
        [turn("system", "Be brief"), turn("user", IMAGE, "What?"), turn("assistant", " A cat ")],
        ["a.png"],
    ),
    "messages, no marks": (
        {
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Cats"}],
            "images": ["a.png", "sub/b.png"],
        },
        [turn("user", IMAGE, IMAGE, "What?"), turn("assistant", "Cats")],
        ["a.png", "sub/b.png"],
    ),
    "messages, typed": (
        {
            "messages": [
                {"role": "user", "content": [text("Look"), IMAGE, text("What?")]},
                {"role": "assistant", "content": [text("A cat")]},
            ],
            "images": ["a.png"],
        },
        [turn("user", "Look", IMAGE, "What?"), turn("assistant", "A cat")],
        ["a.png"],
    ),
    "messages, inline images mixed with marks": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "sub/b.png"}, IMAGE, text("What?")]},
                {"role": "assistant", "content": "Cats"},
                {"role": "user", "content": "And <image>"},
                {"role": "assistant", "content": "Dogs"},
            ],
            "images": ["a.png", "c.png"],
        },
        [
            turn("user", IMAGE, IMAGE, "What?"),
            turn("assistant", "Cats"),
            turn("user", "And", IMAGE),
            turn("assistant", "Dogs"),
        ],
        ["sub/b.png", "a.png", "c.png"],
    ),
    "prompt and completion": (
        {
            "prompt": [{"role": "user", "content": "Say hello"}],
            "completion": [{"role": "assistant", "content": "Hello"}],
        },
        [ASKED, ANSWERED],
        [],
    ),
    "LLaVA": (
        {
            "id": 7,
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "What?\n<image>"},
                {"from": "gpt", "value": "A cat"},
            ],
        },
        [turn("user", "What?", IMAGE), turn("assistant", "A cat")],
        ["a.png"],
    ),
    "LLaVA, no mark": (
        {
            "image": "a.png",
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "human", "value": "What?"},
                {"from": "gpt", "value": "A cat"},
            ],
        },
        [turn("user", IMAGE, "What?"), turn("assistant", "A cat")],
        ["a.png"],
    ),
    "LLaVA, null image": (
        {
            "image": None,
            "conversations": [{"from": "human", "value": "Say hello"}, {"from": "gpt", "value": "Hello"}],
        },
        [ASKED, ANSWERED],
        [],
    ),
}


CONTAINERS = [(shape, container) for shape in SHAPES for container in ("jsonl", "json", "saved", "parquet")]
CONTAINERS.remove(("messages, inline images mixed with marks", "parquet"))  # has one type for all contents


@pytest.mark.parametrize(("shape", "container"), CONTAINERS)
def test_every_shape_in_every_container(shape: str, container: str, tmp_path: Path) -> None:
    record, messages, images = SHAPES[shape]
    path = tmp_path / f"rows.{container}"
    source = {"jsonl": f"{path}:1", "json": f"{path}[0]"}.get(container, f"{path} row 0")
    if container == "jsonl":
        write_lines(path, record)
    elif container == "json":
        path.write_text(json.dumps([record], indent=2))
    elif container == "parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        import datasets

        datasets.Dataset.from_list([record], on_mixed_types="use_json").save_to_disk(str(path))
    root = path if container == "saved" else tmp_path
    expected = {
        "source": source,
        "messages": messages,
        "images": [str(root / name) for name in images],
        "group": None,
        "error": None,
    }
    assert read(path) == [expected]


def test_json_lines_in_a_json_file_and_other_names(tmp_path: Path) -> None:
    for name in ("rows.json", "rows.txt", "rows.ndjson", "rows"):
        assert [row["source"] for row in read_good(write_lines(tmp_path / name, HELLO, HELLO))] == [
            f"{tmp_path}/{name}:1",
            f"{tmp_path}/{name}:2",
        ]
    (tmp_path / "array.jsonl").write_text(json.dumps([HELLO, HELLO], indent=1))
    assert [row["source"] for row in read_good(tmp_path / "array.jsonl")] == [
        f"{tmp_path}/array.jsonl[0]",
        f"{tmp_path}/array.jsonl[1]",
    ]


def test_bom_crlf_blank_lines_and_no_last_newline(tmp_path: Path) -> None:
    line = json.dumps(HELLO).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \r\n" + line)
    assert [row["source"] for row in read_good(tmp_path / "a.jsonl")] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:4",
    ]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[\r\n" + line + b",\r\n" + line + b"\r\n]\r\n")
    assert len(read_good(tmp_path / "a.json")) == 2


def test_source_is_as_the_user_wrote_it_and_paths_are_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "rows.jsonl", {**HELLO, "image": "a b.png"})
    for given in (
        "data/rows.jsonl",
        "./data/rows.jsonl",
        "data/",
        (tmp_path / "data" / "rows.jsonl").as_uri(),
    ):
        pieces = scan(given)
        monkeypatch.chdir("/")
        (row,) = read_piece(pieces[0])
        monkeypatch.chdir(tmp_path)
        assert row["source"] == ("data/rows.jsonl:1" if given == "data/" else f"{given}:1")
        assert row["images"] == [str(tmp_path / "data" / "a b.png")]


def test_pieces_of_a_large_file_know_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "BLOCK_BYTES", 1000)
    rows = [{"instruction": f"row {number}", "output": "x" * (number * 37 % 900)} for number in range(1, 101)]
    rows[40]["output"] = "y" * 5000
    path = write_lines(tmp_path / "rows.jsonl", *(item for row in rows for item in ("", row, "{broken")))
    pieces = scan(str(path))
    assert len(pieces) > 30
    assert [(piece.start, piece.stop) for piece in pieces[1:]] == [
        (before.stop, piece.stop) for before, piece in pairwise(pieces)
    ]
    found = read(path)
    good = [row for row in found if row["error"] is None]
    assert [row["source"] for row in good] == [
        f"{path}:{3 * number - 1}" for number in range(1, 101) if rows[number - 1]["output"]
    ]
    assert [row["source"] for row in found if row["error"] and "not JSON" in row["error"]] == [
        f"{path}:{3 * number}" for number in range(1, 101)
    ]
    assert good[-1]["messages"][0]["content"] == [text("row 100")]


def test_folder_of_files_in_name_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.ndjson"):
        write_lines(tmp_path / name, HELLO)
    (tmp_path / "README.md").write_text("about")
    png(tmp_path / "frames" / "x.png")
    assert [row["source"] for row in read_good(tmp_path)] == [
        f"{tmp_path}/{name}:1" for name in ("a.jsonl", "b.jsonl", "c.ndjson")
    ]


def test_parquet_images_as_paths_bytes_and_structs(tmp_path: Path) -> None:
    data = png(tmp_path / "a.png").read_bytes()
    columns: dict[str, list[Any]] = {
        "path": ["a.png"] * 3,
        "bytes": [data] * 3,
        "struct": [
            {"bytes": data, "path": "gone.png"},
            {"bytes": None, "path": "a.png"},
            {"bytes": None, "path": None},
        ],
        "list": [["a.png", "a.png"], [], None],
        "structs": [[{"bytes": data, "path": None}], [{"bytes": None, "path": "a.png"}], None],
    }
    found = {}
    for name, values in columns.items():
        path = tmp_path / f"{name}.parquet"
        table = pa.table(
            {
                "instruction": ["Q"] * 3,
                "output": ["A"] * 3,
                "images" if "s" in name[4:] or name == "list" else "image": values,
            }
        )
        pq.write_table(table, path, row_group_size=2)
        assert len(scan(str(path))) == 2
        found[name] = read(path)
        assert [row["source"] for row in found[name]] == [f"{path} row {number}" for number in range(3)]
    here = str(tmp_path / "a.png")
    assert [row["images"] for row in found["path"]] == [[here]] * 3
    assert [row["images"] for row in found["bytes"]] == [[data]] * 3
    assert [row["images"] for row in found["struct"]] == [[data], [here], []]
    assert [row["error"] for row in found["struct"]] == [None, None, "image holds neither bytes nor a path"]
    assert [row["images"] for row in found["list"]] == [[here, here], [], []]
    assert [row["images"] for row in found["structs"]] == [[data], [here], []]


def test_saved_dataset_keeps_images_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(scan_module, "ROWS_PER_PIECE", 2)
    image = str(png(tmp_path / "a.png"))
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "camera": datasets.Value("int64"),
            "messages": datasets.List(
                {"role": datasets.Value("string"), "content": datasets.Value("string")}
            ),
        }
    )
    dialogue = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red"}]
    data = datasets.Dataset.from_dict(
        {"images": [[image]] * 5, "camera": range(5), "messages": [dialogue] * 5}, features=features
    )
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(str(tmp_path / "both"))
    data.save_to_disk(str(tmp_path / "one"))
    for name in ("both", "one"):
        assert len(scan(str(tmp_path / name))) == 3
        rows = read_good(tmp_path / name, group_by="camera")
        assert [row["source"] for row in rows] == [f"{tmp_path}/{name} row {number}" for number in range(5)]
        assert [row["group"] for row in rows] == list("01234")
        assert rows[4]["images"] == [Path(image).read_bytes()]
    datasets.DatasetDict(test=data).save_to_disk(str(tmp_path / "test_only"))
    with pytest.raises(DataError, match=r"no split 'train' \(it has: test\)"):
        scan(str(tmp_path / "test_only"))


# --- frames folder ---


def test_frames_folder(tmp_path: Path) -> None:
    messages = (
        '\nsystem: You count.\nUser: How many\n  people?\nASSISTANT: {{"n": {count}}}\n\n\n'
        "사용자: <image> 여기가 {place}인가요?\n어시스턴트: 네, {place}입니다.\n사용자:몇 명?\n어시스턴트: {count}명\n"
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
    labels = 'image,count,note\na_1,1,"two\nlines"\n9,1,x\nc_2,4,\nd_3,3,x,extra\n1,5,x\nc_2,8,x\ne_4,,x\nb_1,2,x\n'
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


def test_many_frames_are_many_pieces_and_a_changed_frame_changes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "FRAMES_PER_PIECE", 3)
    names = tuple(f"f{number:03d}.png" for number in range(10))
    folder = frames_folder(
        tmp_path, COUNT, "id,count\n" + "".join(f"{number},{number}\n" for number in range(10)), names
    )
    pieces = scan(str(folder))
    assert [len(piece.frames) for piece in pieces] == [3, 3, 3, 1]
    assert [row["messages"][1]["content"][0]["text"] for row in read_good(folder)] == [
        f"{number} people." for number in range(10)
    ]
    assert scan(str(folder)) == pieces
    Image.new("RGB", (9, 9)).save(folder / "frames" / "f004.png")
    assert [again == before for again, before in zip(scan(str(folder)), pieces, strict=True)] == [
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
        DataError, match=r"b/frames holds no image that ends in .jpg, .jpeg, .png \(files there: 0\)"
    ):
        scan(str(tmp_path / "b"))
    write_lines(tmp_path / "b" / "rows.jsonl", HELLO)
    with pytest.raises(DataError, match=r"holds both messages\.txt and rows\.jsonl"):
        scan(str(tmp_path / "b"))


# --- bad rows ---


def say(*turns: tuple[str, Any], **more: Any) -> Row:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "broken": ('{"instruction": "a", "output" "b"}', "not JSON at column 31: Expecting ':' delimiter"),
    "cut off": ('{"instruction": "a", "output": "b"', "not JSON at column 35: Expecting ',' delimiter"),
    "two rows on a line": (
        '{"instruction": "a", "output": "b"} {}',
        "not JSON at column 36: more text after the end of the row",
    ),
    "NaN": ('{"instruction": "a", "output": "b", "score": NaN}', "NaN is not JSON"),
    "minus Infinity": ('{"instruction": "a", "output": "b", "score": [-Infinity]}', "-Infinity is not JSON"),
    "doubled key": (
        '{"instruction": "a", "output": "b", "output": "c"}',
        "field 'output' stands twice in one object",
    ),
    "doubled inner key": (
        '{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
        "field 'role' stands twice",
    ),
    "deep": ("[" * 100_000, "nested too deep"),
    "huge number": (
        '{"instruction": "a", "output": "b", "n": ' + "9" * 5000 + "}",
        "JSON that cannot be read",
    ),
    "half a character": (
        '{"instruction": "a", "output": "\\ud83d"}',
        "'output' holds half a character (\\ud83d without its pair)",
    ),
    "a list": ([HELLO], "the row must be an object with named fields, not a list"),
    "a string": ('"hello"', "the row must be an object with named fields, not a string"),
    "null": ("null", "the row must be an object with named fields, not null"),
    "unknown fields": (
        {"question": "a", "answer": "b"},
        "no known row format: it needs 'messages', 'conversations', or 'instruction'",
    ),
    "no instruction": (
        {"input": "a", "output": "b"},
        "looks like an instruction row, but has no 'instruction' (its fields: input, output, group)",
    ),
    "no output": ({"instruction": "a"}, "instruction row without 'output'"),
    "null output": ({"instruction": "a", "output": None}, "'output' must be a non-empty string, not null"),
    "number output": ({"instruction": "a", "output": 3}, "'output' must be a non-empty string, not a number"),
    "boolean output": (
        {"instruction": "a", "output": True},
        "'output' must be a non-empty string, not a boolean",
    ),
    "empty output": (
        {"instruction": "a", "output": " "},
        "'output' must be a non-empty string, not an empty one",
    ),
    "empty instruction": ({"instruction": "", "output": "b"}, "'instruction' must be a non-empty string"),
    "number input": (
        {"instruction": "a", "input": 3, "output": "b"},
        "'input' must be a string, not a number",
    ),
    "system object": ({**HELLO, "system": {}, "input": ["x"]}, "'input' must be a string, not a list"),
    "null messages": ({"messages": None}, "'messages' must be a list of turns, not null"),
    "no turns": ({"messages": []}, "the conversation has no turns"),
    "text messages": ({"messages": "hello"}, "'messages' must be a list of turns, not a string"),
    "no completion": ({"prompt": []}, "prompt/completion row without 'completion'"),
    "text turn": (
        {"messages": ["hello"]},
        "messages[0] must be an object with a role and a text, not a string",
    ),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0] has no 'role'"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0] has no 'content'"),
    "no value": ({"conversations": [{"from": "human"}]}, "conversations[0] has no 'value'"),
    "unknown role": (
        say(("user", "a"), ("tool", "b")),
        "messages[1].role is 'tool': it must be one of human, user, gpt",
    ),
    "number role": ({"conversations": [{"from": 3, "value": "a"}]}, "conversations[0].from is 3"),
    "number content": (
        say(("user", 3), ("assistant", "b")),
        "messages[0].content must be a string or a list of parts, not a number",
    ),
    "null content": (
        say(("user", "a"), ("assistant", None)),
        "messages[1].content must be a string or a list of parts, not null",
    ),
    "number text": (
        say(("user", [{"type": "text", "text": 3}]), ("assistant", "b")),
        "messages[0].content[0].text must be a string",
    ),
    "video": (say(("user", [{"type": "video"}]), ("assistant", "b")), "messages[0].content[0] must be"),
    "two users": (
        say(("user", "a"), ("user", "b"), ("assistant", "c")),
        "messages[1] is a second user turn in a row",
    ),
    "two assistants": (
        say(("user", "a"), ("assistant", "b"), ("assistant", "c")),
        "messages[2] is a second assistant turn in a row",
    ),
    "assistant first": (
        say(("assistant", "a"), ("user", "b")),
        "messages[0] is an assistant turn with no user turn before it",
    ),
    "user last": (
        say(("user", "a"), ("assistant", "b"), ("user", "c")),
        "messages[2], the last turn, is the user's",
    ),
    "no assistant": (say(("user", "a")), "messages[0], the last turn, is the user's"),
    "late system": (
        say(("user", "a"), ("system", "b"), ("assistant", "c")),
        "messages[1] is a system turn: only the first",
    ),
    "only system": (say(("system", "a")), "the conversation has only a system turn"),
    "empty answer": (
        say(("user", "a"), ("assistant", "  ")),
        "messages[1] is empty: there is nothing to learn",
    ),
    "empty question": (say(("user", []), ("assistant", "a")), "messages[0] is empty: say or show something"),
    "image in answer": (
        say(("user", "a"), ("assistant", "<image> b"), images=["a.png"]),
        "messages[1] is a turn of the assistant and holds an",
    ),
    "mark, no image": (say(("user", "<image> a"), ("assistant", "b")), "1 <image> mark but 0 images"),
    "two images, one mark": (
        say(("user", "<image> a"), ("assistant", "b"), images=["a.png", "b.png"]),
        "1 <image> mark but 2 images",
    ),
    "one image, two marks": (
        say(("user", "<image><image> a"), ("assistant", "b"), images=["a.png"]),
        "2 <image> marks but 1 image:",
    ),
    "inline and list": (
        say(("user", [{"type": "image", "image": "a.png"}]), ("assistant", "b"), images=["a.png"]),
        "0 <image> marks but 1 image",
    ),
    "image and images": (
        {**HELLO, "image": "a.png", "images": ["a.png"]},
        "the row has both 'image' and 'images': keep one",
    ),
    "number image": ({**HELLO, "image": 3}, "image must be a path or bytes, not a number"),
    "null among images": (
        {**HELLO, "images": ["a.png", None]},
        "images[1] must be a path or bytes, not null",
    ),
    "empty image": ({**HELLO, "image": ""}, "image path is empty"),
    "NUL in image": ({**HELLO, "image": "a\0.png"}, "holds characters that no file name has"),
    "data URI": ({**HELLO, "image": "data:image/png;base64,AAAA"}, "image is a data: URI"),
    "dots": ({**HELLO, "image": "../outside.png"}, "image path ../outside.png leaves the folder"),
    "inner dots": ({**HELLO, "image": "sub/../../outside.png"}, "leaves the folder"),
    "absolute": ({**HELLO, "image": "/etc/passwd"}, "image path /etc/passwd leaves the folder"),
    "file URI": ({**HELLO, "image": "file:///etc/passwd"}, "image path /etc/passwd leaves the folder"),
    "sibling": ({**HELLO, "image": "../data2/x.png"}, "leaves the folder"),
    "link": ({**HELLO, "image": "link.png"}, "image path link.png leaves the folder"),
    "linked folder": ({**HELLO, "image": "links/outside.png"}, "leaves the folder"),
    "URL": (
        {**HELLO, "image": "HTTPS://example.com/a.png"},
        "is remote: download it, or give --allow_remote_images",
    ),
    "bucket": (
        {**HELLO, "image": "s3://other/a.png"},
        "is remote: copy it to the data, or give --allow_remote_images",
    ),
    "broken URI": ({**HELLO, "image": "s3://[x/a.png"}, "Invalid IPv6 URL"),
    "no group": (
        {"instruction": "a", "output": "b", "group": None},
        "field 'group' (--group_by) is missing or empty",
    ),
    "object group": (
        {"instruction": "a", "output": "b", "group": {}},
        "field 'group' (--group_by) must be a plain value, not an object",
    ),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with links out of it."""
    folder = tmp_path / "data"
    png(tmp_path / "outside.png")
    png(tmp_path / "data2" / "x.png")
    png(folder / "a.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "links").symlink_to(tmp_path)
    return folder


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_line_is_named_and_its_neighbours_kept(case: str, data: Path) -> None:
    bad, reason = BAD_ROWS[case]
    if isinstance(bad, dict) and "group" not in bad:
        bad = {**bad, "group": "g"}
    good = {**HELLO, "group": "g"}
    path = write_lines(data / "rows.jsonl", good, "", bad, good)
    before, row, after = read(path, group_by="group")
    assert (row["source"], row["messages"], row["images"], row["group"]) == (f"{path}:3", [], [], None)
    assert reason in row["error"]
    assert "\n" not in row["error"]
    for neighbour, line in ((before, 1), (after, 4)):
        assert neighbour == {
            "source": f"{path}:{line}",
            "messages": [ASKED, ANSWERED],
            "images": [],
            "group": "g",
            "error": None,
        }


@pytest.mark.parametrize("case", [name for name, (bad, _) in BAD_ROWS.items() if not isinstance(bad, str)])
def test_bad_item_of_an_array_is_named_and_its_neighbours_kept(case: str, data: Path) -> None:
    bad, reason = BAD_ROWS[case]
    if isinstance(bad, dict) and "group" not in bad:
        bad = {**bad, "group": "g"}
    path = data / "rows.json"
    path.write_text(json.dumps([{**HELLO, "group": "g"}, bad, {**HELLO, "group": 2}]))
    rows = read(path, group_by="group")
    assert [(row["source"], row["group"]) for row in rows] == [
        (f"{path}[0]", "g"),
        (f"{path}[1]", None),
        (f"{path}[2]", "2"),
    ]
    assert reason in rows[1]["error"]


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    line = json.dumps(HELLO).encode()
    broken = line.replace(b"Hello", b"H\xe9llo")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([line, broken, line]))
    rows = read(tmp_path / "a.jsonl")
    assert [row["error"] for row in rows] == [
        None,
        "byte 42 of the line is not UTF-8: save the file as UTF-8",
        None,
    ]
    (tmp_path / "a.json").write_bytes(b"[" + b",".join([line, broken, line]) + b"]")
    rows = read(tmp_path / "a.json")
    assert [row["error"] for row in rows] == [
        None,
        "'output' holds bytes that are not UTF-8: save the file as UTF-8",
        None,
    ]


def test_line_that_is_too_long(tmp_path: Path) -> None:
    line = json.dumps(HELLO).encode() + b"\n"
    for place, content in (
        ("middle", line + b"x" * 50_000_000 + b"\n" + line),
        ("end", line + line.replace(b"Hello", b"x" * 17_000_000).rstrip()),
    ):
        path = tmp_path / f"{place}.jsonl"
        path.write_bytes(content)
        rows = read(path)
        assert rows[1]["source"] == f"{path}:2"
        assert rows[1]["error"] == "the line is longer than 16 MB: keep images in files, not in the text"
        assert [row["source"] for row in rows if row["error"] is None] == [
            f"{path}:{number}" for number in ((1, 3) if place == "middle" else (1,))
        ]


BROKEN_ARRAYS = {
    "missing comma": (
        '[\n {"instruction": "Say hello", "output": "Hello"}\n  {}]',
        1,
        "line 3, column 3: expected , or ]",
    ),
    "cut off": (
        '[{"instruction": "Say hello", "output": "Hello"},\n {"instruction": "a',
        1,
        "line 2, column 18: Unterminated string starting at",
    ),
    "not closed": (
        '[{"instruction": "Say hello", "output": "Hello"}\n',
        1,
        "line 2, column 1: expected , or ]",
    ),
    "comma at the end": (
        '[{"instruction": "Say hello", "output": "Hello"},]',
        1,
        "line 1, column 50: Expecting value",
    ),
    "more after it": (
        '[{"instruction": "Say hello", "output": "Hello"}] x',
        1,
        "line 1, column 51: more text after the end of the array",
    ),
}


@pytest.mark.parametrize("case", BROKEN_ARRAYS)
def test_broken_array_keeps_what_came_before(case: str, tmp_path: Path) -> None:
    content, index, reason = BROKEN_ARRAYS[case]
    path = tmp_path / "rows.json"
    path.write_text(content)
    rows = read(path)
    assert [row["source"] for row in rows] == [f"{path}[{number}]" for number in range(index + 1)]
    assert [row["error"] is None for row in rows] == [True] * index + [False]
    assert f"not JSON at {reason}; nothing after it in this file can be read" in rows[-1]["error"]


def test_long_array_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.data.jsonfiles.READ_BYTES", 50)
    rows: list[Any] = [
        {"instruction": f"행 {number}", "output": "x" * (number * 53 % 700 + 1)} for number in range(60)
    ]
    rows[30] = 12345678901234567890
    path = tmp_path / "rows.json"
    content = json.dumps(rows, ensure_ascii=False, indent=1)
    path.write_text(content + "\n\n ?")
    found = read(path)
    assert [row["source"] for row in found] == [f"{path}[{number}]" for number in range(61)]
    assert [number for number, row in enumerate(found) if row["error"]] == [30, 60]
    assert found[59]["messages"][0]["content"] == [text("행 59")]
    assert found[60]["error"].startswith(
        f"not JSON at line {len(content.splitlines()) + 2}, column 2: more text"
    )


# --- which images a row may name ---


def test_outside_and_remote_images_on_request(data: Path) -> None:
    names = [
        "../outside.png",
        "/etc/passwd",
        "file:///etc/hosts",
        "link.png",
        "https://example.com/a.png",
        "s3://other/a b.png",
    ]
    path = write_lines(data / "rows.jsonl", *({**HELLO, "image": name} for name in names))
    outside = str(data.parent / "outside.png")
    expected = [
        outside,
        "/etc/passwd",
        "/etc/hosts",
        outside,
        "https://example.com/a.png",
        "s3://other/a%20b.png",
    ]
    found = [row["images"] for row in read_good(path, allow_outside_paths=True, allow_remote_images=True)]
    assert found == [[name] for name in expected[:1]] + [
        [os.path.realpath(name)] for name in expected[1:4]
    ] + [[name] for name in expected[4:]]
    assert [row["error"] is None for row in read(path, allow_outside_paths=True)] == [True] * 4 + [False] * 2
    assert [row["error"] is None for row in read(path, allow_remote_images=True)] == [False] * 4 + [True] * 2


def test_paths_that_stay_inside_are_fine(data: Path) -> None:
    path = write_lines(
        data / "rows.jsonl",
        *(
            {**HELLO, "image": name}
            for name in ("a.png", "sub/../a.png", str(data / "a.png"), (data / "a.png").as_uri())
        ),
    )
    assert [row["images"] for row in read_good(path)] == [[str(data / "a.png")]] * 4


def test_image_root(data: Path) -> None:
    path = write_lines(data / "rows.jsonl", {**HELLO, "image": "x.png"}, {**HELLO, "image": "../data/a.png"})
    inside, leaving = read(path, image_root=str(data.parent / "data2"))
    assert inside["images"] == [str(data.parent / "data2" / "x.png")]
    assert "leaves the folder" in leaving["error"]
    with pytest.raises(DataError, match="--image_root nowhere: no such folder"):
        scan(str(path), image_root="nowhere")


def test_images_of_data_in_a_bucket() -> None:
    rules = ImageRules("s3://bucket/data?region=eu-west-1")
    assert (
        rules.resolve("a b.png")
        == rules.resolve("sub/../a b.png")
        == "s3://bucket/data/a%20b.png?region=eu-west-1"
    )
    assert (
        rules.resolve("s3://bucket/data/a.png?endpoint_override=elsewhere")
        == "s3://bucket/data/a.png?region=eu-west-1"
    )
    assert filesystem(rules.resolve("a b%2e.png"))[1] == "bucket/data/a b%2e.png"
    assert join(rules.root, "messages.txt") == "s3://bucket/data/messages.txt?region=eu-west-1"
    for name in (
        "../b.png",
        "/b.png",
        "s3://bucket/data2/a.png",
        "s3://bucket/data/%2e%2e/a.png",
        "s3://other/data/a.png",
        "file:///b.png",
    ):
        with pytest.raises(RowError, match="leaves the folder"):
            rules.resolve(name)
    for name in ("gs://bucket/data/a.png", "https://bucket/data/a.png"):
        with pytest.raises(RowError, match="is remote"):
            rules.resolve(name)
    assert (
        ImageRules(rules.root, allow_outside_paths=True).resolve("../b.png")
        == "s3://bucket/b.png?region=eu-west-1"
    )


# --- the data as a whole ---

WHOLE: dict[str, tuple[str, bytes, str]] = {
    "empty": ("rows.jsonl", b"", "is empty"),
    "blank": ("rows.jsonl", b"\n \r\n", "is empty"),
    "BOM only": ("rows.json", b"\xef\xbb\xbf", "is empty"),
    "empty array": ("rows.json", b"[ ]", "is an empty array"),
    "UTF-16": ("rows.jsonl", json.dumps(HELLO).encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    "object over lines": ("rows.json", b'{\n"data": []\n}', "is neither an array of rows"),
    "false Parquet": ("rows.parquet", b"hello, hello", "is no Parquet file"),
    "cut Parquet": ("rows.parquet", b"PAR1 and no more", "cannot be read"),
    "image": ("a.png", b"\x89PNG\r\n\x1a\n", "is no format that is understood; it begins with b'\\x89PNG"),
    "CSV": ("rows.csv", b"a,b\n1,2\n", "is no format that is understood"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_file_that_cannot_be_read(case: str, tmp_path: Path) -> None:
    name, content, reason = WHOLE[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        scan(str(tmp_path / name))
    assert reason in str(caught.value)
    assert f"{tmp_path}/{name}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name, reason in (
        ("rows.jsonl", "rows.jsonl: no such file or folder$"),
        ("./rows", "no such file or folder$"),
        (f"{tmp_path}/none", "no such file or folder$"),
        ("data/train", "no such file or folder in data/$"),
        ("a/b/c", "no such file or folder$"),
        ("foo://bucket/rows.jsonl", r"foo://bucket/rows.jsonl cannot be read: .*foo"),
        ("data", "data holds nothing, no data that is understood. Understood: a folder with frames/"),
    ):
        with pytest.raises(DataError, match=reason):
            scan(name)
    (tmp_path / "data" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"data holds notes.txt, no data that is understood"):
        scan("data")


def test_hub_name_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError,
        match="nobody/none: no such file or folder here, and no Hugging Face dataset of that name could be loaded",
    ):
        scan("nobody/none")


def test_dataset_that_datasets_builds_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "repository").mkdir()
    write_lines(tmp_path / "repository" / "train.jsonl", HELLO, {**HELLO, "image": "/etc/passwd"})
    piece = Piece(
        "hub", str(tmp_path / "repository"), "owner/name", ImageRules(str(tmp_path / "cache")), stop=2
    )
    good, bad = read_piece(piece)
    assert good == {
        "source": "owner/name row 0",
        "messages": [ASKED, ANSWERED],
        "images": [],
        "group": None,
        "error": None,
    }
    assert (bad["source"], "leaves the folder" in bad["error"]) == ("owner/name row 1", True)


def test_mixed_formats_and_unknown_columns(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", HELLO)
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(
        DataError,
        match=r"b.parquet has none of the columns messages, conversations, prompt, instruction; it has: question, answer",
    ):
        scan(str(tmp_path))
    pq.write_table(pa.table({"instruction": ["a"], "output": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"mixes formats: .*a.jsonl and .*b.parquet"):
        scan(str(tmp_path))
    pq.write_table(
        pa.table({"instruction": pa.array([], pa.string()), "output": pa.array([], pa.string())}),
        tmp_path / "b.parquet",
    )
    with pytest.raises(DataError, match=r"b.parquet has no rows"):
        scan(str(tmp_path / "b.parquet"))


def test_group_by_that_does_not_exist(tmp_path: Path) -> None:
    folder = frames_folder(tmp_path / "mall", COUNT, "id,count\n1,2\n")
    with pytest.raises(
        DataError, match=r"--group_by camera: .*labels.csv has no such column; it has: id, count"
    ):
        scan(str(folder), group_by="camera")
    pq.write_table(pa.table({"instruction": ["a"], "output": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(
        DataError, match=r"--group_by camera: .*b.parquet has no such column; it has: instruction, output"
    ):
        scan(str(tmp_path / "b.parquet"), group_by="camera")


def test_file_that_vanishes_after_the_scan(tmp_path: Path) -> None:
    pieces = scan(str(write_lines(tmp_path / "rows.jsonl", HELLO)))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"rows.jsonl cannot be read"):
        list(read_piece(pieces[0]))
