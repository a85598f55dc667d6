"""The cluster form of the main job: a Ray head of our own with its token, and `ray job submit`."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.timeout(900)  # Ray starts, and uploads the repository for each job


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a Ray head with two CPUs, and the environment of a shell that may use it."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {
        **kept,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
    }
    subprocess.run(["ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    port, dashboard, client, agent = free_ports(4)
    with tempfile.TemporaryDirectory(
        prefix="ray", dir="/tmp", ignore_cleanup_errors=True
    ) as temporary:  # sockets have short names only
        started = subprocess.Popen(
            [
                *(
                    "ray",
                    "start",
                    "--head",
                    "--block",
                    "--num-cpus",
                    "2",
                    "--object-store-memory",
                    str(2**29),
                    "--temp-dir",
                    temporary,
                ),
                *(
                    "--port",
                    str(port),
                    "--dashboard-port",
                    str(dashboard),
                    "--ray-client-server-port",
                    str(client),
                ),
                *("--dashboard-agent-listen-port", str(agent), "--include-dashboard", "true"),
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{dashboard}"
            wait_for(address)
            yield address, environment
        finally:
            stop(psutil.Process(started.pid))
            started.wait()


def stop(process: psutil.Process) -> None:
    """End a process and all that it has started."""
    family = [*process.children(recursive=True), process]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    for one in psutil.wait_procs(family, timeout=8)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def wait_for(address: str) -> None:
    """Until the head answers: it asks for a token then."""
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5)
        except urllib.error.HTTPError as error:
            assert error.code == 401
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no Ray head at {address}")


def submit(head: tuple[str, dict[str, str]], *arguments: str) -> subprocess.CompletedProcess[str]:
    address, environment = head
    job = [
        "ray",
        "job",
        "submit",
        "--address",
        address,
        "--working-dir",
        ".",
        "--",
        "python",
        "ray_jobs/tune.py",
        *arguments,
    ]
    return subprocess.run(job, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_without_the_token_nothing_is_run(head: tuple[str, dict[str, str]]) -> None:
    address, environment = head
    stranger = {**environment, "RAY_AUTH_TOKEN": "not-the-token"}
    refused = submit((address, stranger), "--config", "configs/demo.yaml")
    assert refused.returncode != 0
    assert "AuthenticationError" in refused.stderr


def test_a_relative_output_folder_is_refused_inside_a_job(
    head: tuple[str, dict[str, str]], models: Path, mall: Path
) -> None:
    job = submit(
        head,
        "--config",
        "configs/demo.yaml",
        "--data_path",
        str(mall),
        "--model_name_or_path",
        str(models / "llava"),
    )
    printed = job.stdout + job.stderr
    assert job.returncode == 1
    assert "error: --output_dir out/demo: inside a Ray job give an absolute path or a URI" in printed
    assert "exit code 2" in printed
    assert "Traceback" not in printed.split("error: --output_dir")[0]


def test_the_demo_runs_as_a_job(
    head: tuple[str, dict[str, str]], models: Path, mall: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # The demo's own files are ignored by git, and Ray uploads no file that git ignores.
    paths = [
        "--data_path",
        str(mall),
        "--model_name_or_path",
        str(models / "llava"),
        "--output_dir",
        str(out),
    ]
    job = submit(head, "--config", "configs/demo.yaml", *paths, "--num_samples", "2", "--max_steps", "2")
    printed = job.stdout + job.stderr
    assert job.returncode == 0, printed
    assert "succeeded" in printed
    assert f"Adapter   {out}/best" in printed
    rows = pq.read_table(out / "trials.parquet").to_pylist()
    assert len(rows) == 3, "two of the search, and the recipe beside them"
    assert rows[0]["state"] == "COMPLETE"
    assert {entry.name for entry in out.iterdir()} == {
        "best",
        "report.html",
        "trials.parquet",
        "search.yaml",
        "study.journal",
        "live.json",
        "test_predictions.parquet",
        "test_predictions.csv",
        "test_predictions.html",
        "runs",
        "tune",
    }
    assert (out / "best" / "adapter_model.safetensors").exists()
