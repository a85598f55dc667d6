"""Fixtures that several test modules share and that are slow to make: models, sample images, prepared rows.

They are written once a session. No test may change them.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from faulty_rows import write_faulty_rows
from PIL import Image
from resolution_kit import both_stores, search_settings
from training_kit import InterruptedRunError, Run, settings_of
from transformers.utils.import_utils import is_torchvision_available

from vlmtune.cluster import connect
from vlmtune.config.settings import Settings
from vlmtune.console import show_log
from vlmtune.data.cache import find_or_make_store, prepare_store
from vlmtune.data.order import BatchRows
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.data.stream import read_batches
from vlmtune.demo.instructions import instruction_rows
from vlmtune.demo.mall import write_mall
from vlmtune.demo.models import FAMILIES, write_model
from vlmtune.demo.trained import write_trained_llava
from vlmtune.model.base import load_base
from vlmtune.model.lora import attach, lora_config, save_adapter
from vlmtune.model.lora_targets import target_modules
from vlmtune.model_ref import ModelRef
from vlmtune.training.loop import train
from vlmtune.training.save import write_chat_template

# Ray gives its workers a niceness of 15: other work on the machine would bring tests to their time limits.
os.environ.setdefault("RAY_worker_niceness", "0")
# Whole searches and commands, each in processes of their own: minutes on two cores. `make test-heavy` runs
# them. What they are made of has its tests in `make test`.
HEAVY_FILES = (
    "ray_jobs/test_inspect_data.py",
    "ray_jobs/test_job_submit.py",
    "ray_jobs/test_predict.py",
    "ray_jobs/test_train.py",
    "ray_jobs/test_tune.py",
    "search/test_packed_search.py",
    "search/test_run_search.py",
    "search/test_trial_runners.py",
    "search/test_tuner.py",
    "ui/test_server.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.as_posix().endswith(HEAVY_FILES):
            item.add_marker(pytest.mark.heavy)


@pytest.fixture(scope="session", autouse=True)
def printed_log() -> None:
    """Log lines of vlmtune are printed, as the commands do."""
    show_log()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each family by its name; qwen2_5_vl only if torchvision is installed."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        if family != "qwen2_5_vl" or is_torchvision_available():
            write_model(family, folder / family)
    return folder


@pytest.fixture(scope="session")
def demo_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that changes the answers of the demo's base a little.

    The base is in `llava` beside it, and an image is `photo.jpg` beside it.
    """
    folder = tmp_path_factory.mktemp("demo")
    write_trained_llava(folder / "llava")
    ref = ModelRef(str(folder / "llava"))
    base = load_base(ref, quantization="none", dtype="float32", device=torch.device("cpu"))
    targets = target_modules(base, None, lora_vision=False)
    model = attach(base, lora_config(base, r=4, alpha=8, dropout=0.0, target_modules=targets), seed=0)
    save_adapter(model, folder / "adapter")
    settings = Settings.from_flags({"model_name_or_path": str(folder / "llava"), "dtype": "float32"})
    settings.save(folder / "adapter" / "config.yaml")
    ref.processor().save_pretrained(folder / "adapter")
    write_chat_template(str(folder / "adapter"), settings)
    Image.effect_noise((160, 120), 60).convert("RGB").save(folder / "photo.jpg")
    return folder / "adapter"


@pytest.fixture(scope="session")
def mall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frames folder of 24 images, two dialogues each."""
    folder = tmp_path_factory.mktemp("samples") / "mall"
    write_mall(folder, frames=24)
    return folder


@pytest.fixture(scope="session")
def stores(models: Path, mall: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """Prepared rows for two families: `mall FAMILY`, rows with an image, and `mixed FAMILY`, 11 rows to
    train on and 5 to evaluate on, of which some have an image; `two resolutions` of `resolution_kit`."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = list(instruction_rows())[:32:2]
    mixed = [
        {**row, "image": f"{mall}/frames/seq_{index:06d}.jpg"} if index % 3 == 1 else row
        for index, row in enumerate(rows)
    ]
    for name, part in (("train", mixed[:11]), ("eval", mixed[11:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    connect()
    made = {}
    for family in ("llava", "mllama"):
        sources = {
            f"mall {family}": DataSource(
                str(mall), ModelRef(str(models / family)), eval_fraction=0.2, test_fraction=0.0
            ),
            f"mixed {family}": DataSource(
                str(folder / "train.jsonl"),
                ModelRef(str(models / family)),
                eval_data_path=str(folder / "eval.jsonl"),
                test_fraction=0.0,
                image_root=str(mall / "frames"),
            ),
        }
        made |= {name: prepare_store(source, str(folder / "cache")) for name, source in sources.items()}
    if (models / "qwen2_5_vl").exists():
        made["two resolutions"] = both_stores(search_settings(models, mall, folder / "cache"))
    ray.shutdown()
    return made


@pytest.fixture(scope="session")
def faulty_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSONL file of `faulty_rows`."""
    return write_faulty_rows(tmp_path_factory.mktemp("faulty"))


@pytest.fixture(scope="session")
def faulty_store(faulty_data: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The prepared rows of `faulty_data`: 24 good ones, and 9 bad ones that are listed."""
    source = DataSource(
        str(faulty_data), ModelRef(str(models / "llava")), eval_fraction=0.2, test_fraction=0.1
    )
    started = not ray.is_initialized()
    connect()
    store = find_or_make_store(source, str(tmp_path_factory.mktemp("cache")))
    if started:
        ray.shutdown()
    return store


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread, as a Ray worker does: with more, sums change their order and runs their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_loop(stores: dict[str, Store], models: Path, tmp_path: Path, one_thread: None) -> Callable[..., Run]:
    """Returns a function that trains on one of `stores` and records its batches, steps and reports.

    Its `interrupt` ends the run after the report of that step.
    """
    number = iter(range(100))

    def run(
        name: str,
        *,
        go_on: Path | None = None,
        interrupt: int | None = None,
        blank: bool = False,
        **changes: Any,
    ) -> Run:
        store = stores[name]
        result = Run(tmp_path / f"run-{next(number)}")

        def rows(
            split: str, batches: Sequence[BatchRows], max_length: int | None
        ) -> Iterator[dict[str, torch.Tensor]]:
            result.requests.extend((split, batch, max_length) for batch in batches)
            for batch in read_batches(store, split, batches, max_length):
                if blank and "pixel_values" in batch:
                    batch["pixel_values"] = torch.zeros_like(batch["pixel_values"])
                yield batch

        def report(metrics: dict[str, Any], folder: str) -> None:
            result.reports.append(metrics)
            if metrics["step"] == interrupt:
                raise InterruptedRunError

        settings = settings_of(store, models / name.split()[1], **changes)
        checkpoint = (
            None
            if go_on is None
            else str(shutil.copytree(go_on, tmp_path / f"from-{next(number)}" / go_on.name))
        )
        work_dir = str(result.folder)
        try:
            result.model = train(
                settings,
                store,
                read_batches=rows,
                report=report,
                work_dir=work_dir,
                checkpoint=checkpoint,
                progress=result.steps.append,
            )
        except InterruptedRunError:
            assert interrupt is not None
        return result

    return run
