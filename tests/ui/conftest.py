"""Output folders of searches: one that runs, and one that has finished."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmtune.config.settings import Settings

ROOT = Path(__file__).parents[2]
HOSTILE = "<img src=x onerror=alert(1)>"


def write_search(folder: Path) -> None:
    settings = Settings.from_flags(
        {
            "data_path": f"데이터/{HOSTILE}",
            "model_name_or_path": "base",
            "search_space": {
                "lora_r": {"choice": [4, 8]},
                "lora_alpha": {"expr": "2 * lora_r"},
                "learning_rate": {"loguniform": [1e-5, 1e-2]},
            },
        }
    )
    folder.mkdir()
    settings.save(folder / "search.yaml")


@pytest.fixture
def running(tmp_path: Path) -> Path:
    folder = tmp_path / f"검색 {HOSTILE.replace('/', '')}"
    write_search(folder)
    trials = [
        {
            "number": 1,
            "trial_id": "t1",
            "state": "COMPLETE",
            "values": {"lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3},
            "step": 40,
            "max_steps": 40,
            "eval_loss": 0.5,
            "curve": [[10, 0.9], [40, 0.5]],
        },
        {
            "number": 2,
            "trial_id": HOSTILE,
            "state": "RUNNING",
            "values": {"lora_r": 8, "lora_alpha": 16, "learning_rate": 2e-3},
            "step": 10,
            "max_steps": 40,
            "eval_loss": 0.8,
            "curve": [[10, 0.8]],
        },
    ]
    state = {
        "objectives": {"eval_loss": "min"},
        "total": 4,
        "running": True,
        "trials": trials,
        "rows": [
            {"question": f"몇 명? {HOSTILE}", "reference": "4"},
            {"question": "red?", "reference": "no"},
        ],
        "answers": {
            "1": [[10, [HOSTILE, "no"]], [20, [HOSTILE, "yes"]], [40, ["4", "yes"]]],
            "2": [[10, ["7", "maybe"]]],
        },
    }
    (folder / "live.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "finished"
    write_search(folder)
    rows = [
        {
            "trial_id": f"t{number}",
            "lora_r": 4,
            "lora_alpha": 8,
            "learning_rate": 1e-3 * number,
            "state": "COMPLETE",
            "eval_loss": 1.0 / number,
            "steps": 40,
        }
        for number in (1, 2, 3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "trials.parquet")
    return folder


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Returns a function that starts a command which serves a page, and returns the printed address."""
    processes = []

    def start(*command: str) -> str:
        program = [sys.executable, "-m", "vlmtune", *command]
        process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Page"):
                return line.split()[1]
        raise AssertionError(f"{command} ended without a page")

    yield start
    for process in processes:
        process.terminate()
        process.wait()


@pytest.fixture
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()
