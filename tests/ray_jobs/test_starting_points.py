"""Each starting point of docs/data.md, from its files to a trained adapter by one command."""

import base64
import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers.utils.import_utils import is_torchvision_available
from video_kit import write_video

from vlmtune.cluster import connect
from vlmtune.config.parse import parse
from vlmtune.data.cache import prepare_store
from vlmtune.data.lengths import mixture_of
from vlmtune.data.order import Order
from vlmtune.data.source import DataSource
from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.evaluation.generate import question, reference
from vlmtune.single_run import train_adapter

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

ROWS = 10
HOW_MANY, WHICH = "How many people are there?", "Which animal is this?"
COLOURS = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange", "brown", "grey"]


def image(path: Path, number: int) -> Path:
    """An image unlike all others in its hash and in its look."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing = Image.new("RGB", (48, 40), COLOURS[number % len(COLOURS)])
    for column in range(48):
        for row in range(40):
            if (column * (number + 3) + row * (2 * number + 5)) % 17 < 6:
                drawing.putpixel((column, row), (number * 20 % 256, column * 5, row * 6))
    drawing.save(path)
    return path


def images(folder: Path, pattern: str = "{}.png") -> list[str]:
    names = [pattern.format(number) for number in range(ROWS)]
    for number, name in enumerate(names):
        image(folder / name, number)
    return names


def table(path: Path, *rows: list[Any], tab: bool = False) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if tab else ",").writerows(rows)
    return path


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions_csv(folder: Path) -> list[str]:
    rows = [[name, HOW_MANY, number] for number, name in enumerate(images(folder, "photos/{}.png"))]
    return [str(table(folder / "photos.csv", ["image", "question", "answer"], *rows))]


def other_names_tsv(folder: Path) -> list[str]:
    rows = [[name, HOW_MANY, number] for number, name in enumerate(images(folder))]
    path = table(folder / "a.tsv", ["photo", "q", "count"], *rows, tab=True)
    return [str(path), "--columns", "image=photo", "question=q", "answer=count"]


def labels_csv(folder: Path) -> list[str]:
    rows = [[name, number] for number, name in enumerate(images(folder))]
    path = table(folder / "labels.csv", ["image", "count"], *rows)
    return [str(path), "--question", HOW_MANY, "--answer_column", "count"]


def class_folders(folder: Path) -> list[str]:
    for number in range(ROWS):
        image(folder / "animals" / ("cat", "dog")[number % 2] / f"{number}.png", number)
    return [str(folder / "animals"), "--question", WHICH]


def imagefolder_csv(folder: Path) -> list[str]:
    rows = [[name, f"animal {number}"] for number, name in enumerate(images(folder / "photos"))]
    table(folder / "photos" / "metadata.csv", ["file_name", "text"], *rows)
    return [str(folder / "photos"), "--question", WHICH, "--answer_column", "text"]


def imagefolder_jsonl(folder: Path) -> list[str]:
    names = images(folder / "photos")
    rows = [
        {"file_name": name, "question": HOW_MANY, "answer": str(number)} for number, name in enumerate(names)
    ]
    lines(folder / "photos" / "metadata.jsonl", rows)
    return [str(folder / "photos")]


def frames(folder: Path) -> list[str]:
    names = images(folder / "data" / "frames")
    table(folder / "data" / "labels.csv", ["image", "count"], *([name, i] for i, name in enumerate(names)))
    (folder / "data" / "messages.txt").write_text(f"USER: {HOW_MANY}\nASSISTANT: {{count}}\n")
    return [str(folder / "data")]


def frames_without_dialogue(folder: Path) -> list[str]:
    frames(folder)
    (folder / "data" / "messages.txt").unlink()
    return [str(folder / "data"), "--question", HOW_MANY, "--answer_column", "count"]


def coco(folder: Path) -> list[str]:
    names = images(folder / "val2017")
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": i, "caption": f"Animal {i}."} for i in range(ROWS)],
    }
    (folder / "captions.json").write_text(json.dumps(content))
    return [
        *(str(folder / "captions.json"), "--question", WHICH),
        *("--image_root", str(folder / "val2017")),
    ]


def vqa(folder: Path) -> list[str]:
    images(folder / "val2014", "COCO_val2014_{:0>12}.png")
    questions = [{"image_id": i, "question": HOW_MANY, "question_id": i} for i in range(ROWS)]
    answers = [
        {"question_id": i, "image_id": i, "multiple_choice_answer": str(i), "answers": [{"answer": str(i)}]}
        for i in range(ROWS)
    ]
    (folder / "vqa").mkdir()
    more = {"data_subtype": "val2014"}
    (folder / "vqa" / "questions.json").write_text(json.dumps({"questions": questions, **more}))
    (folder / "vqa" / "annotations.json").write_text(json.dumps({"annotations": answers, **more}))
    return [str(folder / "vqa"), "--image_root", str(folder / "val2014")]


def of_rows(make: Callable[[str, int], dict[str, Any]]) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        rows = [make(name, number) for number, name in enumerate(images(folder))]
        return [str(lines(folder / "rows.jsonl", rows))]

    return write


def question_json(folder: Path) -> list[str]:
    rows = [{"image": name, "question": HOW_MANY, "answer": str(i)} for i, name in enumerate(images(folder))]
    (folder / "rows.json").write_text(json.dumps(rows, indent=2))
    return [str(folder / "rows.json")]


def openai_data_uri(folder: Path) -> list[str]:
    rows = []
    for number, name in enumerate(images(folder)):
        data = base64.b64encode((folder / name).read_bytes()).decode()
        url = {"url": f"data:image/png;base64,{data}"}
        content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": HOW_MANY}]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": str(number)},
                ]
            }
        )
    return [str(lines(folder / "rows.jsonl", rows))]


def parquet(folder: Path) -> list[str]:
    content = [(folder / name).read_bytes() for name in images(folder)]
    columns = {
        "image": [{"bytes": one, "path": None} for one in content],
        "question": [HOW_MANY] * ROWS,
        "answer": [str(number) for number in range(ROWS)],
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return [str(folder / "rows.parquet")]


def saved_dataset(folder: Path) -> list[str]:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    content = {
        "image": [str(folder / name) for name in images(folder)],
        "label": [number % 2 for number in range(ROWS)],
    }
    datasets.Dataset.from_dict(content, features=features).save_to_disk(str(folder / "saved"))
    return [str(folder / "saved"), "--question", WHICH, "--answer_column", "label"]


def webdataset(folder: Path) -> list[str]:
    names = images(folder / "images")
    for shard in range(2):
        with tarfile.open(folder / f"{shard:04}.tar", "w") as tar:
            for number in range(shard, ROWS, 2):
                data = (folder / "images" / names[number]).read_bytes()
                for ending, content in (("png", data), ("txt", f"animal {number}".encode())):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return [str(folder), "--question", WHICH, "--answer_column", "txt"]


def dialogue(number: int, mark: str = "<image>") -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"{mark}{HOW_MANY}"},
        {"role": "assistant", "content": str(number)},
    ]


def shared(name: str, number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{HOW_MANY}"}, {"from": "gpt", "value": str(number)}]
    return {"image": name, "conversations": turns}


def prompts(name: str, number: int) -> dict[str, Any]:
    turns = dialogue(number)
    return {"prompt": turns[:1], "completion": turns[1:], "images": [name]}


def boxes(name: str, number: int) -> dict[str, Any]:
    return {
        "query": "<image>Where is <ref-object>?",
        "response": "<bbox>",
        "images": [name],
        "objects": {"ref": ["the cat"], "bbox": [[number, 4, 24, 20]]},
    }


COUNTED = (HOW_MANY, "0")
STARTING_POINTS: dict[str, tuple[Callable[[Path], list[str]], tuple[str, str]]] = {
    "CSV of questions": (questions_csv, COUNTED),
    "TSV of other names": (other_names_tsv, COUNTED),
    "CSV of labels": (labels_csv, COUNTED),
    "class folders": (class_folders, (WHICH, "cat")),
    "imagefolder, CSV": (imagefolder_csv, (WHICH, "animal 0")),
    "imagefolder, JSONL": (imagefolder_jsonl, COUNTED),
    "frames": (frames, COUNTED),
    "frames without a dialogue": (frames_without_dialogue, COUNTED),
    "COCO captions": (coco, (WHICH, "Animal 0.")),
    "VQA": (vqa, COUNTED),
    "questions, JSON": (question_json, COUNTED),
    "Alpaca with history": (
        of_rows(
            lambda name, number: {
                "instruction": HOW_MANY,
                "input": "",
                "output": str(number),
                "history": [["What is this?", "An image."]],
                "image": name,
            }
        ),
        COUNTED,
    ),
    "LLaVA": (of_rows(shared), COUNTED),
    "OpenAI chat, data URIs": (openai_data_uri, COUNTED),
    "OpenAI chat, files": (
        of_rows(
            lambda name, number: {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": name}},
                            {"type": "text", "text": HOW_MANY},
                        ],
                    },
                    {"role": "assistant", "content": str(number)},
                ]
            }
        ),
        COUNTED,
    ),
    "TRL messages": (
        of_rows(lambda name, number: {"messages": dialogue(number), "images": [name]}),
        COUNTED,
    ),
    "TRL prompt and completion": (of_rows(prompts), COUNTED),
    "TRL prompt and completion, strings": (
        of_rows(lambda name, number: {"prompt": HOW_MANY, "completion": str(number), "image": name}),
        COUNTED,
    ),
    "ms-swift": (
        of_rows(
            lambda name, number: {
                "query": f"<image>{HOW_MANY}",
                "response": str(number),
                "images": [name],
            }
        ),
        COUNTED,
    ),
    "ms-swift, tags": (
        of_rows(lambda name, number: {"messages": dialogue(number, f"<img>{name}</img>")}),
        COUNTED,
    ),
    "boxes": (
        lambda folder: [*of_rows(boxes)(folder), "--box_format", "norm1000"],
        ("Where is the cat?", "[0, 100, 500, 500]"),
    ),
    "Parquet": (parquet, COUNTED),
    "saved dataset": (saved_dataset, (WHICH, "cat")),
    "WebDataset": (webdataset, (WHICH, "animal 0")),
}


@pytest.fixture(scope="module", autouse=True)
def one_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import ray

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        connect()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
    ray.shutdown()


def trained(data: list[str], model: Path, folder: Path, *more: str) -> tuple[Path, Store, Any]:
    """(output folder, prepared rows, tokenizer) of a run of two steps."""
    options = ["--data_path", *data, "--model_name_or_path", str(model), "--output_dir", str(folder / "out")]
    options += ["--num_workers", "0", "--max_steps", "2", "--use_cpu", "--quantization", "none", *more]
    settings = parse(options)
    train_adapter(settings, lambda _: None)
    source = DataSource.from_settings(settings)
    store = prepare_store(source, str(folder / "cache"))
    return folder / "out", store, settings.model.ref.processor().tokenizer


@pytest.mark.parametrize("name", STARTING_POINTS)
def test_from_files_to_an_adapter(name: str, models: Path, tmp_path: Path) -> None:
    write, expected = STARTING_POINTS[name]
    (tmp_path / "data").mkdir()
    out, store, tokenizer = trained(write(tmp_path / "data"), models / "llava", tmp_path)
    assert (out / "adapter_model.safetensors").exists()
    assert (store.meta.rows, store.meta.bad_rows) == (ROWS, 0)
    example = store.read([0])[0]
    assert (question(tokenizer, example), reference(tokenizer, example)) == expected
    assert example.image_tokens > 0


@pytest.mark.skipif(not is_torchvision_available(), reason="Qwen2.5-VL's processor needs torchvision")
@pytest.mark.parametrize("runner", ["isolated", "packed"])
def test_videos(runner: str, models: Path, tmp_path: Path) -> None:
    """Videos beside images, as frames through the processor's own way."""
    names = images(tmp_path)
    rows = [
        {"query": f"<image>{HOW_MANY}", "response": str(number), "images": [name]}
        for number, name in enumerate(names[:4])
    ]
    for number in range(6):
        write_video(tmp_path / f"{number}.mp4", [30 * number + 5 * step for step in range(12)])
        rows.append({"query": f"<video>{WHICH}", "response": f"animal {number}", "videos": [f"{number}.mp4"]})
    rows = [rows[4], *rows[:4], *rows[5:]]
    data = [str(lines(tmp_path / "rows.jsonl", rows)), "--video_frames", "4", "--trial_runner", runner]
    out, store, tokenizer = trained(data, models / "qwen2_5_vl", tmp_path)
    assert (out / "adapter_model.safetensors").exists()
    assert (store.meta.rows, store.meta.bad_rows, store.meta.video_frames) == (ROWS, 0, 4)
    example = store.read([0])[0]
    assert (question(tokenizer, example), reference(tokenizer, example)) == (WHICH, "animal 0")
    assert example.tensors["video_grid_thw"].tolist()[0][0] == 2  # two frames in each patch


def test_shares_of_several_sources(models: Path, tmp_path: Path) -> None:
    """Seven of ten rows of an epoch are of the first source, though it has half of the rows."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    swift = STARTING_POINTS["ms-swift"][0](first)
    names = images(second)
    for number, name in enumerate(names):  # other images than those of the first source
        image(second / name, number + ROWS)
    rows = [{"image": name, "question": WHICH, "answer": "a cat"} for name in names]
    paths = [*swift, str(lines(second / "rows.jsonl", rows))]
    out, store, tokenizer = trained(paths, models / "llava", tmp_path, "--data_weights", "0.7", "0.3")
    assert (out / "adapter_model.safetensors").exists()
    kept = np.arange(len(store.rows_of(TRAIN)))
    mixture = mixture_of(store, kept, [0.7, 0.3])
    order = Order(len(kept), 1, 1, 1, seed=0, mixture=mixture)
    epochs = [store.rows_of(TRAIN)[order.permutation(epoch)].tolist() for epoch in range(10)]
    drawn = [question(tokenizer, example) for rows in epochs for example in store.read(rows)]
    share = drawn.count(HOW_MANY) / len(drawn)
    assert (len(drawn), store.meta.rows) == (10 * len(kept), 2 * ROWS)
    assert abs(share - 0.7) <= 0.5 / len(kept)  # rounded to whole rows of an epoch
