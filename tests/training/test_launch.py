"""One run in this process, on one Ray Train worker and on several: the same rows, the same adapter; and what
happens when a worker dies."""

import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle
from safetensors.torch import load_file
from training_kit import Adapter, difference, settings_of

from vlmtune.cluster import Cluster, connect
from vlmtune.data.order import Order
from vlmtune.data.store import Store
from vlmtune.errors import DataError
from vlmtune.training import launch
from vlmtune.training.launch import Outcome, last_checkpoint, run_in_process, run_on_ray

ROWS = 11
# Mllama on rows of which some have an image: the adapters of its cross-attention get no gradient from the
# others. int8, with dropout off.
NAME = "mixed mllama"
OPTIONS: dict[str, Any] = {
    "quantization": "int8",
    "num_train_epochs": 2,
    "eval_steps": 2,
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def cluster(stores: dict[str, Store]) -> Iterator[Cluster]:
    """A Ray of two CPUs, whatever the machine has. After `stores`, which starts and ends one of its own."""
    ray.init("local", num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level="error")
    yield connect()
    ray.shutdown()


def adapter_of(outcome: Outcome) -> Adapter:
    return load_file(Path(outcome.checkpoint) / "adapter_model.safetensors")


def recording(folder: Path) -> Callable[[dict[str, Any]], None]:
    """`launch.worker`, which also writes what each rank was given for training and the adapter that it ends
    with to `folder`."""

    def worker(config: dict[str, Any]) -> None:
        from vlmtune.training import launch, loop

        stream, train = launch.stream_batches, loop.train
        rank = ray.train.get_context().get_world_rank()
        examples = config["store"].read(config["store"].rows_of("train").tolist())
        known = {tuple(example.input_ids.tolist()): row for row, example in enumerate(examples)}

        def stream_batches(
            store: Store, split: str, *args: Any, **options: Any
        ) -> Iterator[dict[str, torch.Tensor]]:
            for batch in stream(store, split, *args, **options):
                if split == "train":
                    ids = [
                        row[mask.bool()].tolist()
                        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
                    ]
                    filler = bool((batch["labels"] < 0).all())
                    with (folder / f"{rank}.jsonl").open("a") as file:
                        file.write(
                            json.dumps({"rows": [known[tuple(row)] for row in ids], "filler": filler}) + "\n"
                        )
                yield batch

        def train_and_save(*args: Any, **options: Any) -> Any:
            model = train(*args, **options)
            weights = {
                name: value.detach() for name, value in model.named_parameters() if value.requires_grad
            }
            torch.save(weights, folder / f"{rank}.pt")
            return model

        launch.stream_batches, loop.train = stream_batches, train_and_save
        launch.worker(config)

    return worker


@pytest.fixture(scope="module")
def in_process(stores: dict[str, Store], models: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run that the others are compared with: here, in steps of 4 rows."""
    torch.set_num_threads(1)
    settings = settings_of(stores[NAME], models / "mllama", per_device_train_batch_size=4, **OPTIONS)
    return run_in_process(settings, stores[NAME], str(tmp_path_factory.mktemp("in_process")))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.heavy)])
def test_workers_share_the_rows_and_agree_on_the_adapter(
    workers: int,
    in_process: Outcome,
    cluster: Cluster,
    stores: dict[str, Store],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    cluster.check_workers(workers, use_cpu=True)
    settings = settings_of(
        stores[NAME], models / "mllama", per_device_train_batch_size=4 // workers, **OPTIONS
    )
    monkeypatch.setattr(launch, "worker", recording(tmp_path))
    options = {"workers": workers, "use_gpu": False, "storage_path": str(tmp_path / "storage"), "name": "run"}
    outcome = run_on_ray(settings, stores[NAME], runs_dir=(tmp_path / "runs").as_uri(), **options)

    adapter, expected = adapter_of(outcome), adapter_of(in_process)
    assert difference(adapter, expected) < 1e-5
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(workers)]
    assert all(torch.equal(ranks[0][name], rank[name]) for rank in ranks for name in ranks[0])
    same = ("step", "max_steps", "epoch")
    assert {name: outcome.metrics[name] for name in same} == {name: in_process.metrics[name] for name in same}
    assert outcome.metrics["eval_loss"] == pytest.approx(in_process.metrics["eval_loss"], rel=1e-6)

    given = [
        [json.loads(line) for line in (tmp_path / f"{rank}.jsonl").read_text().splitlines()]
        for rank in range(workers)
    ]
    order = Order(rows=ROWS, per_device=4 // workers, accumulation=1, world_size=workers, seed=42)
    for epoch in range(2):
        batches = [rank[epoch * 3 : epoch * 3 + 3] for rank in given]
        seen = [row for rank in batches for batch in rank if not batch["filler"] for row in batch["rows"]]
        assert sorted(seen) == list(range(ROWS))
        assert [[batch["rows"] for batch in rank] for rank in batches] == [
            [list(batch.rows) for batch in order.epoch(epoch, rank)] for rank in range(workers)
        ]
    assert all(len(rank) == 6 for rank in given)
    assert list(
        (tmp_path / "runs").glob("events.out.tfevents.*")
    )  # given as a URI: written by the worker, then copied


@pytest.mark.heavy
@pytest.mark.timeout(240)
def test_a_run_goes_on_after_a_worker_died(
    in_process: Outcome, cluster: Cluster, stores: dict[str, Store], models: Path, tmp_path: Path
):
    died, steps = tmp_path / "died", tmp_path / "steps"

    def die_once(logs: dict[str, float]) -> None:
        with steps.open("a") as file:
            file.write(f"{logs['step']:g} " if "loss" in logs else "")
        if logs["step"] == 3 and not died.exists():
            died.touch()
            while not (
                tmp_path / "storage/run/checkpoint_manager_snapshot.json"
            ).exists():  # Ray takes up a report in the background
                time.sleep(0.1)
            os._exit(1)

    settings = settings_of(stores[NAME], models / "mllama", per_device_train_batch_size=2, **OPTIONS)
    options = {
        "use_gpu": False,
        "storage_path": str(tmp_path / "storage"),
        "name": "run",
        "runs_dir": str(tmp_path / "runs"),
    }
    outcome = run_on_ray(settings, stores[NAME], workers=2, progress=die_once, **options)
    assert died.exists()
    assert steps.read_text().split() == ["1", "2", "3", "3", "4", "5", "6"]  # from the checkpoint of step 2
    assert difference(adapter_of(outcome), adapter_of(in_process)) < 1e-5
    assert outcome.metrics["eval_loss"] == pytest.approx(in_process.metrics["eval_loss"], rel=1e-6)

    # As after a crash behind the last step.
    again = run_on_ray(settings, stores[NAME], workers=2, progress=die_once, **options)
    assert steps.read_text().split()[7:] == []
    assert again == outcome


@pytest.mark.timeout(120)
def test_a_mistake_of_the_user_is_raised_as_such_and_not_tried_again(
    cluster: Cluster, stores: dict[str, Store], models: Path, tmp_path: Path
):
    settings = settings_of(stores[NAME], models / "mllama", max_length=8)
    options = {
        "use_gpu": False,
        "storage_path": str(tmp_path),
        "name": "run",
        "runs_dir": str(tmp_path / "runs"),
    }
    with pytest.raises(
        DataError, match=r"training rows do not fit max_length 8 .*17 keeps a word of each answer"
    ):
        run_on_ray(settings, stores[NAME], workers=1, **options)


def test_a_run_in_process_keeps_one_checkpoint_and_goes_on_from_it(
    stores: dict[str, Store], models: Path, tmp_path: Path
):
    class StopError(Exception):
        pass

    def stop(logs: dict[str, float]) -> None:
        if logs["step"] == 4:
            raise StopError

    steps: list[dict[str, float]] = []
    settings = settings_of(
        stores["mixed llava"], models / "llava", eval_steps=1, num_train_epochs=2, lora_dropout=0.1
    )
    whole = run_in_process(settings, stores["mixed llava"], str(tmp_path / "whole"))
    with pytest.raises(StopError):
        run_in_process(settings, stores["mixed llava"], str(tmp_path / "parts"), progress=stop)
    folder = tmp_path / "parts" / "checkpoints"
    assert last_checkpoint(folder) == str(folder / "checkpoint-3")
    (folder / "checkpoint-4").mkdir()  # half-written: it has no report
    assert last_checkpoint(folder) == str(folder / "checkpoint-3")
    parts = run_in_process(settings, stores["mixed llava"], str(tmp_path / "parts"), progress=steps.append)
    assert [log["step"] for log in steps if "loss" in log] == [4, 5, 6]
    assert difference(adapter_of(parts), adapter_of(whole)) == 0
    kept = {path.name for path in folder.iterdir()}
    assert {"checkpoint-6"} <= kept <= {"checkpoint-5", "checkpoint-6"}, (
        "the last one, and at most one before"
    )
    assert (
        run_in_process(settings, stores["mixed llava"], str(tmp_path / "parts"), progress=steps.append)
        == parts
    )


def test_batches_are_padded_to_a_multiple(
    stores: dict[str, Store], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lengths = []
    read = launch.read_batches

    def spy(*args: Any, **options: Any) -> Iterator[dict[str, torch.Tensor]]:
        for batch in read(*args, **options):
            lengths.append(batch["input_ids"].shape[1])
            yield batch

    monkeypatch.setattr(launch, "read_batches", spy)
    settings = settings_of(stores["mixed llava"], models / "llava", max_steps=2, pad_to_multiple_of=32)
    run_in_process(settings, stores["mixed llava"], str(tmp_path))
    assert {length % 32 for length in lengths} == {0}


def test_what_goes_to_workers_is_plain(stores: dict[str, Store], models: Path):
    settings = settings_of(stores[NAME], models / "mllama")
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert len(cloudpickle.dumps(stores[NAME])) < 1000  # its path, not its rows
