"""The cluster form of the main job: a Ray head of our own with its token, and `ray job submit`."""

import ast
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
from typing import Any

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
    mine = ("RAY_worker_niceness",)  # for a machine with other work
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name in mine}
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
            yield address, {**environment, "GCS_ADDRESS": f"127.0.0.1:{port}"}
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
    assert len(rows) == 2, "so few trials have no recipe beside them"
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


def ask(head: tuple[str, dict[str, str]], expression: str) -> Any:
    """The value of an expression in a process that has joined the cluster."""
    program = (
        "import ray; ray.init(log_to_driver=False, logging_level='ERROR'); "
        "from ray.util.state import list_actors, list_placement_groups; "
        f"print('=', repr({expression}))"
    )
    environment = {**head[1], "RAY_ADDRESS": head[1]["GCS_ADDRESS"], "RAY_API_SERVER_ADDRESS": head[0]}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return ast.literal_eval(done.stdout.rpartition("= ")[2])


@pytest.fixture
def second_node(head: tuple[str, dict[str, str]]) -> Iterator[psutil.Process]:
    """The process of a second node of two CPUs, whose end is the node's."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        node = ("ray", "start", "--block", "--address", head[1]["GCS_ADDRESS"], "--num-cpus", "2")
        more = ("--object-store-memory", str(2**29), "--temp-dir", temporary)
        started = subprocess.Popen(
            [*node, *more],
            env=head[1],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + 120
            while ask(head, "ray.cluster_resources().get('CPU')") != 4.0:
                assert time.monotonic() < end
            yield psutil.Process(started.pid)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                stop(psutil.Process(started.pid))
            started.wait()


def node_search(models: Path, mall: Path, out: Path, steps: int) -> list[str]:
    """The arguments of a packed search of sixteen trials, which takes two engines."""
    flags = {
        "data_path": mall,
        "model_name_or_path": models / "llava",
        "output_dir": out,
        "storage_path": out.parent / "shared",
        "trial_runner": "packed",
        "quantization": "none",
        "lora_r": 4,
        "max_steps": steps,
        "eval_steps": 5,
        "per_device_train_batch_size": 2,
        "num_samples": 16,
        "early_stopping": "none",
        "report": "false",
        "recipe": "none",
        "confirm": "none",
        "search_space": '{"learning_rate": {"loguniform": [1e-4, 1e-2]}}',
    }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def start_job(head: tuple[str, dict[str, str]], name: str, arguments: list[str]) -> None:
    address, environment = head
    options = ["--address", address, "--working-dir", ".", "--no-wait", "--submission-id", name]
    job = ["ray", "job", "submit", *options, "--", "python", "ray_jobs/tune.py", *arguments]
    subprocess.run(job, cwd=ROOT, env=environment, capture_output=True, check=True)


def job_status(head: tuple[str, dict[str, str]], name: str) -> str:
    done = subprocess.run(
        ["ray", "job", "status", "--address", head[0], name],
        env=head[1],
        capture_output=True,
        text=True,
        check=True,
    )
    words = ("SUCCEEDED", "FAILED", "STOPPED", "RUNNING", "PENDING")
    return next(word for word in words if word in done.stdout.upper().replace("STATUS", ""))


def wait_for_reports(out: Path, count: int) -> None:
    end = time.monotonic() + 600
    while len(list(out.glob("tune/train/*/*/report.json"))) < count:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_node_ends_and_the_search_goes_on(
    head: tuple[str, dict[str, str]], second_node: psutil.Process, models: Path, mall: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    start_job(head, "loses-a-node", node_search(models, mall, out, 40))
    wait_for_reports(out, 17)
    for process in [*second_node.children(recursive=True), second_node]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    end = time.monotonic() + 800
    while (status := job_status(head, "loses-a-node")) in ("RUNNING", "PENDING"):
        assert time.monotonic() < end
        time.sleep(2)
    assert status == "SUCCEEDED"
    rows = pq.read_table(out / "trials.parquet").to_pylist()
    assert len({row["trial_id"] for row in rows}) == 16
    assert [(row["state"], row["steps"]) for row in rows] == [("COMPLETE", 40)] * 16


def test_a_stopped_job_frees_everything(
    head: tuple[str, dict[str, str]], models: Path, mall: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    start_job(head, "is-stopped", node_search(models, mall, out, 4000))
    wait_for_reports(out, 2)
    subprocess.run(
        ["ray", "job", "stop", "--address", head[0], "is-stopped"], env=head[1], check=True, timeout=120
    )
    assert job_status(head, "is-stopped") == "STOPPED"
    end, left = time.monotonic() + 60, None
    while left != (2.0, [], []) and time.monotonic() < end:
        left = ask(
            head,
            "(ray.available_resources().get('CPU'), "
            "[one.class_name for one in list_actors() if one.state == 'ALIVE' "
            "and one.class_name in ('EngineActor', 'ResourceTrainable', 'ImplicitFunc')], "
            "[one.state for one in list_placement_groups() if one.state != 'REMOVED'])",
        )
    assert left == (2.0, [], [])
