"""What is written to an S3-compatible object store, and a search that is killed and resumed there.

`make test-object-store` installs moto's server and runs it: moto asks for an older python-dateutil than the
one that vlmtune is tested with, so it is in no extra.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from command_kit import STEPS, Search

from vlmtune import storage
from vlmtune.checksums import damaged_file
from vlmtune.errors import ConfigError
from vlmtune.folder_lock import LEASE_S, FolderLock
from vlmtune.packed.checkpoint_folder import read_last_report, write_checkpoint

moto = pytest.importorskip("moto.server", reason="needs moto: make test-object-store")
pytestmark = [pytest.mark.heavy, pytest.mark.timeout(2400)]

KEY, SECRET = "AKIAOFTHETEST", "secret-of-the-test"


@pytest.fixture
def store() -> Iterator[dict[str, str]]:
    """The environment of processes that use the server."""
    server = moto.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        storage._service.cache_clear()
        files, _ = pafs.FileSystem.from_uri("s3://runs?allow_bucket_creation=true")
        files.create_dir("runs")
        yield environment
    storage._service.cache_clear()
    server.stop()


def test_locks_and_checkpoints_in_an_object_store(store: dict[str, str]) -> None:
    lock = FolderLock("s3://runs/out")
    lock.acquire()
    with pytest.raises(
        ConfigError, match=r"--output_dir s3://runs/out: process \d+ on .* is writing into it"
    ):
        FolderLock("s3://runs/out").acquire()
    lock.release()
    FolderLock("s3://runs/out").acquire()

    def write(folder: Path) -> None:
        (folder / "adapter").write_bytes(bytes(100))

    for step in (5, 10, 15):
        write_checkpoint(write, f"s3://runs/trial/checkpoint-{step}", {"step": step, "max_steps": 20})
    files, inner = storage.filesystem("s3://runs/trial")
    kept = [entry.base_name for entry in files.get_file_info(pafs.FileSelector(inner))]
    assert sorted(kept) == ["checkpoint-10", "checkpoint-15"]
    assert (read_last_report("s3://runs/trial") or {})["step"] == 15
    with files.open_output_stream(f"{inner}/checkpoint-15/adapter") as stream:
        stream.write(b"cut")
    lines: list[str] = []
    assert (read_last_report("s3://runs/trial", lines.append) or {})["step"] == 10
    assert lines == ["runs/trial/checkpoint-15/adapter is damaged: the checkpoint before step 15 is used"]


def test_a_search_is_killed_and_resumed_in_an_object_store(
    store: dict[str, str], models: Path, mall: Path, tmp_path: Path
) -> None:
    search = Search(models, mall, tmp_path, "packed")
    search.environment |= store
    folder = "s3://runs/deep/search"
    files, inner = storage.filesystem(folder)

    def whole_checkpoints() -> int:
        found = files.get_file_info(
            pafs.FileSelector(f"{inner}/tune/train", recursive=True, allow_not_found=True)
        )
        return sum(entry.base_name == "report.json" for entry in found)

    killed = search.command("--config", str(search.config), "--output_dir", folder)
    killed.wait_until(lambda: whole_checkpoints() >= 2)
    second = search.command("--resume", folder)
    assert second.end() == 2
    assert "is writing into it; wait for its end" in second.stderr
    killed.process.send_signal(signal.SIGKILL)
    killed.end()
    assert not storage.exists(f"{folder}/trials.parquet")

    resumed = search.command(
        "--resume", folder
    )  # its owner ran on this machine and is dead: no lease to wait for
    assert (resumed.end(), resumed.stderr) == (0, ""), f"within {LEASE_S} s"
    with files.open_input_file(f"{inner}/trials.parquet") as table:
        rows = pq.read_table(table).to_pylist()
    assert [(row["state"], row["steps"]) for row in rows] == [("COMPLETE", STEPS["packed"])] * 3
    kept = files.get_file_info(pafs.FileSelector(f"{inner}/tune/train", recursive=True))
    checkpoints = [entry.path for entry in kept if entry.base_name.startswith("checkpoint-")]
    assert checkpoints and all(damaged_file(files, path) is None for path in checkpoints)
    assert not [entry.path for entry in kept if entry.base_name.endswith(storage.PART)]

    undisturbed = search.start(out=tmp_path / "undisturbed")
    assert undisturbed.end() == 0
    expected = search.results(tmp_path / "undisturbed")
    assert {row["learning_rate"]: row["eval_loss"] for row in rows} == {
        rate: pytest.approx(loss, rel=1e-6) for rate, (_, loss, _) in expected.items()
    }
    for path in [*search.logs.iterdir(), *search.config.parent.rglob("*.parquet")]:
        assert SECRET.encode() not in path.read_bytes()
