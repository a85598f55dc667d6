"""Runs of trackers in their local modes: names, groups, values, and the numbers of each step."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from vlmtune.config.settings import Settings
from vlmtune.trackers.tracker import Tracker, finish_trackers, open_trackers, tracked_run

SPACE = {"lora_r": {"choice": [4, 8]}, "lora_alpha": {"expr": "2 * lora_r"}}


def trial_settings(**values: Any) -> Settings:
    settings = Settings.from_flags(
        {"data_path": "s3://key:secret@bucket/x", "model_name_or_path": "base", "search_space": SPACE}
    )
    return settings.replace(lora_r=8, lora_alpha=16, **values)


def test_a_trial_is_named_by_its_id_in_the_group_of_its_search(tmp_path: Path) -> None:
    run = tracked_run(trial_settings(), f"{tmp_path}/demo/runs/1a2b")
    assert (run.output_dir, run.group, run.name) == (f"{tmp_path}/demo", "demo", "1a2b")
    assert run.values["lora_r"] == 8 and run.values["lora_alpha"] == 16
    assert "search_space" not in run.values and "secret" not in str(run.values)
    refit = tracked_run(trial_settings(), "s3://bucket/demo/tune/refit/runs")
    assert (refit.output_dir, refit.group, refit.name) == ("s3://bucket/demo", "demo", "refit")


def test_a_run_of_train_has_its_folders_name_and_no_group(tmp_path: Path) -> None:
    run = tracked_run(trial_settings(), f"{tmp_path}/mine/runs")
    assert (run.output_dir, run.group, run.name) == (f"{tmp_path}/mine", None, "mine")
    assert "lora_alpha" in run.values  # 16 is no default


def test_no_service_means_no_thread(tmp_path: Path) -> None:
    assert open_trackers(trial_settings(), str(tmp_path)) == []
    assert open_trackers(trial_settings(report_to="tensorboard"), str(tmp_path)) == []


def wandb_records(file: Path) -> list[Any]:
    """The records of a W&B run file: LevelDB's log format, in blocks of 32 kB, after 7 bytes of a header."""
    from wandb.proto import wandb_internal_pb2

    data, position, part, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no room for a header: the block is padded
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


def ended_run(file: Path) -> list[Any]:
    """The records of a run, once its last one is in the file: W&B's own process writes it."""
    for _ in range(100):
        records = wandb_records(file)
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_a_run_for_each_trial_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = []
    for name, loss in (("t1", 0.5), ("t2", 0.25)):
        runs = tmp_path / "demo" / "runs" / name
        runs.mkdir(parents=True)
        trackers += open_trackers(trial_settings(report_to=["wandb"]), str(runs))
        trackers[-1].log({"train/loss": loss}, 3)
    finish_trackers()
    assert [tracker.take_trouble() for tracker in trackers] == [None, None]
    for name, loss in (("t1", "0.5"), ("t2", "0.25")):
        run_id = (tmp_path / "demo" / "trackers" / f"{name}.wandb").read_text()
        (file,) = (tmp_path / "demo" / "trackers" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
        records = ended_run(file)
        run = next(record.run for record in records if record.HasField("run"))
        values = {item.key: item.value_json for item in run.config.update}
        assert (run.run_group, run.display_name, run.project) == ("demo", name, "vlmtune")
        assert values["lora_r"] == "8" and values["lora_alpha"] == "16"
        logged: dict[str, str] = {}
        for record in records:
            if record.HasField("history"):
                items = record.history.item
                logged |= {item.key or ".".join(item.nested_key): item.value_json for item in items}
        assert (logged["train/loss"], logged["step"]) == (loss, "3")


@pytest.mark.heavy  # importing MLflow takes seven seconds
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_an_experiment_for_the_search_and_a_run_for_each_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmtune.trackers.check import check_services, make_experiment
    from vlmtune.trackers.services import mlflow_client

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "demo"
    folder.mkdir()
    check_services(["mlflow"], str(folder))
    make_experiment(["mlflow"], str(folder))
    for attempt in range(2):  # a run that resumes goes on in the same run
        for name in ("t1", "t2"):
            runs = folder / "runs" / name
            runs.mkdir(parents=True, exist_ok=True)
            (tracker,) = open_trackers(trial_settings(report_to="mlflow"), str(runs))
            tracker.log({"train/loss": 0.5 - attempt / 4, "eval_loss": 1.5}, 3 + attempt)
            tracker.close()
            finish_trackers()
            assert tracker.take_trouble() is None
    client = mlflow_client(str(folder))
    experiment = client.get_experiment_by_name("demo")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["t1", "t2"]
    assert runs["t1"].data.params["lora_r"] == "8" and runs["t1"].data.tags["group"] == "demo"
    history = client.get_metric_history(runs["t1"].info.run_id, "train/loss")
    assert [(one.step, one.value) for one in history] == [(3, 0.5), (4, 0.25)]
    assert runs["t1"].info.status == "FINISHED"


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
def test_trackio_keeps_runs_of_a_group_apart(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="needs a Pillow below 13, which the constraints do not have")
    from trackio.sqlite_storage import SQLiteStorage

    trackers = []
    for name in ("t1", "t2"):
        runs = tmp_path / "demo" / "runs" / name
        runs.mkdir(parents=True)
        trackers += open_trackers(trial_settings(report_to="trackio"), str(runs))
        trackers[-1].log({"train/loss": 0.5}, 3)
    finish_trackers()
    assert [tracker.take_trouble() for tracker in trackers] == [None, None]
    logs = SQLiteStorage.get_logs(os.environ.get("TRACKIO_PROJECT", "vlmtune"), "demo/t1")
    assert [(one["step"], one["train/loss"]) for one in logs] == [(3, 0.5)]


@pytest.mark.filterwarnings("ignore")
def test_a_service_that_refuses_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    run = tracked_run(trial_settings(), f"{tmp_path}/demo/runs/t1")
    tracker = Tracker("wandb", run)
    tracker.log({"train/loss": 0.5}, 1)
    finish_trackers()
    trouble = tracker.take_trouble()
    assert trouble is not None and trouble.startswith("wandb: ") and trouble.endswith("continues without it")
    assert tracker.take_trouble() is None
    tracker.log({"train/loss": 0.5}, 2)
