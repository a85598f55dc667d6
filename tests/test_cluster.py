"""Joining or starting Ray, and what fits on a cluster."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from vlmtune.cluster import (
    READ_CPUS,
    WORKER_CPUS,
    Cluster,
    autoscaled,
    connect,
    in_ray_job,
)
from vlmtune.errors import ResourceError

LAPTOP = Cluster(dashboard=None, cpus=2, gpus=0, nodes=1)
SERVER = Cluster(dashboard=None, cpus=64, gpus=8, nodes=1)


def test_a_ray_job_is_known_by_what_ray_itself_reads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(RAY_JOB_CONFIG_JSON_ENV_VAR, raising=False)
    assert not in_ray_job()
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    assert in_ray_job()


def test_workers_use_gpus_where_there_are_some():
    assert SERVER.workers_use_gpu(use_cpu=False)
    assert not SERVER.workers_use_gpu(use_cpu=True)
    assert not LAPTOP.workers_use_gpu(use_cpu=False)


def test_four_workers_and_what_reads_for_them_fit_on_two_cpus():
    LAPTOP.check_workers(4, use_cpu=False)
    assert 4 * WORKER_CPUS + READ_CPUS <= 2
    SERVER.check_workers(8, use_cpu=False)
    SERVER.check_workers(100, use_cpu=True)


@pytest.mark.parametrize(
    ("cluster", "workers", "message"),
    [
        (LAPTOP, 5, r"^--num_workers 5: this cluster's 2 CPUs have room for 4$"),
        (SERVER, 9, r"^--num_workers 9: one GPU each is needed, and this cluster has 8$"),
        (
            Cluster(None, cpus=0.5, gpus=8, nodes=1),
            1,
            r"^--num_workers 1: this cluster's 0.5 CPUs have room for 0$",
        ),
    ],
)
def test_too_many_workers_are_refused(cluster: Cluster, workers: int, message: str):
    with pytest.raises(ResourceError, match=message):
        cluster.check_workers(workers, use_cpu=False)


def test_a_run_takes_no_more_gpus_than_it_may() -> None:
    limited = SERVER.limited_to(2)
    assert (limited.gpus, limited.cpus) == (2, 64)
    assert limited.fitting_trials(1, use_cpu=False) == 2
    with pytest.raises(ResourceError, match=r"^--num_workers 3: .* needed, and --gpus allows 2$"):
        limited.check_workers(3, use_cpu=False)
    assert SERVER.limited_to(None) is SERVER
    assert SERVER.limited_to(100).gpus == 8


@pytest.mark.parametrize(
    ("cluster", "workers", "trials"),
    [(LAPTOP, 1, 2), (LAPTOP, 4, 1), (SERVER, 1, 8), (SERVER, 2, 4), (SERVER, 16, 1)],
)
def test_fitting_trials(cluster: Cluster, workers: int, trials: int):
    assert cluster.fitting_trials(workers, use_cpu=False) == trials


@pytest.mark.timeout(120)
def test_connect_starts_a_ray_and_finds_it_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        cluster = connect()
        assert cluster.cpus == os.cpu_count()
        assert cluster.nodes == 1
        assert cluster.dashboard is not None
        assert cluster.dashboard.startswith("http://")
        assert connect() == cluster

        @ray.remote
        def work() -> None: ...

        ray.get(work.remote())  # a worker listens too
        addresses = listening_addresses()
        assert len(addresses) >= 5, "GCS, raylet, dashboard, agents, worker"
        assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
        temp_dir = Path(os.environ["RAY_TMPDIR"])
        assert stat.S_IMODE(temp_dir.stat().st_mode) == 0o700, "Ray makes its own folders 0777"
        token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
    finally:
        ray.shutdown()


def listening_addresses() -> list[str]:
    """Where this process and all that it has started wait for connections."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    connections = [one for process in processes for one in process.net_connections("inet")]
    return [one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN]


def test_nodes_that_may_come_count(tmp_path: Path):
    most, nodes = autoscaled(Path(__file__).parents[1] / "cluster.yaml")
    assert most == {"CPU": 8 + 8 * 8, "GPU": 8}  # of 8 on spot and 4 on demand, 8 at once
    assert nodes == 9
    assert autoscaled(tmp_path / "none") == ({}, 0)


@pytest.mark.timeout(120)
def test_an_address_where_no_ray_answers_is_one_plain_line():
    program = """
from vlmtune.cluster import connect
from vlmtune.errors import plain_user_errors
with plain_user_errors():
    connect()
"""
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: RAY_ADDRESS=127.0.0.1:1: no Ray answers there (Connection refused)")
    )
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
