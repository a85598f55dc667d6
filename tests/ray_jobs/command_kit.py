"""What tests of whole searches share: the command in a process of its own, and a small search to give it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
STEPS = {"packed": 600, "isolated": 60}  # of a trial, so that there is time to end the command within
WAIT_S = 600.0  # for a line of a command, on a machine with other work


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
        assert psutil.wait_procs(family, timeout=WAIT_S / 2)[1] == [], "its Ray ends with it"
        return code

    def child(self, name: str) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(one for one in children if name in one.name())

    @contextmanager
    def training_suspended(self) -> Iterator[None]:
        """Let the processes that train wait, so that the search does not end meanwhile."""
        names = ("ray::EngineActor", "ray::RayTrainWorker")
        children = psutil.Process(self.process.pid).children(recursive=True)
        training = [one for one in children if " ".join(one.cmdline()).startswith(names)]
        assert training
        for process in training:
            process.suspend()
        yield
        for process in training:
            process.resume()

    def _file(self, kind: str) -> Path:
        return self.logs / f"{self.number}.{kind}"


class Search:
    """A small search, its folder and the commands on it."""

    def __init__(self, models: Path, mall: Path, folder: Path, runner: str) -> None:
        mine = ("RAY_worker_niceness",)  # for a machine with other work
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name in mine
        }
        self.environment = {**kept, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        self.commands: list[Command] = []
        self.out, self.logs, self.config = folder / "out", folder / "logs", folder / "config.yaml"
        self.config.write_text(
            f"""
data_path: {mall}
model_name_or_path: {models / "llava"}
quantization: none
lora_r: 4
max_steps: {STEPS[runner]}
eval_steps: {STEPS[runner] // 10}
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
        folder = str(out or self.out)
        return self.command("--config", str(self.config), "--output_dir", folder, *arguments)

    def resume(self, *arguments: str) -> Command:
        return self.command("--resume", str(self.out), *arguments)

    def command(self, *arguments: str) -> Command:
        self.commands.append(Command(self.environment, self.logs, *arguments))
        return self.commands[-1]

    def close(self) -> None:
        """End what still runs, after a test that failed."""
        for command in self.commands:
            if command.process.poll() is None:
                for process in psutil.Process(command.process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                command.process.kill()
                command.process.wait()

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
