"""What a run measures: times without loading and evaluation, rates, and what goes to TensorBoard."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from vlmtune.training.meter import Meter, evaluation_number, peak_memory, training_flops_per_token


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """The scalars of a run's event files, read record by record: an 8-byte length, its 4-byte checksum, the
    event, a 4-byte checksum."""
    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + length :]
    return found


def test_training_time_leaves_out_loading_and_evaluation():
    meter = Meter(None)
    time.sleep(0.2)  # loading the model
    meter.begin()
    meter.count(rows=2, tokens=10)
    time.sleep(0.1)
    meter.pause(0.05)  # of that, an evaluation
    meter.begin()
    meter.count(rows=2, tokens=30)
    found = meter.summary()
    assert 0.05 <= found["seconds"] < 0.15
    assert found["rows_per_second"] == pytest.approx(4 / found["seconds"])
    assert found["tokens_per_second"] == pytest.approx(40 / found["seconds"])


def test_waiting_for_data_is_measured_from_the_second_batch_on():
    def slow():
        for number in range(3):
            time.sleep(0.05)
            yield number

    meter = Meter(None)
    for number in meter.timed(slow()):
        meter.begin()
        meter.count(rows=1, tokens=1)
        assert number == meter.rows - 1
        time.sleep(0.05)
    found = meter.summary()
    assert meter.data_wait_s == pytest.approx(0.1, abs=0.04)
    assert 0.2 < found["data_wait_fraction"] < 0.7


def test_curves_and_progress(tmp_path: Path):
    logged = []
    meter = Meter(str(tmp_path / "runs"), logged.append)
    meter.log({"loss": 2.0, "learning_rate": 0.5, "note": "text"}, 1, 3)
    meter.log({"eval_loss": 1.5}, 2, 3)
    assert meter.summary()["train_loss"] == 2.0
    early = scalars(
        tmp_path / "runs"
    )  # a summary comes with each report: what was logged by then can be seen
    meter.log({"loss": 1.0}, 3, 3)
    assert meter.summary()["train_loss"] == 1.0
    meter.close()
    assert early == {("train/loss", 1): 2.0, ("train/learning_rate", 1): 0.5, ("eval_loss", 2): 1.5}
    assert scalars(tmp_path / "runs") == {**early, ("train/loss", 3): 1.0}
    assert logged[0] == {"loss": 2.0, "learning_rate": 0.5, "step": 1, "max_steps": 3}


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    meter = Meter(None)
    meter.log({"loss": 2.0}, 1, 1)
    meter.close()
    assert list(tmp_path.iterdir()) == []
    assert "train_loss" in meter.summary()


def test_peak_memory_is_that_of_this_process():
    assert 0.1 < peak_memory() < 64  # GB: torch alone takes a few hundred MB


def test_operations_are_four_a_weight() -> None:
    decoder = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    assert training_flops_per_token(decoder) == 4 * (8 * 16 + 16 * 4)


@pytest.mark.parametrize(
    ("eval_steps", "metrics", "number"),
    [
        (0.25, {"step": 5, "max_steps": 19}, 1),
        (0.25, {"step": 10, "max_steps": 19}, 2),
        (0.25, {"step": 19, "max_steps": 19}, 4),
        (0.1, {"step": 3, "max_steps": 10}, 3),
        (50, {"step": 50, "max_steps": 2000}, 1),
        (50, {"step": 2000, "max_steps": 2000}, 40),
        (50, {"step": 20, "max_steps": 20}, 1),
        (None, {"step": 5, "max_steps": 15, "epoch": 1.0}, 1),
        (None, {"step": 15, "max_steps": 15, "epoch": 2.9999}, 3),
    ],
)
def test_evaluations_are_numbered_by_the_share_of_the_run(
    eval_steps: float | None, metrics: dict[str, Any], number: int
) -> None:
    assert evaluation_number(metrics, eval_steps) == number
