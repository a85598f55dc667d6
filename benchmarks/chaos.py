"""A search whose processes are killed at random, against the same search undisturbed, and what both leave.

    python benchmarks/chaos.py                                  40 trials, a victim every 20 s
    python benchmarks/chaos.py --trials 12 --every 10 --limit 600

Two nodes of two CPUs each are started on this machine, with a token. A killer ends a random victim (SIGKILL)
every few seconds until the search has ended or `--limit` seconds are over: an engine, a trial's process, or
the second node, which another one replaces.

It prints the tables of docs/benchmarks.md, and exits with 1 if a trial is missing, is there twice or differs
by more than 1e-6 from the undisturbed search.
"""

import argparse
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pyarrow.parquet as pq
import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors, list_placement_groups

from vlmtune.api import search
from vlmtune.config.settings import Settings
from vlmtune.demo.mall import write_mall
from vlmtune.demo.models import write_model
from vlmtune.private_ray import make_private_temp_dir, make_private_token

ENGINE, TRIAL, NODE = "ray::EngineActor", "ray::ResourceTrainable", "node"
VICTIMS = (ENGINE, TRIAL, TRIAL, NODE)  # trials twice as often
CLOSE = 1e-6  # relative difference of two evaluation losses
NODE_CPUS = 2
STORE_BYTES = 2**28
RATES = (1e-4, 1e-1)  # up to one at which a difference in the last bit grows
Loss = dict[tuple[float, int], tuple[str, int, float]]  # state, steps and loss by learning rate and rank


class Killer:
    """Ends a random victim every few seconds, in a thread.

    Attributes:
        kills: how often each kind was killed.
        second: the second node, which another one has replaced after its end.
    """

    def __init__(self, address: str, second: "SecondNode", every: float, limit: float, seed: int) -> None:
        self.address, self.second, self.every, self.limit = address, second, every, limit
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self._ended = Event()
        self._thread = Thread(target=self._run, name="killer")

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        end = time.monotonic() + self.limit
        while not self._ended.wait(self.every) and time.monotonic() < end:
            kind = self.random.choice(VICTIMS)
            if self._kill_node() if kind == NODE else self._kill_process(kind):
                self.kills[kind] += 1

    def _kill_process(self, kind: str) -> bool:
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # Ray's processes come and go
                found += [process] if " ".join(process.cmdline()).startswith(kind) else []
        if not found:
            return False
        with suppress(psutil.NoSuchProcess):
            self.random.choice(found).kill()
        return True

    def _kill_node(self) -> bool:
        self.second.kill()
        self.second = SecondNode(self.address)
        return True


class SecondNode:
    """A node that joins the cluster by Ray's command: `Cluster` adds nodes in the main thread only."""

    def __init__(self, address: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--address", address]
        command += ["--num-cpus", str(NODE_CPUS), "--object-store-memory", str(STORE_BYTES)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        """SIGKILL all of its processes, as when a machine fails."""
        own = psutil.Process(self._process.pid)
        for process in [own, *own.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()


def settings_of(folder: Path, trials: int, steps: int) -> Settings:
    low, high = RATES
    rates = [low * (high / low) ** (index / max(trials // 2 - 1, 1)) for index in range(trials // 2)]
    return Settings.from_flags(
        {
            "data_path": str(folder / "mall"),
            "model_name_or_path": str(folder / "llava"),
            "cache_dir": str(folder / "cache"),
            "storage_path": str(folder / "shared"),
            "trial_runner": "packed",
            "quantization": "none",
            "lora_dropout": 0.1,
            "max_steps": steps,
            "eval_steps": 5,
            "per_device_train_batch_size": 4,
            "early_stopping": "none",
            "report": False,
            "recipe": None,
            "confirm": "none",
            "use_cpu": True,
            "search_space": {"learning_rate": {"grid": rates}, "lora_r": {"grid": [2, 4]}},
        }
    )


def run(settings: Settings, out: Path) -> tuple[Loss, int]:
    """Search; returns the results, and the number of rows of the table."""
    search(settings.replace(output_dir=str(out)))
    rows = pq.read_table(out / "trials.parquet").to_pylist()
    found = {
        (row["learning_rate"], row["lora_r"]): (row["state"], row["steps"], row["eval_loss"]) for row in rows
    }
    return found, len(rows)


def find_free_port() -> int:
    """A port that nobody listens on; the dashboard of another Ray may have the usual one."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def left_behind() -> dict[str, float]:
    """What this process and the cluster hold now. Actors take a moment to end."""
    time.sleep(5)
    own = psutil.Process()
    actors = [one for one in list_actors() if one.state == "ALIVE" and one.class_name == "EngineActor"]
    groups = [one for one in list_placement_groups() if one.state != "REMOVED"]
    return {
        "engines": len(actors),
        "placement groups": len(groups),
        "threads": own.num_threads(),
        "open files": own.num_fds(),
        "memory, GB": own.memory_info().rss / 2**30,
        "free CPUs": ray.available_resources().get("CPU", 0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--trials", type=int, default=40, help="an even number")
    parser.add_argument("--steps", type=int, default=40, help="of a trial")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two victims")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which nothing is killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if os.environ.get("RAY_AUTH_MODE") != "token":  # Ray reads it when it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "RAY_AUTH_MODE": "token"})
    make_private_temp_dir()
    make_private_token()
    node = {"num_cpus": NODE_CPUS, "object_store_memory": STORE_BYTES}
    head = {**node, "include_dashboard": True, "dashboard_port": find_free_port()}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    second = SecondNode(cluster.address)
    os.environ["RAY_ADDRESS"] = cluster.address
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_mall(folder / "mall", frames=24)
        write_model("llava", folder / "llava")
        settings = settings_of(folder, options.trials, options.steps)
        started = time.monotonic()
        expected, _ = run(settings, folder / "undisturbed")
        undisturbed_s, before = time.monotonic() - started, left_behind()
        started = time.monotonic()
        with Killer(cluster.address, second, options.every, options.limit, options.seed) as killer:
            found, rows = run(settings, folder / "killed")
        killed_s, after = time.monotonic() - started, left_behind()
    ray.shutdown()
    killer.second.kill()
    cluster.shutdown()
    both = [
        point
        for point in expected
        if point in found and {expected[point][0], found[point][0]} == {"COMPLETE"}
    ]
    worst = max((abs(found[point][2] / expected[point][2] - 1) for point in both), default=float("nan"))
    killed = ", ".join(f"{count} {kind.removeprefix('ray::')}" for kind, count in killer.kills.items())
    print("| trials | complete in both | twice | killed | largest difference | seconds | undisturbed |")
    print("|" + "---|" * 7)
    twice = rows - len(found)
    print(f"| {options.trials} | {len(both)} | {twice} | {killed} | {worst:.1e} | {killed_s:.0f}", end="")
    print(f" | {undisturbed_s:.0f} |")
    print("\n| | after the undisturbed search | after the other |\n|---|---|---|")
    for what, value in before.items():
        print(f"| {what} | {value:.4g} | {after[what]:.4g} |")
    sys.exit(not (found.keys() == expected.keys() and not twice and worst <= CLOSE and killer.kills))


if __name__ == "__main__":
    main()
