"""The command as a user types it: what is printed, and what a killed search leaves."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(900)


# Steps of a trial, so that a search is still at its second one when it is killed.
STEPS = {"isolated": 2, "packed": 400}


@pytest.fixture(params=["packed", "isolated"])
def runner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def command(models: Path, mall: Path, tmp_path: Path, runner: str) -> list[str]:
    """A search of two trials, one after the other."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
data_path: {mall}
model_name_or_path: {models / "llava"}
quantization: none
learning_rate: 1.0e-3
lora_r: 4
max_length: 128
max_steps: {STEPS[runner]}
trial_runner: {runner}
per_device_train_batch_size: 4
gradient_checkpointing: false
num_samples: 2
max_concurrent_trials: 1
early_stopping: none
search_space:
  learning_rate: {{loguniform: [1.0e-4, 1.0e-2]}}
""",
        encoding="utf-8",
    )
    return [
        sys.executable,
        "ray_jobs/tune.py",
        "--config",
        str(config),
        "--output_dir",
        str(tmp_path / "out"),
    ]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **kept,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        "TUNE_GLOBAL_CHECKPOINT_S": "1",
    }


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.heavy
def test_a_killed_search_leaves_no_process_and_goes_on_with_every_trial_counted_once(
    command: list[str], environment: dict[str, str], tmp_path: Path, runner: str
) -> None:
    folder, steps = tmp_path / "out", STEPS[runner]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as killed:
        assert killed.stdout is not None
        begun = []
        for line in killed.stdout:
            begun.append(line)
            if line.startswith("trial   2  running"):
                break
        time.sleep(2.5)  # Tune writes down each second here that trial 1 has ended
        children = family(killed)
        os.killpg(killed.pid, signal.SIGKILL)
    assert any(line.startswith("trial   1  complete") for line in begun)
    assert any(re.match(rf"trial   1  running     step \d+/{steps}  eval_loss \d", line) for line in begun)
    assert not (folder / "trials.parquet").exists()
    _, alive = psutil.wait_procs(children, timeout=40)
    assert alive == [], "the Ray that a search starts ends with it"

    resumed = subprocess.run(
        [*command[:2], "--resume", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (resumed.returncode, resumed.stderr) == (0, "")
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["COMPLETE", "COMPLETE"]
    assert len({row["trial_id"] for row in rows}) == 2
    assert [(row["steps"]) for row in rows] == [steps, steps]
    assert rows[0]["learning_rate"] == 1e-3
    assert (folder / "best" / "adapter_model.safetensors").exists()
    heads = [
        "Data",
        "Search",
        "Dashboard",
        "Cost",
        "Live",
        "",
        "Test",
        "Best",
        "Values",
        "Proposals",
        "Adapter",
        "Report",
        "Table",
        "Curves",
    ]
    expected = [
        *(f"{head:<9} " for head in heads),
        "Trials    (2 complete$|packed, 1 at once|isolated, 1 at once)",
        "$",
        "Loading …",
        r"\d/2 trials",
        r"trial   [12]  (running|complete)  +(learning_rate|step) ",
    ]
    strange = [
        line for line in resumed.stdout.splitlines() if not any(re.match(one, line) for one in expected)
    ]
    assert strange == [], "nothing is printed that is not for a person"
    assert not re.search("^trial   1  running", resumed.stdout, re.MULTILINE)


@pytest.mark.parametrize("runner", ["packed"])
def test_a_mistake_is_one_line_and_exit_code_2(
    command: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    failed = subprocess.run(
        [*command, "--metric", "eval_los"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 2
    assert (
        failed.stderr.startswith("error: --metric eval_los: no trial reports it")
        and len(failed.stderr.splitlines()) == 1
    )
    assert failed.stdout == ""
    assert not (tmp_path / "out").exists()
