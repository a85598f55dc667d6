"""One adapter trained packed by several workers, against one process that makes the same steps."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle
from safetensors.torch import load_file
from training_kit import Adapter, difference, values_of

from vlmtune.cluster import Cluster, connect
from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import DivergedError
from vlmtune.packed import train_packed
from vlmtune.packed.train_packed import run_packed
from vlmtune.training.launch import Outcome

pytestmark = pytest.mark.timeout(240)

# Eleven rows, so that the last step leaves a worker without one. Some have an image, for cross-attention's
# adapters.
NAME = "mixed mllama"
OPTIONS: dict[str, Any] = {
    "quantization": "int8",
    "num_train_epochs": 2,
    "eval_steps": 2,
    "learning_rate": 1e-2,
    "lora_dropout": 0.1,
    "trial_runner": "packed",
}


@pytest.fixture(scope="module")
def cluster(stores: dict[str, Store]) -> Iterator[Cluster]:
    """A Ray of two CPUs, whatever the machine has. After `stores`, which starts and ends one of its own."""
    ray.init("local", num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level="error")
    yield connect()
    ray.shutdown()


def settings_of(stores: dict[str, Store], models: Path, **changes: Any) -> Settings:
    return Settings.from_flags(values_of(stores[NAME], models / "mllama", **OPTIONS, **changes))


def adapter_of(outcome: Outcome) -> Adapter:
    return load_file(f"{outcome.checkpoint}/adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(
    stores: dict[str, Store], models: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Outcome, list[Any]]:
    """In this process, in steps of 4 rows."""
    folder = tmp_path_factory.mktemp("alone")
    steps: list[dict[str, Any]] = []
    settings = settings_of(stores, models, num_workers="0", per_device_train_batch_size=4)
    return run_packed(settings, stores[NAME], str(folder), cluster, steps.append), steps


def test_a_run_that_diverges_is_one_plain_line(
    stores: dict[str, Store], models: Path, cluster: Cluster, tmp_path: Path
) -> None:
    settings = settings_of(stores, models, num_workers="0").replace(learning_rate=1e38)
    line = r"^the loss or gradient became NaN or infinite at step \d of \d+: give a smaller --learning_rate$"
    with pytest.raises(DivergedError, match=line):
        run_packed(settings, stores[NAME], str(tmp_path), cluster, lambda _: None)


def assert_same(outcome: Outcome, steps: list[dict[str, Any]], alone: tuple[Outcome, list[Any]]) -> None:
    expected, expected_steps = alone
    assert difference(adapter_of(outcome), adapter_of(expected)) < 1e-5
    for name in ("step", "max_steps", "epoch"):
        assert outcome.metrics[name] == expected.metrics[name]
    assert outcome.metrics["eval_loss"] == pytest.approx(expected.metrics["eval_loss"], rel=1e-5)
    for name in ("loss", "grad_norm", "mean_token_accuracy", "learning_rate"):
        assert [step[name] for step in steps if name in step] == pytest.approx(
            [step[name] for step in expected_steps if name in step], rel=1e-4
        )


def test_two_workers_train_the_adapter_of_one(
    stores: dict[str, Store], models: Path, cluster: Cluster, alone: tuple[Outcome, list[Any]], tmp_path: Path
):
    steps: list[dict[str, Any]] = []
    settings = settings_of(stores, models, num_workers="2", per_device_train_batch_size=2)
    outcome = run_packed(settings, stores[NAME], str(tmp_path), cluster, steps.append)
    assert len(stores[NAME].rows_of("train")) % 4 in (1, 3), "one worker has fewer rows in the last step"
    assert_same(outcome, steps, alone)
    assert len(list((tmp_path / "runs").glob("events*"))) == 1, "the first worker's"


@pytest.mark.heavy
def test_a_run_whose_worker_dies_resumes_from_the_last_checkpoint(
    stores: dict[str, Store],
    models: Path,
    cluster: Cluster,
    alone: tuple[Outcome, list[Any]],
    tmp_path: Path,
    monkeypatch: Any,
):
    settings = settings_of(stores, models, num_workers="2", per_device_train_batch_size=2)
    monkeypatch.setattr(train_packed, "_worker", dies_once(str(tmp_path / "died")))
    steps: list[dict[str, Any]] = []
    outcome = run_packed(settings, stores[NAME], str(tmp_path / "run"), cluster, steps.append)
    assert (tmp_path / "died").exists()
    assert difference(adapter_of(outcome), adapter_of(alone[0])) < 1e-5
    logged = [step["step"] for step in steps if "loss" in step]
    assert logged.count(min(logged)) == 1, "the run does not start again from the beginning"
    assert (
        json.loads(Path(f"{outcome.checkpoint}/report.json").read_text())["step"]
        == outcome.metrics["max_steps"]
    )


def dies_once(mark: str) -> Any:
    """`train_packed._worker`, whose second worker is killed once after the first checkpoint."""

    def worker(config: dict[str, Any]) -> None:
        from vlmtune.packed import train_packed
        from vlmtune.packed.engine import Engine

        whole = Engine.train_round

        def round(self: Engine, *args: Any) -> bool:
            done = any(slot.progress.step >= 3 for slot in self.slots.values())
            if done and not Path(mark).exists() and ray.train.get_context().get_world_rank() == 1:
                Path(mark).touch()
                time.sleep(1)  # the first worker's checkpoint is written
                os._exit(1)
            return whole(self, *args)

        Engine.train_round = round  # type: ignore[method-assign]
        train_packed._worker(config)

    cloudpickle.register_pickle_by_value(__import__(__name__))
    return worker
