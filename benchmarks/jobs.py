"""Run a job by its command, and read the times of its events.

The times that Tune and metrics.json report are rounded or summed up.
"""

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def run_job(script: str, options: Mapping[str, str]) -> float:
    """Run `ray_jobs/script` with these options as flags; returns the seconds that it took.

    Its lines go to stderr, each with the seconds since its start.

    Raises:
        CalledProcessError: it ended with an error.
    """
    started = time.monotonic()
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, f"ray_jobs/{script}", *flags]
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=root
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{time.monotonic() - started:6.1f} s  {line}", end="", file=sys.stderr, flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.monotonic() - started


def event_times(folder: Path, tag: str) -> list[float]:
    """Seconds since 1970 of each value under `tag` in a run's TensorBoard events, in order."""
    times = []
    for file in sorted(folder.glob("events*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            # An event stands between two checksums of 4 bytes, after its size.
            size = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + size])
            times += [event.wall_time for value in event.summary.value if value.tag == tag]
            place += size + 16
    return sorted(times)
