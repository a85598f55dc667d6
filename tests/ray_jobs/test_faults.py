"""A search through everything that ends a command, resumed after each: it ends as an undisturbed one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
WAIT_S = 600.0  # for a line of a command, on a machine with other work

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3000)]


class Command:
    """`ray_jobs/tune.py` in a process of its own, whose output goes to files."""

    def __init__(self, environment: dict[str, str], logs: Path, *arguments: str) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self.number = len(list(logs.iterdir())) // 2
        with self._file("out").open("w") as out, self._file("err").open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "ray_jobs/tune.py", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        return self._file("out").read_text()

    @property
    def stderr(self) -> str:
        return self._file("err").read_text()

    def wait_until(self, there: Callable[[], Any]) -> None:
        end = time.monotonic() + WAIT_S
        while not there():
            assert time.monotonic() < end, f"{self.stdout}\n{self.stderr}"
            assert self.process.poll() is None, f"it ended: {self.stdout}\n{self.stderr}"
            time.sleep(0.02)

    def end(self) -> int:
        """Wait for its end and that of all processes of its Ray; returns the exit code."""
        family = (
            psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        )
        code = self.process.wait(WAIT_S)
        assert psutil.wait_procs(family, timeout=60)[1] == [], "its Ray ends with it"
        return code

    def child(self, name: str) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(one for one in children if name in one.name())

    def _file(self, kind: str) -> Path:
        return self.logs / f"{self.number}.{kind}"


class Search:
    """A small search, its folder and the commands on it."""

    def __init__(self, models: Path, mall: Path, folder: Path, runner: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {**kept, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        self.out, self.logs, self.config = folder / "out", folder / "logs", folder / "config.yaml"
        self.config.write_text(
            f"""
data_path: {mall}
model_name_or_path: {models / "llava"}
quantization: none
lora_r: 4
max_steps: {60 if runner == "packed" else 12}
eval_steps: {5 if runner == "packed" else 2}
trial_runner: {runner}
per_device_train_batch_size: 4
num_samples: 3
max_concurrent_trials: 3
early_stopping: none
report: false
recipe: none
use_cpu: true
search_space:
  learning_rate: {{loguniform: [1.0e-4, 1.0e-1]}}
"""
        )

    def start(self, *arguments: str, out: Path | None = None) -> Command:
        folder = ("--output_dir", str(out or self.out))
        return Command(self.environment, self.logs, "--config", str(self.config), *folder, *arguments)

    def resume(self, *arguments: str) -> Command:
        return Command(self.environment, self.logs, "--resume", str(self.out), *arguments)

    @property
    def hint(self) -> str:
        return f"To resume: python ray_jobs/tune.py --resume {self.out}"

    def checkpoints(self, out: Path | None = None) -> list[Path]:
        return sorted((out or self.out).glob("tune/train/*/*/adapter_model.safetensors"))

    def new_checkpoint(self) -> Callable[[], bool]:
        """Whether there is a checkpoint that is not there now."""
        before = set(self.checkpoints())
        return lambda: bool(set(self.checkpoints()) - before)

    def results(self, out: Path | None = None) -> dict[float, tuple[str, float, int]]:
        rows = pq.read_table((out or self.out) / "trials.parquet").to_pylist()
        assert len({row["trial_id"] for row in rows}) == len(rows)
        return {row["learning_rate"]: (row["state"], row["eval_loss"], row["steps"]) for row in rows}


@pytest.fixture(params=["packed", "isolated"])
def search(request: pytest.FixtureRequest, models: Path, mall: Path, tmp_path: Path) -> Search:
    return Search(models, mall, tmp_path, request.param)


def test_a_search_survives_all_of_it(search: Search) -> None:
    # SIGTERM before there is anything to resume.
    early = search.start()
    early.wait_until(lambda: "Loading" in early.stdout)
    time.sleep(2)
    early.process.send_signal(signal.SIGTERM)
    assert (early.end(), early.stderr, search.out.exists()) == (143, "Terminated.\n", False)

    # SIGKILL in the middle; a second command is refused while the first runs.
    killed = search.start()
    killed.wait_until(search.checkpoints)
    second = search.resume()
    assert second.end() == 2
    assert second.stderr.startswith(f"error: --resume {search.out}: process {killed.process.pid} on ")
    killed.wait_until(search.new_checkpoint())
    killed.process.kill()
    assert killed.end() == -signal.SIGKILL

    # Ray's own state cut or gone, and a trial's last checkpoint cut; then Ctrl-C.
    for state in search.out.glob("tune/*state*"):
        state.write_bytes(state.read_bytes()[:10])
    (search.out / "tune" / "tuner.pkl").unlink(missing_ok=True)
    last = max(search.checkpoints(), key=lambda path: path.stat().st_mtime)
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    interrupted = search.resume()
    interrupted.wait_until(search.new_checkpoint())
    interrupted.process.send_signal(signal.SIGINT)
    assert (interrupted.end(), interrupted.stderr) == (130, f"Interrupted. {search.hint}\n")

    # Ctrl-C twice.
    twice = search.resume()
    twice.wait_until(lambda: "Trials" in twice.stdout)
    for _ in range(2):
        twice.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert twice.end() == 130
    assert twice.stderr in ("", f"Interrupted. {search.hint}\n")

    # Ray's GCS dies.
    headless = search.resume()
    headless.wait_until(lambda: "Trials" in headless.stdout)
    headless.child("gcs_server").kill()
    line = f"error: Ray's GCS has ended, and the run with it. {search.hint}\n"
    assert (headless.end(), headless.stderr) == (1, line)

    # SIGTERM, as schedulers send it.
    stopped = search.resume()
    stopped.wait_until(lambda: "Trials" in stopped.stdout)
    stopped.process.send_signal(signal.SIGTERM)
    assert (stopped.end(), stopped.stderr) == (143, f"Terminated. {search.hint}\n")

    # The end, then one trial more.
    ended = search.resume()
    assert (ended.end(), ended.stderr) == (0, "")
    assert [state for state, _, _ in search.results().values()] == ["COMPLETE"] * 3
    again = search.resume()
    assert again.end() == 2
    assert "this search has ended, nothing is left to do" in again.stderr
    extended = search.resume("--num_samples", "4")
    assert (extended.end(), extended.stderr) == (0, "")

    other = search.out.parent / "undisturbed"
    undisturbed = search.start("--num_samples", "4", out=other)
    assert (undisturbed.end(), undisturbed.stderr) == (0, "")
    expected = search.results(other)
    found = search.results()
    assert len(expected) == 4 and found.keys() == expected.keys()
    for rate, (state, loss, steps) in expected.items():
        assert found[rate] == (state, pytest.approx(loss, rel=1e-6), steps)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("search", ["packed"], indirect=True)
def test_a_full_disk_and_a_folder_that_is_gone_are_one_line(search: Search, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64m") as disk:
        search.out = disk / "out"
        full = search.start()
        full.wait_until(search.checkpoints)
        filler = disk / "filler"
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
            except OSError:
                pass
        assert full.end() == 1
        line = f"error: --output_dir {search.out}: no space is left on the disk; what was written is kept."
        assert full.stderr.startswith(line) and full.stderr.count("\n") == 1
        filler.unlink()
        resumed = search.resume()
        assert (resumed.end(), resumed.stderr) == (0, "")
        assert [state for state, _, _ in search.results().values()] == ["COMPLETE"] * 3

    search.out = tmp_path / "gone"
    gone = search.start()
    gone.wait_until(search.checkpoints)
    shutil.rmtree(search.out, ignore_errors=True)
    assert gone.end() == 1
    assert gone.stderr.startswith(f"error: --output_dir {search.out}: ")
    assert gone.stderr.count("\n") == 1
