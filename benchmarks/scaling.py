"""How much faster are a search and a training run with several GPUs than with one?

    python benchmarks/scaling.py FOLDER --gpus 1 2 4 8 --json FILE [--parts search asha isolated packed]
        [--limit_s 550] [--work FOLDER] [--cold] [--set OPTION=VALUE ...]
    python benchmarks/scaling.py table FILE [--figure FILE.svg]

FOLDER holds a model of true size (`benchmarks/full_size.py`). The parts are

- `search`, `asha`: `ray_jobs/tune.py`, 32 packed trials of 2 rows a step, without and with early stopping.
- `isolated`, `packed`: `ray_jobs/train.py` on so many workers, each step of the same rows
  (`benchmarks/workers.py`).

Every part runs in a process of its own, which sees so many GPUs, and becomes one line of FILE: milliseconds a
row of all GPUs together, seconds of the whole command, and what the host spent. A part whose line is there is
not run again, nor does one begin that would end after `--limit_s` if it took as long as the longest so far. A
benchmark that is cut off resumes by the same command.

`--work` keeps rows, prepared rows and the result of the self-check between the parts. `--cold` drops the
model's files from the page cache, so that "read from disk" counts each reading of them. Of the GPUs in
CUDA_VISIBLE_DEVICES the first are taken, so several of these commands can share a host. Without a GPU, a Ray
with so many CPUs takes its place.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from figure import write_figure
from versions import check_versions

PARTS = {"search": "none", "asha": "asha", "isolated": "isolated", "packed": "packed"}
SAMPLE_S = 1.0
GB = 2**30
NAMES = {
    "search": "search",
    "asha": "search with ASHA",
    "isolated": "train.py, isolated",
    "packed": "train.py, packed",
}


class HostUse:
    """What the processes below this one use while a block runs, sampled every `SAMPLE_S` seconds.

    A process that lives for less than a sample is missed.

    Attributes:
        peak_memory: bytes of their proportional memory together, at most: what several share counts once.
        cpu: CPU seconds of the processes by kind: the driver, each kind of Ray worker, Ray's own processes.
        read: bytes read from disk, the page cache left out.
    """

    def __init__(self) -> None:
        self.peak_memory = 0.0
        self._cpu: dict[int, tuple[str, float]] = {}
        self._read: dict[int, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "HostUse":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def cpu(self) -> dict[str, float]:
        seconds: Counter[str] = Counter()
        for kind, spent in self._cpu.values():
            seconds[kind] += spent  # type: ignore[assignment]
        return {kind: round(spent, 1) for kind, spent in seconds.most_common() if spent >= 1}

    @property
    def read(self) -> int:
        return sum(self._read.values())

    def _sample(self) -> None:
        while not self._end.wait(SAMPLE_S):
            memory = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    times = process.cpu_times()
                    self._cpu[process.pid] = _kind(process.cmdline()), times.user + times.system
                    self._read[process.pid] = process.io_counters().read_bytes
                    memory += process.memory_full_info().pss
                except psutil.Error:  # it has ended
                    continue
            self.peak_memory = max(self.peak_memory, memory)


def _kind(command: list[str]) -> str:
    """The kind of a process: "driver", a Ray worker's class or function, or "Ray"."""
    text = " ".join(command)
    if text.startswith("ray::"):
        return text.removeprefix("ray::").partition("(")[0].partition(".")[0].strip()
    return "driver" if "ray_jobs/" in text else "Ray"


@contextmanager
def devices(count: int) -> Iterator[None]:
    """Let jobs see so many GPUs; without any, a Ray cluster with so many CPUs."""
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = (
            visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        )
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[:count])
        yield
        return
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": count})
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield
    finally:
        cluster.shutdown()


def drop_from_page_cache(folder: Path) -> None:
    """Let the next reader of a folder's files read them from the disk."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # pages that are not written yet are kept
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_part(folder: str, part: str, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one part on `count` GPUs, in this process's children."""
    if args.cold:
        drop_from_page_cache(Path(folder))
    with (
        devices(count),
        nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as work,
        HostUse() as host,
    ):
        if part in ("search", "asha"):
            result = run_search(folder, PARTS[part], count, Path(work), args)
        else:
            result = run_training(folder, part, count, Path(work), args)
    used = {"peak_host_gb": host.peak_memory / GB, "read_gb": host.read / GB, "cpu_s": host.cpu}
    return {**result, **used}


def run_search(
    folder: str, early_stopping: str, count: int, work: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """`tune.py` without what comes after the last trial: the winners' other seeds and the answers."""
    from search import whole

    flags = [*args.set, "confirm=none", "recipe=none"]
    shared = {"batch": 2, "text": False, "tokens": args.tokens, "set": flags, "rounds": 1}
    options: Any = SimpleNamespace(trials=args.trials, early_stopping=early_stopping, **shared)
    return whole(folder, options, args.search_rows, work, count)


def run_training(
    folder: str, runner: str, count: int, work: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """`train.py` on `count` workers; a step has as many rows with any number of them."""
    from data import write_rows
    from workers import BATCH, rows_in, train

    flags = {"trial_runner": runner, "cache_dir": str(work / "cache")}
    flags |= dict(option.split("=", 1) for option in args.set)
    batch = int(flags.get("per_device_train_batch_size", BATCH))
    rows = rows_in(work / f"rows{args.rows}", partial(write_rows, rows=args.rows, words=900))
    with tempfile.TemporaryDirectory() as results:
        return train(folder, Path(results), rows, count, args.step_rows or batch * max(args.gpus), flags)


def run_all(args: argparse.Namespace) -> None:
    """Run the parts that the file does not have, each in a process of its own."""
    file = Path(args.json)
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    model = Path(args.folder).name
    done = {(one["model"], one["part"], one["gpus"]) for one in known}
    started, longest = time.monotonic(), 0.0
    for count in args.gpus:
        for part in args.parts:
            if (model, part, count) in done:
                continue
            before = time.monotonic()
            if before + longest > started + args.limit_s:
                print(f"{part} on {count}: not begun, the time limit is near; the same command resumes")
                continue
            command = [sys.executable, __file__, args.folder, "--part", part, "--count", str(count)]
            for name in ("trials", "rows", "search_rows", "tokens"):
                command += [f"--{name}", str(getattr(args, name))]
            command += ["--work", args.work] * bool(args.work) + ["--cold"] * args.cold
            command += ["--step_rows", str(args.step_rows)] * bool(args.step_rows)
            command += ["--gpus", *map(str, args.gpus), "--set", *args.set]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            longest = max(longest, time.monotonic() - before)
            if process.returncode:
                print(f"{part} on {count}: failed, see above")
                continue
            result = json.loads(process.stdout.splitlines()[-1])
            line = {"model": model, "part": part, "gpus": count, "set": args.set, "cold": args.cold, **result}
            with file.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            print(f"{part} on {count}: {result['ms_a_row']:.2f} ms a row", flush=True)


def table(file: Path, figure: str | None) -> None:
    """Print the parts with their speed-up over the fewest GPUs, and draw it."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    print(
        "| model | part | GPUs | ms a row | speed-up | first to last report, s | whole command, s | "
        "lost to Tune, RPC, checkpoints | waiting for data | "
        "host memory, GB | read from disk, GB | CPU of the driver, s |"
    )
    print("|---" * 12 + "|")
    lines: dict[str, list[tuple[float, float]]] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        for part in PARTS:
            own = sorted(
                (row for row in rows if (row["model"], row["part"]) == (model, part)),
                key=lambda row: row["gpus"],
            )
            for row in own:
                faster = own[0]["ms_a_row"] / row["ms_a_row"]
                lines.setdefault(f"{model}, {NAMES[part]}", []).append((row["gpus"], faster * own[0]["gpus"]))
                cells = [
                    model,
                    NAMES[part],
                    row["gpus"],
                    f"{row['ms_a_row']:.2f}",
                    f"{faster:.2f}x",
                    f"{row['searching_s']:.1f}" if "searching_s" in row else "",
                    f"{row['total_s']:.0f}",
                    f"{row['added']:.1%}" if "added" in row else "",
                    f"{row['data_wait_fraction']:.2%}" if "data_wait_fraction" in row else "",
                    f"{row['peak_host_gb']:.1f}",
                    f"{row['read_gb']:.1f}",
                    f"{row['cpu_s'].get('driver', 0):.0f}",
                ]
                print("| " + " | ".join(map(str, cells)) + " |")
    if figure:
        from vlmtune.search.report.plot import Plot, Scale

        most = max(row["gpus"] for row in rows)
        lines["as many times as fast as GPUs"] = [(1, 1), (most, most)]
        plot = Plot(Scale.of([1, most]), Scale.of([0, most]), "GPUs", "times as fast as one GPU")
        write_figure(figure, plot, lines, plot.y_name, dots=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("file", nargs="?", type=Path, help="of table")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--rows", type=int, default=900, help="of isolated and packed")
    parser.add_argument("--search_rows", type=int, default=200, help="that a trial is trained on")
    parser.add_argument(
        "--step_rows", type=int, help="of a step of train.py; otherwise a batch for each of the most GPUs"
    )
    parser.add_argument("--work", metavar="FOLDER", help="of rows and prepared rows; kept")
    parser.add_argument("--cold", action="store_true", help="drop the model's files from the page cache")
    parser.add_argument("--tokens", type=int, default=640, help="that rows are cut to")
    parser.add_argument("--limit_s", type=float, default=float("inf"))
    parser.add_argument("--set", nargs="*", default=["torch_compile=true"], metavar="OPTION=VALUE")
    parser.add_argument("--json", default="scaling.jsonl")
    parser.add_argument("--figure", metavar="FILE.svg", help="of table")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # a process of one part
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder == "table":
        table(args.file, args.figure)
    elif args.part:
        print(json.dumps(run_part(args.folder, args.part, args.count, args)))
    else:
        check_versions()
        run_all(args)


if __name__ == "__main__":
    main()
