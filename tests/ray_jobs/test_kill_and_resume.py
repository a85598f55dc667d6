"""A search through everything that ends a command, resumed after each: it ends as an undisturbed one."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_kit import Search

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3000)]


@pytest.fixture(params=["packed", "isolated"])
def search(request: pytest.FixtureRequest, models: Path, mall: Path, tmp_path: Path) -> Iterator[Search]:
    one = Search(models, mall, tmp_path, request.param)
    yield one
    one.close()


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
    with killed.training_suspended():
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
