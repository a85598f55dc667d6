"""What a packed trial measures, and where its TensorBoard events go."""

from pathlib import Path
from typing import Any

import pytest

from vlmtune.config.settings import Settings
from vlmtune.packed.trial_records import TrialRecords


def test_rates_are_by_the_time_that_was_the_trials() -> None:
    steps: list[dict[str, Any]] = []
    records = TrialRecords(Settings(), None, steps.append, flops_per_token=0.0)
    records.meter.begin()
    records.meter.count(rows=6, tokens=60)
    records.add_seconds(2.0, 0.5)
    records.add_seconds(1.0, 0.25)
    summary = records.meter.summary()
    assert summary["seconds"] == pytest.approx(3.0)
    assert summary["rows_per_second"] == pytest.approx(2.0)
    assert summary["data_wait_fraction"] == pytest.approx(0.25)
    records.meter.log({"loss": 1.5}, 1, 4)
    assert steps[0]["loss"] == 1.5


def test_events_of_a_local_folder_are_written_there(tmp_path: Path) -> None:
    records = TrialRecords(Settings(), str(tmp_path / "runs"), None, 0.0)
    records.meter.log({"loss": 1.5}, 1, 4)
    records.meter.summary()
    records.publish_runs()
    records.meter.close()
    assert len(list((tmp_path / "runs").glob("events*"))) == 1


def test_events_of_a_uri_are_copied_there(tmp_path: Path) -> None:
    records = TrialRecords(Settings(), f"file://{tmp_path}/runs", None, 0.0)
    records.meter.log({"loss": 1.5}, 1, 4)
    records.meter.summary()
    assert not (tmp_path / "runs").exists()
    for _ in range(2):
        records.publish_runs()
    records.meter.close()
    (events,) = (tmp_path / "runs").glob("events*")
    assert events.stat().st_size > 0
