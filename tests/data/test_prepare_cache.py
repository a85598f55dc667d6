"""A store is made once, found again, made anew after a change, and never half there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from prepare_kit import COUNTS, answers, instruction_jsonl, noise_image, splits_of, write_lines

from vlmtune.cluster import connect
from vlmtune.data.cache import USED, prepare_store
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.data.tokenize import RowEncoder
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
    noise_image(99).save(folder / "images" / "000.png")


def change_processor(folder: Path) -> None:
    path = folder / "model" / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    path.write_text(json.dumps(values))


def change_template(folder: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}> "
        "{% for p in m.content %}{{ p.text if p.text else '<image>' }}{% endfor %}\n{% endfor %}"
    )
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
        "a run that reads the old one continues"
    )


def test_two_that_prepare_the_same_data_at_once(tmp_path: Path, llava: str) -> None:
    source, cache = DataSource(str(instruction_jsonl(tmp_path)), ModelRef(llava)), str(tmp_path / "cache")
    barrier, made, failed = threading.Barrier(2), [], []

    def run() -> None:
        barrier.wait()
        try:
            made.append(prepare_store(source, cache))
        except Exception as error:  # raised by the main thread  # noqa: BLE001
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
    assert splits_of(made[0]) == splits_of(made[1])
    assert prepare_store(source, cache).folder in {store.folder for store in made}
    assert not list(Path(cache).glob("*.part"))


def test_a_killed_run_leaves_nothing_that_is_used(tmp_path: Path, llava: str) -> None:
    path, cache = instruction_jsonl(tmp_path), tmp_path / "cache"
    image = tmp_path / "images" / "007.png"
    content = image.read_bytes()
    image.unlink()
    os.mkfifo(image)  # a file whose reading never ends: the run is sure to be killed in its middle
    program = (
        "import sys\n"
        "from vlmtune.cluster import connect\n"
        "from vlmtune.compat.ray_node import loopback_addresses\n"
        "from vlmtune.data.cache import prepare_store\n"
        "from vlmtune.data.source import DataSource\n"
        "from vlmtune.model_ref import ModelRef\n"
        "with loopback_addresses():  # as the Ray that it joins\n"
        "    connect()\n"
        "prepare_store(DataSource(sys.argv[1], ModelRef(sys.argv[2])), sys.argv[3])"
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
    image.unlink()
    image.write_bytes(content)
    store = prepare_store(DataSource(str(path), ModelRef(llava)), str(cache))
    assert store.folder != str(left)
    assert answers(store, RowEncoder(ModelRef(llava).processor())) == [
        [f" {count} people</s>"] for count in COUNTS
    ]
