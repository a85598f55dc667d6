"""Kinds of files and folders that people have, each read as the conversations that it means."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats_kit import IMAGE, Row, png, read, read_good, turn, write_lines

from vlmtune.data.examples import encode_row
from vlmtune.data.find_input_format import find_input_format
from vlmtune.data.formats import read_fragment
from vlmtune.data.question_columns import Columns
from vlmtune.data.scan import scan
from vlmtune.data.tokenize import RowEncoder
from vlmtune.demo.models import write_model
from vlmtune.errors import DataError
from vlmtune.model_ref import ModelRef


def turns_of(question: str, answer: str) -> list[Row]:
    return [turn("user", IMAGE, question), turn("assistant", answer)]


def conversations(rows: list[Row]) -> list[tuple[list[Row], list[str]]]:
    return [(row["messages"], [Path(image).name for image in row["images"]]) for row in rows]


def images(folder: Path, *names: str) -> Path:
    for name in names:
        png(folder / name)
    return folder


@pytest.mark.parametrize(("name", "separator"), [("rows.csv", ","), ("rows.csv", ";"), ("rows.tsv", "\t")])
def test_table(name: str, separator: str, tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    rows = [("image", "question", "answer"), ("a.png", "What, now?", "red"), ("b.png", "And?", "3")]
    lines = (separator.join(f'"{value}"' for value in row) for row in rows)
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    for path in (tmp_path / name, tmp_path):
        found = read_good(path)
        assert conversations(found) == [
            (turns_of("What, now?", "red"), ["a.png"]),
            (turns_of("And?", "3"), ["b.png"]),
        ]
        assert [row["source"] for row in found] == [f"{tmp_path}/{name}:2", f"{tmp_path}/{name}:3"]


def test_table_with_other_columns(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    path = tmp_path / "rows.csv"
    path.write_text("shot,ask,reply\na.png,What?,red\nb.png,And?\n")
    with pytest.raises(DataError, match=r"--columns image=shot question=ask answer=reply; or give one"):
        scan(str(path))
    named = Columns((("answer", "reply"), ("image", "shot"), ("question", "ask")))
    good, bad = read(path, columns=named)
    assert conversations([good]) == [(turns_of("What?", "red"), ["a.png"])]
    assert "2 fields where the header has 3" in bad["error"]
    counted = read_good(path.with_name("c.csv"), columns=one_question(path.with_name("c.csv")))
    assert conversations(counted) == [
        (turns_of("How many?", "3"), ["a.png"]),
        (turns_of("How many?", "0"), ["b.png"]),
    ]
    for columns, reason in (
        (Columns((("answer", "no"),)), "--columns answer=no: .* has no column 'no'; it has: shot, ask"),
        (Columns((), "How many?", "no"), "--answer_column no: .*rows.csv has no such column"),
        (Columns((), "How many?"), "name the column of .*rows.csv with its answer: --answer_column"),
    ):
        with pytest.raises(DataError, match=reason):
            scan(str(path), columns=columns)


def one_question(path: Path) -> Columns:
    path.write_text("file_name,count\na.png,3\nb.png,0\n")
    return Columns((), "How many?", "count")


def test_question_beside_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("image,question,answer\na.png,What?,red\n")
    with pytest.raises(
        DataError, match=r"has questions of its own in column 'question': leave out --question"
    ):
        scan(str(path), columns=Columns((), "How many?", "answer"))
    (row,) = read(
        write_lines(tmp_path / "r.jsonl", {"question": "a", "answer": "b"}), columns=Columns((), "c")
    )
    assert row["error"] == "the row has a question of its own in 'question': leave out --question"


def test_folder_for_each_class(tmp_path: Path) -> None:
    folder = images(tmp_path / "animals", "cat/1.png", "cat/2.png", "big dog/1.png")
    (folder / "cat" / "notes.txt").write_text("x")
    with pytest.raises(
        DataError, match=r"a folder for each class \(big dog, cat\): .*--question \"What is in"
    ):
        scan(str(folder))
    rows = read_good(folder, columns=Columns((), "Which animal?"))
    assert conversations(rows) == [
        (turns_of("Which animal?", "big dog"), ["1.png"]),
        (turns_of("Which animal?", "cat"), ["1.png"]),
        (turns_of("Which animal?", "cat"), ["2.png"]),
    ]
    assert rows[0]["source"] == f"{folder}/big dog/1.png"
    with pytest.raises(DataError, match=r"holds one class alone \(cat\)"):
        scan(str(images(tmp_path / "one", "cat/1.png")), columns=Columns((), "Which animal?"))
    with pytest.raises(DataError, match=r"holds images .a.png. and no file that says what to answer"):
        scan(str(images(tmp_path / "flat", "a.png")), columns=Columns((), "Which animal?"))


def test_images_beside_a_folder_of_annotations_are_no_class(tmp_path: Path) -> None:
    folder = images(tmp_path / "data", "images/1.png", "images/2.png")
    (folder / "annotations").mkdir()
    write_lines(folder / "annotations" / "train.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(DataError, match=r"annotations/ holds train.jsonl: give --data_path \S+ --image_root"):
        scan(str(folder))
    with pytest.raises(DataError, match=r"annotations/ holds train\.jsonl"):
        scan(str(folder), columns=Columns((), "Which animal?"))


def test_splits_that_folders_are_named_after(tmp_path: Path) -> None:
    folder = images(
        tmp_path / "animals",
        *(f"{split}/{name}/1.png" for split in ("train", "val", "test") for name in "ab"),
    )
    rows = [
        row
        for fragment in scan(str(folder), columns=Columns((), "Which?"))
        for row in read_fragment(fragment)
    ]
    found = [(row["split"], row["messages"][1]["content"][0]["text"]) for row in rows]
    assert sorted(found) == [(split, name) for split in ("eval", "test", "train") for name in "ab"]
    for split in ("train", "test"):
        images(tmp_path / "photos" / split, "1.png")
        (tmp_path / "photos" / split / "metadata.csv").write_text(
            "file_name,question,answer\n1.png,What?,red\n"
        )
    rows = [row for fragment in scan(str(tmp_path / "photos")) for row in read_fragment(fragment)]
    assert sorted(row["split"] for row in rows) == ["test", "train"]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_imagefolder_with_metadata(name: str, tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "split" / "train"):
        images(folder, "a.png", "sub/b.png")
        rows = [{"file_name": "a.png", "text": "zero"}, {"file_name": "sub/b.png", "text": "one"}]
        if name.endswith("csv"):
            (folder / name).write_text("file_name,text\na.png,zero\nsub/b.png,one\n")
        else:
            write_lines(folder / name, *rows)
    with pytest.raises(DataError, match=r'Give a question: --question "What is .*" --answer_column text'):
        scan(str(tmp_path / "one"))
    expected = [(turns_of("Read it", "zero"), ["a.png"]), (turns_of("Read it", "one"), ["b.png"])]
    for path in (tmp_path / "one", tmp_path / "split"):
        assert conversations(read_good(path, columns=Columns((), "Read it", "text"))) == expected


def test_coco_captions(tmp_path: Path) -> None:
    images(tmp_path / "val", "000000000009.png")
    content = {
        "info": {"year": 2017},
        "images": [{"id": 9, "file_name": "000000000009.png"}],
        "annotations": [
            {"id": 1, "image_id": 9, "caption": "A cat."},
            {"id": 2, "image_id": 9, "caption": "One cat."},
            {"id": 3, "image_id": 8, "caption": "A dog."},
        ],
    }
    path = tmp_path / "captions.json"
    for indent in (None, 1):
        path.write_text(json.dumps(content, indent=indent))
        with pytest.raises(DataError, match=r"captions.json holds captions and no question: .*--question"):
            scan(str(path))
        *good, bad = read(path, image_root=str(tmp_path / "val"), columns=Columns((), "Describe"))
        assert conversations(good) == [
            (turns_of("Describe", "A cat."), ["000000000009.png"]),
            (turns_of("Describe", "One cat."), ["000000000009.png"]),
        ]
        assert bad["error"] == "its image_id is the id of no image with a file_name"
    content["annotations"] = [{"id": 1, "image_id": 9, "bbox": [0, 0, 2, 2]}]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"COCO annotations without captions"):
        scan(str(path))


def test_vqa(tmp_path: Path) -> None:
    images(tmp_path / "val", "COCO_val2014_000000000009.png")
    questions = [
        {"image_id": 9, "question": "What?", "question_id": 90},
        {"image_id": 9, "question": "How many?", "question_id": 91},
        {"image_id": 7, "question": "How many?", "question_id": 92},
    ]
    answers = [
        {"question_id": 90, "image_id": 9, "multiple_choice_answer": "cat", "answers": [{"answer": "pet"}]},
        {"question_id": 91, "image_id": 9, "answers": [{"answer": "2"}, {"answer": "1"}, {"answer": "1"}]},
        {"question_id": 92, "image_id": 7, "multiple_choice_answer": "3"},
    ]
    (tmp_path / "questions.json").write_text(json.dumps({"info": {}, "questions": questions}))
    with pytest.raises(DataError, match=r"no file beside it holds their answers"):
        scan(str(tmp_path / "questions.json"))
    (tmp_path / "answers.json").write_text(json.dumps({"info": {}, "annotations": answers}))
    for path in (tmp_path, tmp_path / "questions.json"):
        *good, bad = read(path)
        assert conversations(good) == [
            (turns_of("What?", "cat"), ["COCO_val2014_000000000009.png"]),
            (turns_of("How many?", "1"), ["COCO_val2014_000000000009.png"]),
        ]
        assert bad["error"] == "image_id 7 fits no image below --image_root"
    with pytest.raises(DataError, match=r"give the file with the questions"):
        scan(str(tmp_path / "answers.json"))


def shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_webdataset_shards(tmp_path: Path) -> None:
    image = png(tmp_path / "a.png").read_bytes()
    folder = tmp_path / "shards"
    folder.mkdir()
    shard(folder / "0.tar", {"x/1.png": image, "x/1.txt": b"red", "x/2.jpg": image, "x/2.txt": b"blue"})
    shard(folder / "1.tar", {"3.left.png": image, "3.right.png": image, "3.txt": "둘".encode()})
    rows = read_good(folder, columns=Columns((), "Colour?", "txt"))
    assert [row["messages"][1] for row in rows] == [turn("assistant", word) for word in ("red", "blue", "둘")]
    assert [row["images"] for row in rows] == [[image], [image], [image, image]]
    assert [row["source"] for row in rows] == [
        f"{folder}/0.tar:x/1",
        f"{folder}/0.tar:x/2",
        f"{folder}/1.tar:3",
    ]
    with pytest.raises(
        DataError, match=r"0.tar has no columns with a question and its answer; it has: txt, image"
    ):
        scan(str(folder))
    question = json.dumps({"question": "Which?", "answer": "This"}).encode()
    shard(tmp_path / "qa.tar", {"1.png": image, "1.json": question})
    assert read_good(tmp_path / "qa.tar")[0]["messages"] == turns_of("Which?", "This")
    (tmp_path / "cut.tar").write_bytes((folder / "0.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=r"cut.tar"):
        scan(str(tmp_path / "cut.tar"), columns=Columns((), "Colour?", "txt"))


def data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_rows_of_other_programs(tmp_path: Path) -> None:
    image = png(tmp_path / "a.png")
    openai: list[Any] = [
        {"type": "image_url", "image_url": {"url": data_uri(image)}},
        {"type": "text", "text": "What?"},
    ]
    rows = [
        {"query": "<image>What?", "response": "red", "images": ["a.png"]},
        {"question": "What?", "answer": "red", "image": "a.png"},
        {"question": "What?", "answer": "red", "image_path": "a.png"},
        {"prompt": "What?", "completion": "red", "image": "a.png"},
        {"messages": [{"role": "user", "content": openai}, {"role": "assistant", "content": "red"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}, openai[1]]},
                {"role": "assistant", "content": "red"},
            ]
        },
    ]
    found = read_good(write_lines(tmp_path / "rows.jsonl", *rows))
    (fragment,) = scan(str(tmp_path / "rows.jsonl"))
    assert [row["reading_notes"] for row in read_fragment(fragment)][1:3] == [
        (),
        ("image_path is read as the image",),
    ]
    assert [row["messages"] for row in found] == [turns_of("What?", "red")] * len(rows)
    assert [row["images"] for row in found] == [
        [image.read_bytes()] if number == 4 else [str(image)] for number in range(len(rows))
    ]


def test_bad_rows_of_other_programs(tmp_path: Path) -> None:
    broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,a"}}]
    boxes = {"ref": ["a cat"], "bbox": [[1, 2, 3, 4]]}
    bad = {
        "2 <bbox> marks but 1 box in 'objects'": {
            "query": "<image>Find <ref-object>",
            "response": "<bbox> <bbox>",
            "images": ["a.png"],
            "objects": boxes,
        },
        "the text holds <bbox>, but the row has no 'objects'": {
            "messages": [{"role": "user", "content": "Find it"}, {"role": "assistant", "content": "<bbox>"}]
        },
        "'answer' must be a non-empty string": {"question": "What?", "answer": ""},
        "'query' must be a non-empty string": {"query": " ", "response": "a"},
        "messages[0].content[0] is a data URI whose base64 is broken": {
            "messages": [{"role": "user", "content": broken}, {"role": "assistant", "content": "red"}]
        },
    }
    rows = read(write_lines(tmp_path / "rows.jsonl", *bad.values()))
    assert [reason in row["error"] for reason, row in zip(bad, rows, strict=True)] == [True] * len(bad)


def test_parquet_of_images_and_labels(tmp_path: Path) -> None:
    content = png(tmp_path / "a.png").read_bytes()
    table = pa.table({"photo": [{"bytes": content, "path": None}] * 2, "label": [3, 4]})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = read_good(tmp_path / "rows.parquet", columns=Columns((("image", "photo"),), "How many?"))
    assert [(row["messages"], row["images"]) for row in rows] == [
        (turns_of("How many?", "3"), [content]),
        (turns_of("How many?", "4"), [content]),
    ]


def test_files_become_examples(tmp_path: Path) -> None:
    write_model("llava", tmp_path / "llava")
    processor = ModelRef(str(tmp_path / "llava")).processor()
    encoder = RowEncoder(processor, find_input_format(processor))
    images(tmp_path / "animals", "cat/1.png", "dog/2.png")
    images(tmp_path / "photos", "1.png", "2.png")
    (tmp_path / "photos" / "rows.csv").write_text("image,question,answer\n1.png,What?,cat\n2.png,What?,dog\n")
    shard(tmp_path / "a.tar", {"1.png": png(tmp_path / "1.png").read_bytes(), "1.txt": b"cat"})
    for path, columns in (
        (tmp_path / "photos", Columns()),
        (tmp_path / "animals", Columns((), "What?")),
        (tmp_path / "a.tar", Columns((), "What?", "txt")),
    ):
        rows = [row for fragment in scan(str(path), columns=columns) for row in read_fragment(fragment)]
        for row, answer in zip(rows, ("cat", "dog"), strict=False):
            line, example = encode_row(encoder, row)
            assert example is not None, line["error"]
            assert line["image_tokens"] > 0
            assert answer in processor.tokenizer.decode(example.input_ids[example.labels >= 0])
