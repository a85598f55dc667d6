"""Files of every format → prepared rows, through real Ray Data; and what is said of bad rows."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from prepare_kit import (
    COUNTS,
    answers,
    counted,
    instruction_jsonl,
    noise_image,
    splits_of,
    write_images,
    write_lines,
)

from vlmtune.cluster import connect
from vlmtune.data.cache import prepare_store
from vlmtune.data.find_input_format import find_input_format
from vlmtune.data.prepare import ROWS_PER_SHARD, SHARDS_PER_TASK, cut_into_tasks
from vlmtune.data.source import DataSource
from vlmtune.data.tokenize import RowEncoder
from vlmtune.demo.mall import MESSAGES
from vlmtune.errors import DataError, ModelError
from vlmtune.model_ref import ModelRef

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        connect()
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def llava(models: Path) -> str:
    return str(models / "llava")


def frames_folder(folder: Path) -> Path:
    for image in write_images(folder / "frames"):
        number = int(Path(image).stem)
        (folder / image).rename(folder / "frames" / f"seq_{number + 1:06d}.png")
    (folder / "messages.txt").write_text("USER: How many people?\nASSISTANT: {count} people", "utf-8")
    (folder / "labels.csv").write_text(
        "id,count\n" + "".join(f"{id},{count}\n" for id, count in enumerate(COUNTS, 1))
    )
    return folder


def messages_json(folder: Path) -> Path:
    """Half of the rows with typed parts, half with <image> marks."""
    rows = []
    for number, row in enumerate(counted(folder)):
        typed = [{"type": "image"}, {"type": "text", "text": "How many people?"}]
        question = {"role": "user", "content": typed if number % 2 else "<image>\nHow many people?"}
        rows.append(
            {
                "messages": [question, {"role": "assistant", "content": row["output"]}],
                "images": [row["image"]],
            }
        )
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def sharegpt_json(folder: Path) -> Path:
    rows = [
        {
            "id": str(number),
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": "<image>\nHow many people?"},
                {"from": "gpt", "value": row["output"]},
            ],
        }
        for number, row in enumerate(counted(folder))
    ]
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def parquet_paths(folder: Path) -> Path:
    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist(counted(folder)), path, row_group_size=3)
    return path


def parquet_bytes(folder: Path) -> Path:
    rows = [
        {**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}}
        for row in counted(folder)
    ]
    shutil.rmtree(folder / "images")
    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def saved_dataset(folder: Path) -> Path:
    rows = [{**row, "image": noise_image(number)} for number, row in enumerate(counted(folder))]
    shutil.rmtree(folder / "images")
    features = datasets.Features(
        {
            "instruction": datasets.Value("string"),
            "output": datasets.Value("string"),
            "image": datasets.Image(),
        }
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    return folder / "saved"


FORMATS = [
    frames_folder,
    instruction_jsonl,
    messages_json,
    sharegpt_json,
    parquet_paths,
    parquet_bytes,
    saved_dataset,
]


@pytest.mark.parametrize("write", FORMATS)
def test_a_format_from_files_to_labels(tmp_path: Path, llava: str, write: Callable[[Path], Path]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    store = prepare_store(
        DataSource(str(write(folder)), ModelRef(llava), eval_fraction=0.25, test_fraction=0.25),
        str(tmp_path / "cache"),
    )
    processor = ModelRef(llava).processor()
    encoder = RowEncoder(processor, find_input_format(processor))
    assert answers(store, encoder) == [[f" {count} people</s>"] for count in COUNTS]
    assert sorted(store.column("split")) == ["eval"] * 2 + ["test"] * 2 + ["train"] * 4
    question = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many people?"}]}
    ]
    for number, example in enumerate(store.read(range(store.meta.rows))):
        shown = [
            *question,
            {"role": "assistant", "content": [{"type": "text", "text": f"{COUNTS[number]} people"}]},
        ]
        expected = encoder.encode(shown, [noise_image(number)])
        assert np.array_equal(example.input_ids, expected.input_ids)
        assert example.tensors["pixel_values"].dtype == np.uint8
        assert np.array_equal(example.tensors["pixel_values"], expected.tensors["pixel_values"]), (
            "the row's own image"
        )


def test_the_sample_frames_in_two_languages(tmp_path: Path, mall: Path, llava: str) -> None:
    store = prepare_store(
        DataSource(str(mall), ModelRef(llava), eval_fraction=0.2, test_fraction=0.2), str(tmp_path)
    )
    labels = [line.split(",")[1] for line in (mall / "labels.csv").read_text().splitlines()[1:]]
    assert MESSAGES.count("{count}") == 2
    assert answers(store, RowEncoder(ModelRef(llava).processor())) == [
        [text] for n in labels for text in (f" {n}</s>", f" {n}명</s>")
    ]
    on = defaultdict(set)
    for source, side in splits_of(store).items():
        on[source.split(" (dialogue")[0]].add(side)
    assert len(on) == len(labels)
    assert all(len(found) == 1 for found in on.values()), "both questions about a frame are in one split"


@pytest.mark.parametrize(
    ("family", "answer"), [("mllama", "{}<|eot_id|>"), ("smolvlm", " {}<end_of_utterance>")]
)
def test_other_families_and_many_turns(tmp_path: Path, models: Path, family: str, answer: str) -> None:
    image = write_images(tmp_path / "images", 2)
    talk = ["<image>\nHow many?", "세 명", "And here? <image>", "Nobody.", "Sure?", "Yes."]
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(talk)
    ]
    text_only = [
        {"role": "user", "content": "What is a beam?"},
        {"role": "assistant", "content": "A member."},
    ]
    path = write_lines(
        tmp_path / "data.jsonl", [{"messages": messages, "images": image}, {"messages": text_only}]
    )
    model = str(models / family)
    store = prepare_store(
        DataSource(str(path), ModelRef(model), eval_fraction=0, test_fraction=0), str(tmp_path / "cache")
    )
    found = answers(store, RowEncoder(ModelRef(model).processor()))
    assert found == [[answer.format(text) for text in talk[1::2]], [answer.format("A member.")]]
    assert (store.column("image_tokens") > 0).tolist() == [True, False]


@pytest.mark.parametrize("number", [0, 1, 64, 200, 1000, 5000])
def test_tasks_hold_all_rows_in_order_and_begin_and_end_small(number: int) -> None:
    """Tasks of different lengths at the end would leave all but one worker idle."""
    tasks = list(cut_into_tasks(iter(range(number)), 3))
    assert [row for task in tasks for row in task] == list(range(number))
    shards = [-(-len(task) // ROWS_PER_SHARD) for task in tasks]
    assert shards[:3] + shards[-3:] == [1] * len(shards[:3] + shards[-3:])
    assert max(shards, default=1) == (SHARDS_PER_TASK if number > 14 * ROWS_PER_SHARD else 1)


def test_rows_lie_in_the_order_of_their_sources(tmp_path: Path, llava: str) -> None:
    """Many tasks, the first of which have the most to do."""
    folder = tmp_path / "data"
    images = write_images(folder / "images", 90)
    first = [
        {"instruction": "How many?", "output": f"a{number}", "image": image}
        for number, image in enumerate(images)
    ]
    write_lines(folder / "a.jsonl", first)
    write_lines(
        folder / "b.jsonl", [{"instruction": f"b{number}?", "output": f"b{number}"} for number in range(200)]
    )
    write_lines(folder / "c.jsonl", [{"instruction": "c?", "output": "c0"}])
    store = prepare_store(DataSource(str(folder), ModelRef(llava)), str(tmp_path / "cache"))
    expected = [
        f"{folder}/{name}.jsonl:{line + 1}"
        for name, rows in (("a", 90), ("b", 200), ("c", 1))
        for line in range(rows)
    ]
    assert store.column("source").tolist() == expected
    texts = [
        f" {name}{number}</s>" for name, rows in (("a", 90), ("b", 200), ("c", 1)) for number in range(rows)
    ]
    assert answers(store, RowEncoder(ModelRef(llava).processor())) == [[text] for text in texts]
    assert len(set(store.column("shard"))) > 3


def bad_rows(folder: Path) -> tuple[Path, dict[int, str]]:
    """A file with ten bad rows among eight good ones, and what is wrong by line."""
    good = counted(folder)
    (folder / "images" / "half.png").write_bytes((folder / "images" / "000.png").read_bytes()[:900])
    ask = {"instruction": "How many?", "output": "5"}
    bad: list[tuple[Any, str]] = [
        ({**ask, "output": None}, "'output' must be a non-empty string, not null"),
        ({**ask, "image": "images/none.png"}, "there is no such file"),
        ('{"instruction": ', "not JSON"),
        ({**ask, "image": "images/half.png"}, "truncated or damaged"),
        ({**ask, "output": "five</s>"}, "contains '</s>', a special token"),
        ({**ask, "image": "../secret.png"}, "leaves the folder"),
        ({**ask, "output": True}, "'output' must be a non-empty string, not a boolean"),
    ]
    lines = [line for pair in zip(good, [row for row, _ in bad], strict=False) for line in pair] + good[7:]
    return write_lines(folder / "data.jsonl", lines), {
        2 * index + 2: reason for index, (_, reason) in enumerate(bad)
    }


def test_bad_rows_stop_with_the_first_five_named(tmp_path: Path, llava: str) -> None:
    path, reasons = bad_rows(tmp_path)
    with pytest.raises(DataError) as raised:
        prepare_store(DataSource(str(path), ModelRef(llava)), str(tmp_path / "cache"))
    message = str(raised.value)
    for line, reason in list(reasons.items())[:5]:
        start = message.index(f"{path}:{line}: ")
        assert reason in message[start:].split("; ")[0]
    assert f"{path}:12" not in message
    assert "2 more" in message
    assert "7 of 15 rows are bad; --on_bad_row skip" in message
    assert "\n" not in message
    assert not list((tmp_path / "cache").glob("*.part"))


def test_bad_rows_are_listed_and_left_out_on_request(tmp_path: Path, llava: str) -> None:
    path, reasons = bad_rows(tmp_path)
    source = DataSource(str(path), ModelRef(llava), on_bad_row="skip")
    with pytest.raises(DataError, match=r"7 of 15 rows are bad, more than --max_bad_fraction 0\.05; repair"):
        prepare_store(source, str(tmp_path / "cache"))
    store = prepare_store(replace(source, max_bad_fraction=0.5), str(tmp_path / "cache"))
    assert (store.meta.rows, store.meta.bad_rows) == (8, 7)
    assert store.column("source").tolist() == [f"{path}:{line}" for line in (1, 3, 5, 7, 9, 11, 13, 15)]
    assert answers(store, RowEncoder(ModelRef(llava).processor())) == [
        [f" {count} people</s>"] for count in COUNTS
    ]
    store.copy_bad_rows(str(tmp_path / "bad_rows.jsonl"))
    listed = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["source"] for row in listed] == [f"{path}:{line}" for line in reasons]
    for row, reason in zip(listed, reasons.values(), strict=True):
        assert reason in row["reason"]


def test_a_mended_image_makes_its_row_good(tmp_path: Path, llava: str) -> None:
    path, _ = bad_rows(tmp_path)
    source = DataSource(str(path), ModelRef(llava), on_bad_row="skip", max_bad_fraction=0.5)
    assert prepare_store(source, str(tmp_path / "cache")).meta.bad_rows == 7
    noise_image(50).save(tmp_path / "images" / "none.png")
    noise_image(51).save(tmp_path / "images" / "half.png")
    assert prepare_store(source, str(tmp_path / "cache")).meta.bad_rows == 5


def test_nothing_but_bad_rows_cannot_be_skipped(tmp_path: Path, llava: str) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"instruction": "a", "output": None}] * 3)
    with pytest.raises(DataError, match=f"{path}: no usable row"):
        prepare_store(DataSource(str(path), ModelRef(llava), on_bad_row="skip"), str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_file_that_breaks_off_inside_a_task_is_one_plain_line(
    tmp_path: Path, llava: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(
        pa.table({"instruction": ["a"] * 50, "output": [str(number) for number in range(50)]}), path
    )
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 40 + content[44:])  # the pages, not the footer that a scan reads
    with pytest.raises(DataError) as raised:
        prepare_store(DataSource(str(path), ModelRef(llava)), str(tmp_path / "cache"))
    assert type(raised.value) is DataError
    assert str(raised.value).startswith(f"{path} cannot be read: ")
    assert "\n" not in str(raised.value)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(ModelError, match=r"nowhere/model.*is not there"):
        prepare_store(
            DataSource(str(path), ModelRef(str(tmp_path / "nowhere/model"))), str(tmp_path / "cache")
        )
    assert not (tmp_path / "cache").exists()
