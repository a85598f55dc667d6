"""Where it runs: starting or joining Ray, and what its machines can give."""

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from vlmtune.errors import ConfigError, ResourceError

# The object store of a Ray that we start ourselves. Micro-batches stream through it; nothing stays. Given
# outright, because Ray takes a
# share of the memory that it sees, and some machines show little of theirs until it is used.
OBJECT_STORE_BYTES = 2 * 2**30

# CPUs that a training worker counts for, and a task that reads rows for it. Less than one, so that four
# workers and the tasks that feed
# them find room on two CPUs.
WORKER_CPUS = 0.4
READ_CPUS = 0.25
# Such tasks at once for a trainer, or for models that answer on CPUs. Each takes a process of 0.5 GB that
# imports the libraries before its
# first row; without a bound there is one for every READ_CPUS of the cluster, and all of them start beside
# the model.
READ_TASKS = 2
SECONDS_TO_ANSWER = 10.0
LAUNCHED = (
    Path.home() / "ray_bootstrap_config.yaml"
)  # `ray up` leaves it on the head, where a job's entry point runs

WORKER_ENV = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # the processes are parallel already
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Cluster:
    """A running Ray, and the most of each resource that it can have."""

    dashboard: str | None
    cpus: float
    gpus: float
    nodes: int

    def workers_use_gpu(self, use_cpu: bool) -> bool:
        return self.gpus > 0 and not use_cpu

    def check_workers(self, workers: int, use_cpu: bool) -> None:
        """Raises ResourceError where `workers` cannot be placed even when nothing else runs."""
        if self.gpus > 0 and not use_cpu and workers > self.gpus:
            raise ResourceError(
                f"--num_workers {workers}: one GPU each is needed, and this cluster has {self.gpus:g}"
            )
        most = int((self.cpus - READ_CPUS) / WORKER_CPUS)
        if workers > most:
            raise ResourceError(
                f"--num_workers {workers}: this cluster's {self.cpus:g} CPUs have room for {most}"
            )

    def fitting_trials(self, workers: int, use_cpu: bool) -> int:
        """How many trials of `workers` workers run side by side."""
        room = self.gpus / workers if self.workers_use_gpu(use_cpu) else self.cpus / workers
        return max(1, int(room))


def in_ray_job() -> bool:
    """Whether this process is the entry point of a Ray job, whose working directory goes away with it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def connect() -> Cluster:
    """Join the Ray that RAY_ADDRESS names, or start one on this machine that ends with this process.

    Raises:
        ConfigError: if RAY_ADDRESS names a cluster that does not answer.
    """
    os.environ |= {name: value for name, value in WORKER_ENV.items() if name not in os.environ}
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": dict(WORKER_ENV)},
    }
    address = os.environ.get("RAY_ADDRESS")
    if address is not None:
        _check_answers(address)
    else:  # nobody takes this machine back: spares each run a process that would watch for it
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        # The dashboard stays on: without it, runs that Tune stops leak their placement groups.
        # "local", or Ray would join whatever ran on this machine last, alive or not.
        own = {"address": "local", "include_dashboard": True, "object_store_memory": OBJECT_STORE_BYTES}
        ours: dict[str, Any] = {} if address is not None else own
        context = ray.init(
            **options, **ours, ignore_reinit_error=True
        )  # a process may train several adapters
    except (ConnectionError, RuntimeError) as error:
        where = f"RAY_ADDRESS={address}" if address else "this machine"
        raise ConfigError(f"cannot reach or start Ray on {where}: {str(error).splitlines()[0]}") from error
    now = ray.cluster_resources()
    later, nodes = autoscaled(LAUNCHED) if address is not None else ({}, 0)
    most = {name: max(now.get(name, 0.0), later.get(name, 0.0)) for name in ("CPU", "GPU")}
    alive = sum(node["Alive"] for node in ray.nodes())
    url = context.dashboard_url
    return Cluster(f"http://{url}" if url else None, most["CPU"], most["GPU"], max(alive, nodes))


def autoscaled(file: Path) -> tuple[dict[str, float], int]:
    """The most CPUs and GPUs, and nodes, that a cluster can have by the launcher's `file`; nothing where
    there is none.

    Ray has no call for it: its own answer stays empty, and a head without a GPU then looks like a cluster
    without one.
    """
    if not file.is_file():
        return {}, 0
    config = yaml.safe_load(file.read_text())
    types, limit = (
        dict(config["available_node_types"]),
        int(config.get("max_workers", 2)),
    )  # the launcher's default
    head = types.pop(config["head_node_type"])
    counts = [
        (one.get("resources", {}), min(int(one.get("max_workers", limit)), limit)) for one in types.values()
    ]
    most = {}
    for name in ("CPU", "GPU"):
        each = sorted(
            (float(resources.get(name, 0)) for resources, count in counts for _ in range(count)), reverse=True
        )
        most[name] = float(head.get("resources", {}).get(name, 0)) + sum(each[:limit])
    return most, 1 + min(limit, sum(count for _, count in counts))


def _check_answers(address: str) -> None:
    """Raises ConfigError where nothing answers at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto" or "local"
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS={address}: no Ray answers there ({error.strerror or error}); correct it, or unset it"
        ) from None
