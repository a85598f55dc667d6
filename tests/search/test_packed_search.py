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
from vlmtune.packed.trial_checkpoint import ADAPTER_FILE
from vlmtune.search.run_search import run_search
from vlmtune.search.summary import search_summary
from vlmtune.single_run import train_adapter

pytestmark = [pytest.mark.timeout(1500), pytest.mark.usefixtures("machine")]

# Long enough to be killed in the middle. At the higher rate a difference in the last bit grows to 76 % of the
# adapter within 24 steps.
STEPS, RATES = 40, [1e-4, 0.3]
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
    """Wait for something, up to ten minutes, then act until it has worked."""
    end = time.monotonic() + 600
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
        whole = {
            path.parent.name for path in (folder / "tune" / "train" / row["trial_id"]).glob("*/report.json")
        }
        last = {f"checkpoint-{STEPS}", f"checkpoint-{STEPS - 5}"}
        assert last <= whole and len(whole) <= 3, "the last two, and the best one"
    run_search(settings.replace(output_dir=str(tmp_path / "undisturbed")))
    assert same_results(folder, tmp_path / "undisturbed") == {
        (rank, rate): (0.0, pytest.approx(0.0, abs=1e-6)) for rank in (2, 4) for rate in RATES
    }, "as if nothing had happened, its dropout too"
    best = Settings.load(folder / "best" / "config.yaml")
    assert best.search.trial_runner == "packed"
    alone = best.replace(
        lora_r=4, learning_rate=RATES[0], output_dir=str(tmp_path / "alone"), num_workers="0"
    )
    train_adapter(alone, lambda _: None)
    row = next(row for row in rows if (row["lora_r"], row["learning_rate"]) == (4, RATES[0]))
    trained = load_file(folder / "tune" / "train" / row["trial_id"] / f"checkpoint-{STEPS}" / ADAPTER_FILE)
    assert difference(trained, load_file(tmp_path / "alone" / ADAPTER_FILE)) < 1e-5


def same_results(*folders: Path) -> dict[tuple[int, float], tuple[float, float]]:
    """By rank and learning rate: relative differences of the loss and of the last adapter of two searches."""
    tables = [
        {
            (row["lora_r"], row["learning_rate"]): (
                row["eval_loss"],
                load_file(folder / "tune" / "train" / row["trial_id"] / f"checkpoint-{STEPS}" / ADAPTER_FILE),
            )
            for row in pq.read_table(folder / "trials.parquet").to_pylist()
        }
        for folder in folders
    ]
    return {
        point: (abs(loss / tables[1][point][0] - 1), difference(adapter, tables[1][point][1]))
        for point, (loss, adapter) in tables[0].items()
    }
