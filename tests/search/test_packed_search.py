"""A packed search whose engine and whose trials' processes are killed: every trial ends once, with the
adapter that it would have had."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from training_kit import difference

from vlmtune.config.settings import Settings
from vlmtune.search.run_search import run_search
from vlmtune.search.summary import search_summary
from vlmtune.single_run import train_adapter

pytestmark = [pytest.mark.timeout(280), pytest.mark.usefixtures("machine")]

# Long enough to be killed in the middle, and at rates at which rounding stays rounding.
STEPS, RATES = 40, [1e-4, 5e-4]
GRID = {"lora_r": {"grid": [2, 4]}, "learning_rate": {"grid": RATES}}


@pytest.fixture(scope="module")
def settings(models: Path, mall: Path, machine: None) -> Settings:
    return Settings.from_flags(
        {
            "data_path": str(mall),
            "model_name_or_path": str(models / "llava"),
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "lora_target_modules": ["q_proj", "v_proj"],
            "max_steps": STEPS,
            "eval_steps": 5,
            "per_device_train_batch_size": 4,
            "trial_runner": "packed",
            "max_concurrent_trials": 2,
            "early_stopping": "none",
            "report": False,
            "search_space": GRID,
        }
    )


def kill(name: str) -> bool:
    """Kill a process of this test's Ray by what it does, an actor's class and method; returns whether there
    was one."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Ray's processes come and go
            if f"ray::{name}" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
                return True
    return False


def when(there: Callable[[], bool], act: Callable[[], bool], done: list[bool]) -> None:
    """Wait for something, up to two minutes, then act until it has worked."""
    end = time.monotonic() + 120
    while time.monotonic() < end and not there():
        time.sleep(0.05)
    while time.monotonic() < end and not act():
        time.sleep(0.05)
    done.append(time.monotonic() < end)


def test_a_killed_engine_and_a_killed_trial_lose_and_repeat_nothing(
    settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "out"

    def checkpoints() -> int:
        return len(list((folder / "tune" / "train").glob("*/checkpoint-*/report.json")))

    def all_joined() -> bool:
        return len(list((folder / "runs").iterdir())) == 4

    worked: list[bool] = []
    # The trial dies in the middle, and under the name that Tune gives it; tests/search/test_tuner.py kills
    # one between two trials.
    killers = [
        threading.Thread(target=when, args=(lambda: checkpoints() >= 1, lambda: kill("EngineActor"), worked)),
        threading.Thread(
            target=when,
            args=(lambda: bool(worked) and all_joined(), lambda: kill("ResourceTrainable.train"), worked),
        ),
    ]
    for killer in killers:
        killer.start()
    summary = search_summary(run_search(settings.replace(output_dir=str(folder))))
    for killer in killers:
        killer.join()
    assert worked == [True, True]
    assert "Trials    4 complete" in summary.splitlines()
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert len({row["trial_id"] for row in rows}) == 4
    assert [(row["lora_r"], row["learning_rate"], row["state"], row["steps"]) for row in rows] == [
        (rank, rate, "COMPLETE", STEPS) for rank in (2, 4) for rate in RATES
    ]
    for row in rows:
        assert [
            path.parent.name for path in (folder / "tune" / "train" / row["trial_id"]).glob("*/report.json")
        ] == [f"checkpoint-{STEPS}"]
    best = Settings.load(folder / "best" / "config.yaml")
    assert best.search.trial_runner == "packed"
    train_adapter(best.replace(output_dir=str(tmp_path / "alone"), num_workers="0"), lambda _: None)
    adapters = [
        load_file(path / "adapter_model.safetensors") for path in (folder / "best", tmp_path / "alone")
    ]
    assert difference(*adapters) < 1e-5, "as if nothing had happened, its dropout too"
