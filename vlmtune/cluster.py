"""Join or start Ray, and find out how many CPUs and GPUs it has."""

import logging
import os
import re
import socket
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.exceptions import RayError

from vlmtune.compat.ray_node import loopback_addresses
from vlmtune.errors import ConfigError, ResourceError
from vlmtune.private_ray import make_private_temp_dir, make_private_token, short_tmpdir
from vlmtune.standard_error import captured_stderr
from vlmtune.stop_signals import kept_signal_handlers

logger = logging.getLogger(__name__)

# Size of the object store of a Ray that vlmtune starts. Batches stream through it; nothing stays there. The
# size is explicit, because Ray takes a fraction of the memory that it sees, and some machines show little of
# their memory until it is used.
OBJECT_STORE_BYTES = 2 * 2**30

# CPUs that Ray reserves for a training worker, and for a task that reads rows for it. Both are below one, so
# that four workers and their reading tasks fit on two CPUs.
WORKER_CPUS = 0.4
READ_CPUS = 0.25
# Reading tasks at once for one training worker, or for models that answer on CPUs. Each task runs in a
# process of 0.5 GB that imports the libraries before its first row. Without this bound Ray would start one
# for every READ_CPUS of the cluster, all of them while the model loads.
READ_TASKS = 2
# Parts of Ray's messages when a cluster requires a token that this process does not have.
TOKEN_REFUSED = re.compile(
    r"InvalidAuthToken|UNAUTHENTICATED|Unauthenticated|auth(?:entication)? token", re.I
)
SECONDS_TO_ANSWER = 10.0  # time limit for the Ray at RAY_ADDRESS to accept a connection
# `ray up` writes this file on the head node, where a job's entry point runs.
LAUNCHER_CONFIG = Path.home() / "ray_bootstrap_config.yaml"
LAUNCHER_MAX_WORKERS = 2  # the launcher's default, if the file has no max_workers

WORKER_ENV = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # the processes are parallel already
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_AIR_NEW_OUTPUT": "0",
    # A call whose result nobody reads any more, because its search has ended with an error of its own.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}


@dataclass(frozen=True)
class Cluster:
    """A running Ray, with the resources that it can have at most, autoscaled nodes included.

    Attributes:
        dashboard: URL of the dashboard.
        cpus, gpus, nodes: the largest number of each.
        gpu_limit: the value of `--gpus`; `gpus` does not exceed it.
    """

    dashboard: str | None
    cpus: float
    gpus: float
    nodes: int
    gpu_limit: int | None = None

    def limited_to(self, gpus: int | None) -> "Cluster":
        """The cluster for a run that uses at most `gpus` GPUs; itself if `gpus` is None."""
        return self if gpus is None else replace(self, gpus=min(self.gpus, gpus), gpu_limit=gpus)

    def workers_use_gpu(self, use_cpu: bool) -> bool:
        """Whether a training worker uses a GPU. `use_cpu` is the flag of that name."""
        return self.gpus > 0 and not use_cpu

    def check_workers(self, workers: int, use_cpu: bool) -> None:
        """Raises ResourceError if `workers` cannot be placed even when nothing else runs."""
        if self.gpus > 0 and not use_cpu and workers > self.gpus:
            limited = self.gpus == self.gpu_limit
            there = f"--gpus allows {self.gpus:g}" if limited else f"this cluster has {self.gpus:g}"
            raise ResourceError(f"--num_workers {workers}: one GPU each is needed, and {there}")
        most = int((self.cpus - READ_CPUS) / WORKER_CPUS)
        if workers > most:
            raise ResourceError(
                f"--num_workers {workers}: this cluster's {self.cpus:g} CPUs have room for {most}"
            )

    def fitting_trials(self, workers: int, use_cpu: bool) -> int:
        """The number of trials, each with `workers` workers, that can run at once."""
        room = self.gpus / workers if self.workers_use_gpu(use_cpu) else self.cpus / workers
        return max(1, int(room))


def in_ray_job() -> bool:
    """Whether this process is the entry point of a Ray job.

    Ray deletes the job's working directory at its end.
    """
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def connect() -> Cluster:
    """Join the Ray that RAY_ADDRESS names, or start one on this machine that ends with this process.

    A Ray that is started here listens on loopback only, requires a token, and keeps its files private. A
    second call returns the Ray that the process is connected to already.

    Raises:
        ConfigError: if RAY_ADDRESS names a cluster that does not answer.
        ResourceError: Ray's temporary folder cannot be made.
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
    else:
        # This machine is no spot instance, so no run needs Ray's process that watches for its end.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # The dashboard stays on: without it, Train runs that Tune stops leak their placement groups.
        # "local", because without an address Ray would try to join the last Ray of this machine, alive or
        # not.
        options |= {"address": "local", "include_dashboard": True, "object_store_memory": OBJECT_STORE_BYTES}
        make_private_temp_dir()
        make_private_token()
    try:
        # If a cluster refuses this process, Ray prints some twenty lines before it raises.
        with (
            captured_stderr() if address is not None else nullcontext(list[str]()) as printed,
            nullcontext() if address is not None else loopback_addresses(),
            nullcontext() if address is not None else short_tmpdir(),
            kept_signal_handlers(),
        ):
            context = ray.init(**options, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, RayError) as error:
        where = f"RAY_ADDRESS={address}" if address else "this machine"
        if TOKEN_REFUSED.search(f"{error} {''.join(printed)}"):
            raise ConfigError(
                f"{where}: this cluster asks for a token: set RAY_AUTH_MODE=token, and its token in "
                "RAY_AUTH_TOKEN or in a file that RAY_AUTH_TOKEN_PATH names"
            ) from None
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot reach or start Ray on {where}: {first}") from error
    now = ray.cluster_resources()
    later, nodes = autoscaled(LAUNCHER_CONFIG) if address is not None else ({}, 0)
    most = {name: max(now.get(name, 0.0), later.get(name, 0.0)) for name in ("CPU", "GPU")}
    alive = sum(node["Alive"] for node in ray.nodes())
    url = context.dashboard_url
    return Cluster(f"http://{url}" if url else None, most["CPU"], most["GPU"], max(alive, nodes))


def autoscaled(launcher_config: Path) -> tuple[dict[str, float], int]:
    """The largest number of CPUs, GPUs and nodes that the launcher's config file allows a cluster.

    Ray has no call that returns this, and a cluster whose head has no GPU would look like one without GPUs.

    Returns:
        `{"CPU": …, "GPU": …}` and the number of nodes; `{}` and 0 if there is no such file.
    """
    if not launcher_config.is_file():
        return {}, 0
    config = yaml.safe_load(launcher_config.read_text())
    limit = int(config.get("max_workers", LAUNCHER_MAX_WORKERS))
    node_types = dict(config["available_node_types"])
    head = node_types.pop(config["head_node_type"])
    workers = [
        (node_type.get("resources", {}), min(int(node_type.get("max_workers", limit)), limit))
        for node_type in node_types.values()
    ]
    most = {}
    for name in ("CPU", "GPU"):
        of_each_node = sorted(
            (float(resources.get(name, 0)) for resources, count in workers for _ in range(count)),
            reverse=True,
        )
        most[name] = float(head.get("resources", {}).get(name, 0)) + sum(of_each_node[:limit])
    return most, 1 + min(limit, sum(count for _, count in workers))


def _check_answers(address: str) -> None:
    """Raises ConfigError if nothing answers at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto" or "local"
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS={address}: no Ray answers there ({error.strerror or error}); "
            "correct it, or unset it"
        ) from None
