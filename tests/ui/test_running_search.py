"""The page of a search while it runs, in headless Chromium: a person stops a trial and proposes another."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
from browser_kit import needs_chromium, wait_for
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

ROOT = Path(__file__).parents[2]
CONFIG = """
data_path: {data}
model_name_or_path: {model}
quantization: none
learning_rate: 1.0e-3
lora_r: 4
max_length: 128
max_steps: 300
eval_steps: 10
trial_runner: packed
per_device_train_batch_size: 4
gradient_checkpointing: false
num_samples: 3
max_concurrent_trials: 1
early_stopping: none
report: false
search_space:
  lora_r: {{choice: [2, 4, 8]}}
  learning_rate: {{loguniform: [1.0e-4, 1.0e-2]}}
"""


@needs_chromium
@pytest.mark.heavy
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
def test_trials_appear_one_is_stopped_and_a_proposed_one_runs_within_num_samples(
    serve: Callable[..., str], models: Path, mall: Path, tmp_path: Path, browser: Any
) -> None:
    config = tmp_path / "search.yaml"
    config.write_text(CONFIG.format(data=mall, model=models / "llava"), encoding="utf-8")
    out = tmp_path / "out"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vlmtune", "tune", "--config", str(config), "--output_dir", str(out)]
    with (tmp_path / "log").open("w") as log:
        search = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def still_runs() -> None:
        assert search.poll() is None, (tmp_path / "log").read_text()

    def text(name: str) -> str:
        return str(browser.find_element("id", name).text)

    try:
        while not (out / "live.json").is_file():
            still_runs()
            time.sleep(0.5)
        browser.get(serve("ui", str(out)))
        wait_for(lambda: "/3 trials" in text("line") and ", running" in text("line"), 60)
        wait_for(lambda: browser.find_elements("css selector", "#curves path"), 120)
        for name, value in (("lora_r", "8"), ("learning_rate", "0.0042")):
            browser.find_element("name", name).send_keys(value)
        browser.find_element("css selector", "#form button").click()
        wait_for(lambda: "queued" in text("said"))
        wait_for(lambda: "0.0042" in text("waiting"))
        browser.find_element("css selector", "#trials button").click()
        wait_for(lambda: "stops at its next report" in text("said"))
        wait_for(lambda: "PRUNED" in text("trials"), 120)
        wait_for(lambda: "0.0042" in text("trials") and not text("waiting"), 120)
        assert search.wait(600) == 0, (tmp_path / "log").read_text()
        wait_for(lambda: text("line").startswith("3/3 trials") and "not running" in text("line"))
        assert not browser.find_element("id", "propose").is_displayed()
    finally:
        search.terminate()
        search.wait(60)
    rows = pq.read_table(out / "trials.parquet").to_pylist()
    assert len(rows) == 3, "a proposed trial takes the place of another"
    assert [row["state"] for row in rows].count("PRUNED") == 1
    (proposed,) = (row for row in rows if row["origin"] == "requested")
    assert (proposed["lora_r"], proposed["state"]) == (8, "COMPLETE")
    assert proposed["learning_rate"] == pytest.approx(0.0042)
    storage = JournalStorage(JournalFileBackend(str(out / "study.journal")))
    (study,) = optuna.get_all_study_names(storage)
    study_trials = optuna.load_study(study_name=study, storage=storage).trials
    assert 0.0042 in [pytest.approx(trial.params.get("learning_rate")) for trial in study_trials]
