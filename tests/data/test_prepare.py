"""Files of every format → prepared rows, through real Ray Data: decoded again, made once, refused plainly,
never half there."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from vlmtune.cluster import connect
from vlmtune.data.cache import USED, prepare_store
from vlmtune.data.encoded_example import ANSWER
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.data.tokenize import RowEncoder
from vlmtune.demo.mall import MESSAGES
from vlmtune.errors import DataError, ModelError
from vlmtune.model_ref import ModelRef

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]
COUNTS = [3, 0, 7, 5, 2, 9, 4, 1]  # of people, one a picture


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


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (30, 40, 3)).astype(np.uint8))


def write_pictures(folder: Path, number: int = len(COUNTS)) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        picture(index).save(folder / f"{index:03d}.png")
    return [f"{folder.name}/{index:03d}.png" for index in range(number)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join(
            (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows
        ),
        "utf-8",
    )
    return path


def counted(folder: Path) -> list[dict[str, Any]]:
    """Instruction rows about the pictures of a new folder beside them."""
    return [
        {"instruction": "How many people?", "output": f"{count} people", "image": image}
        for image, count in zip(write_pictures(folder / "images"), COUNTS, strict=True)
    ]


def answers(store: Store, encoder: RowEncoder) -> list[list[str]]:
    """What is trained on in each row, decoded; turn by turn."""
    found = []
    for example in store.read(range(store.meta.rows)):
        positions = np.flatnonzero(example.kinds == ANSWER)
        turns = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
        found.append([encoder.tokenizer.decode(example.input_ids[turn]) for turn in turns])
    return found


def sides(store: Store) -> dict[str, str]:
    return dict(zip(store.column("source"), store.column("split"), strict=True))


# --- every format, followed to the labels ---


def frames_folder(folder: Path) -> Path:
    for image in write_pictures(folder / "frames"):
        number = int(Path(image).stem)
        (folder / image).rename(folder / "frames" / f"seq_{number + 1:06d}.png")
    (folder / "messages.txt").write_text("USER: How many people?\nASSISTANT: {count} people", "utf-8")
    (folder / "labels.csv").write_text(
        "id,count\n" + "".join(f"{id},{count}\n" for id, count in enumerate(COUNTS, 1))
    )
    return folder


def instruction_jsonl(folder: Path) -> Path:
    return write_lines(folder / "data.jsonl", counted(folder))


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
    rows = [{**row, "image": picture(number)} for number, row in enumerate(counted(folder))]
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
    encoder = RowEncoder(ModelRef(llava).processor(), raw_pixels=True)
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
        expected = encoder.encode(shown, [picture(number)])
        assert np.array_equal(example.input_ids, expected.input_ids)
        assert example.tensors["pixel_values"].dtype == np.uint8
        assert np.array_equal(example.tensors["pixel_values"], expected.tensors["pixel_values"]), (
            "the row's own picture"
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
    for source, side in sides(store).items():
        on[source.split(" (dialogue")[0]].add(side)
    assert len(on) == len(labels)
    assert all(len(found) == 1 for found in on.values()), "both questions about a frame stand on one side"


@pytest.mark.parametrize(
    ("family", "answer"), [("mllama", "{}<|eot_id|>"), ("smolvlm", " {}<end_of_utterance>")]
)
def test_other_families_and_many_turns(tmp_path: Path, models: Path, family: str, answer: str) -> None:
    image = write_pictures(tmp_path / "images", 2)
    talk = ["<image>\nHow many?", "세 명", "And here? <image>", "Nobody.", "Sure?", "Yes."]
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(talk)
    ]
    asked = [{"role": "user", "content": "What is a beam?"}, {"role": "assistant", "content": "A member."}]
    path = write_lines(
        tmp_path / "data.jsonl", [{"messages": messages, "images": image}, {"messages": asked}]
    )
    model = str(models / family)
    store = prepare_store(
        DataSource(str(path), ModelRef(model), eval_fraction=0, test_fraction=0), str(tmp_path / "cache")
    )
    found = answers(store, RowEncoder(ModelRef(model).processor()))
    assert found == [[answer.format(text) for text in talk[1::2]], [answer.format("A member.")]]
    assert (store.column("image_tokens") > 0).tolist() == [True, False]


def test_rows_lie_in_the_order_of_their_sources(tmp_path: Path, llava: str) -> None:
    """Many tasks, the first of which have the most to do."""
    folder = tmp_path / "data"
    images = write_pictures(folder / "images", 90)
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


# --- prepared once ---


def files_of(store: Store) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(store.folder).iterdir() if path.name != USED}


def test_prepared_once_and_found_again(tmp_path: Path, llava: str) -> None:
    cache = tmp_path / "cache"
    source = DataSource(str(instruction_jsonl(tmp_path)), ModelRef(llava))
    first = prepare_store(source, str(cache))
    before = files_of(first)
    again = prepare_store(source, str(cache))
    assert again.folder == first.folder
    assert files_of(again) == before
    assert [path.name for path in cache.iterdir()] == [Path(first.folder).name]
    moved = shutil.copytree(llava, tmp_path / "moved")
    assert (
        prepare_store(DataSource(source.data_path, ModelRef(str(moved))), str(cache)).folder == first.folder
    ), "the same processor in another place"


def change_data(folder: Path) -> None:
    rows = (folder / "data.jsonl").read_text().splitlines()
    write_lines(folder / "data.jsonl", [*rows[:-1], rows[-1].replace("1 people", "2 people")])


def change_image(folder: Path) -> None:
    picture(99).save(folder / "images" / "000.png")


def change_processor(folder: Path) -> None:
    path = folder / "model" / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    path.write_text(json.dumps(values))


def change_template(folder: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}> {% for p in m.content %}{{ p.text if p.text else '<image>' }}{% endfor %}\n{% endfor %}"
    (folder / "model" / "chat_template.jinja").write_text(template)


def change_tokenizer(folder: Path) -> None:
    processor = ModelRef(str(folder / "model")).processor()
    processor.tokenizer.add_tokens(["people"])
    processor.save_pretrained(folder / "model")


@pytest.mark.parametrize(
    "change", [change_data, change_image, change_processor, change_template, change_tokenizer]
)
def test_a_change_makes_a_new_store(tmp_path: Path, llava: str, change: Callable[[Path], None]) -> None:
    shutil.copytree(llava, tmp_path / "model")
    source = DataSource(str(instruction_jsonl(tmp_path)), ModelRef(str(tmp_path / "model")))
    old = prepare_store(source, str(tmp_path / "cache"))
    before = [
        (example.input_ids.tolist(), example.tensors["pixel_values"].tolist())
        for example in old.read(range(8))
    ]
    change(tmp_path)
    new = prepare_store(source, str(tmp_path / "cache"))
    assert new.folder != old.folder
    if change is not change_processor:  # normalisation comes after the store
        assert [
            (example.input_ids.tolist(), example.tensors["pixel_values"].tolist())
            for example in new.read(range(8))
        ] != before
    assert prepare_store(source, str(tmp_path / "cache")).folder == new.folder
    assert Store(old.folder).read([0])[0].input_ids.tolist() == before[0][0], (
        "a run that reads the old one goes on"
    )


# --- bad rows ---


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
        ({**ask, "output": 5}, "'output' must be a non-empty string, not a number"),
    ]
    lines = [line for pair in zip(good, [row for row, _ in bad], strict=False) for line in pair] + good[7:]
    return write_lines(folder / "data.jsonl", lines), {
        2 * index + 2: reason for index, (_, reason) in enumerate(bad)
    }


def test_bad_rows_stop_with_the_first_five_named(tmp_path: Path, llava: str) -> None:
    path, reasons = bad_rows(tmp_path)
    with pytest.raises(DataError) as refusal:
        prepare_store(DataSource(str(path), ModelRef(llava)), str(tmp_path / "cache"))
    message = str(refusal.value)
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
    store = prepare_store(DataSource(str(path), ModelRef(llava), on_bad_row="skip"), str(tmp_path / "cache"))
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
    source = DataSource(str(path), ModelRef(llava), on_bad_row="skip")
    assert prepare_store(source, str(tmp_path / "cache")).meta.bad_rows == 7
    picture(50).save(tmp_path / "images" / "none.png")
    picture(51).save(tmp_path / "images" / "half.png")
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
    with pytest.raises(DataError) as refusal:
        prepare_store(DataSource(str(path), ModelRef(llava)), str(tmp_path / "cache"))
    assert type(refusal.value) is DataError
    assert str(refusal.value).startswith(f"{path} cannot be read: ")
    assert "\n" not in str(refusal.value)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(ModelError, match=r"nowhere/model.*is not there"):
        prepare_store(
            DataSource(str(path), ModelRef(str(tmp_path / "nowhere/model"))), str(tmp_path / "cache")
        )
    assert not (tmp_path / "cache").exists()


# --- sides ---


def test_sides_follow_the_content_not_the_order_of_rows(tmp_path: Path, llava: str) -> None:
    rows = [{"instruction": f"What is {number}?", "output": f"n{number}"} for number in range(40)]
    path = write_lines(tmp_path / "data.jsonl", rows)
    shuffled = random.Random(0).sample(rows, len(rows))
    other = write_lines(tmp_path / "shuffled.jsonl", shuffled)
    one, two = (
        prepare_store(DataSource(str(file), ModelRef(llava)), str(tmp_path / "cache"))
        for file in (path, other)
    )
    by_text = [
        {row["output"]: side for row, side in zip(order, sides(s).values(), strict=True)}
        for order, s in ((rows, one), (shuffled, two))
    ]
    assert by_text[0] == by_text[1]
    assert set(by_text[0].values()) == {"train", "eval", "test"}
    reseeded = prepare_store(DataSource(str(path), ModelRef(llava), seed=1), str(tmp_path / "cache"))
    assert sides(reseeded) != sides(one)


def test_group_by_keeps_a_camera_on_one_side(tmp_path: Path, mall: Path, llava: str) -> None:
    store = prepare_store(
        DataSource(str(mall), ModelRef(llava), group_by="camera", eval_fraction=0.2, test_fraction=0.2),
        str(tmp_path),
    )
    lines = [line.split(",") for line in (mall / "labels.csv").read_text().splitlines()[1:]]
    camera = {f"seq_{int(number):06d}": name for number, _, name in lines}
    on = defaultdict(set)
    for source, side in sides(store).items():
        on[camera[Path(source.split(" (")[0]).stem]].add(side)
    assert len(on) == 4
    assert all(len(found) == 1 for found in on.values())
    assert set(store.column("split")) == {"train", "eval", "test"}


def test_too_few_groups_for_the_sides(tmp_path: Path, llava: str) -> None:
    rows = counted(tmp_path)
    path = write_lines(tmp_path / "data.jsonl", [{**row, "image": rows[0]["image"]} for row in rows])
    with pytest.raises(DataError, match=r"8 rows in 1 groups of equal images .* no row for train"):
        prepare_store(DataSource(str(path), ModelRef(llava)), str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.part"))


def test_evaluation_data_of_its_own(tmp_path: Path, llava: str) -> None:
    rows = counted(tmp_path)
    train, held = (
        write_lines(tmp_path / "train.jsonl", rows[:5]),
        write_lines(tmp_path / "eval.jsonl", rows[5:]),
    )
    store = prepare_store(
        DataSource(str(train), ModelRef(llava), eval_data_path=str(held), test_fraction=0.2),
        str(tmp_path / "cache"),
    )
    assert store.column("split")[5:].tolist() == ["eval"] * 3
    assert sorted(store.column("split")[:5]) == ["test"] + ["train"] * 4


def test_evaluation_data_with_an_image_that_is_trained_on(tmp_path: Path, llava: str) -> None:
    """The same picture under another name and in another file format."""
    rows = counted(tmp_path)
    picture(2).save(tmp_path / "images" / "copy.bmp")
    train = write_lines(tmp_path / "train.jsonl", rows[:5])
    held = write_lines(tmp_path / "eval.jsonl", [*rows[5:], {**rows[5], "image": "images/copy.bmp"}])
    with pytest.raises(
        DataError, match=rf"{train}:3: the same image or group is also in {held}; remove it from one"
    ):
        prepare_store(
            DataSource(str(train), ModelRef(llava), eval_data_path=str(held), test_fraction=0),
            str(tmp_path / "cache"),
        )
    assert not list((tmp_path / "cache").glob("*.part"))


# --- two at once, and one that is killed ---


def test_two_that_prepare_the_same_data_at_once(tmp_path: Path, llava: str) -> None:
    source, cache = DataSource(str(instruction_jsonl(tmp_path)), ModelRef(llava)), str(tmp_path / "cache")
    barrier, made, failed = threading.Barrier(2), [], []

    def run() -> None:
        barrier.wait()
        try:
            made.append(prepare_store(source, cache))
        except Exception as error:  # told by the main thread  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    encoder = RowEncoder(ModelRef(llava).processor())
    assert (
        answers(made[0], encoder)
        == answers(made[1], encoder)
        == [[f" {count} people</s>"] for count in COUNTS]
    )
    assert sides(made[0]) == sides(made[1])
    assert prepare_store(source, cache).folder in {store.folder for store in made}
    assert not list(Path(cache).glob("*.part"))


def test_a_killed_run_leaves_nothing_that_is_used(tmp_path: Path, llava: str) -> None:
    path, cache = instruction_jsonl(tmp_path), tmp_path / "cache"
    picture = tmp_path / "images" / "007.png"
    content = picture.read_bytes()
    picture.unlink()
    os.mkfifo(picture)  # a file whose reading never ends: the run is sure to be killed in its middle
    program = (
        "import sys; from vlmtune.cluster import connect; from vlmtune.data.cache import prepare_store; from vlmtune.data.source import DataSource; from vlmtune.model_ref import ModelRef\n"
        "connect(); prepare_store(DataSource(sys.argv[1], ModelRef(sys.argv[2])), sys.argv[3])"
    )
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = subprocess.Popen([sys.executable, "-c", program, str(path), llava, str(cache)], env=environment)
    try:
        deadline = time.monotonic() + 150
        while not list(cache.glob("*.part")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (left,) = cache.iterdir()
    assert left.name.endswith(".part")
    picture.unlink()
    picture.write_bytes(content)
    store = prepare_store(DataSource(str(path), ModelRef(llava)), str(cache))
    assert store.folder != str(left)
    assert answers(store, RowEncoder(ModelRef(llava).processor())) == [
        [f" {count} people</s>"] for count in COUNTS
    ]
