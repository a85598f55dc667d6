"""A Ray that dies ends its run in one line, soon, and with the command that resumes it."""

import signal
import subprocess
import sys

import psutil
import pytest

PROGRAM = """
import sys, time, ray
from vlmtune.compat.ray_node import control_processes
from vlmtune.ray_watch import RayWatch
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
watch = RayWatch("python ray_jobs/tune.py --resume /out")
watch.start()
print(control_processes()[sys.argv[1]], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["GCS", "raylet"])
def test_a_killed_ray_is_one_line(name: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        psutil.Process(int(process.stdout.readline())).send_signal(signal.SIGKILL)
        _, stderr = process.communicate(timeout=40)
    resume = "To resume: python ray_jobs/tune.py --resume /out"
    line = f"error: Ray's {name} has ended, and the run with it. {resume}\n"
    assert (process.returncode, stderr.endswith(line)) == (1, True)
    assert stderr == line
