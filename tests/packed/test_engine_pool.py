"""Engines end with the process that started them, however it ends."""

import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import psutil
import pytest
import ray
from training_kit import values_of

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.packed.engine_pool import start_engines
from vlmtune.packed.messages import TrialRequest

pytestmark = pytest.mark.timeout(280)

# Starts Ray and an engine that trains one trial, and waits to be killed.
DRIVER = """
import pickle, sys, time
import ray
from vlmtune.cluster import connect
from vlmtune.config.settings import Settings
from vlmtune.packed.engine_pool import start_engines
from vlmtune.packed.messages import TrialRequest
values, store, folder = pickle.load(sys.stdin.buffer)
settings = Settings.from_flags(values)
connect()
(engine,), _ = start_engines(settings, store, count=1, trials=1, max_lora_rank=8, gpu=False)
ray.get(engine.join.remote(TrialRequest("one", settings, folder + "/one", folder + "/runs")))
assert ray.get(engine.wait_for_report.remote("one", 0, 60.0)) is not None
print("training", flush=True)
time.sleep(1000)
"""


@pytest.mark.heavy
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_engine_outlives_its_driver(
    stores: dict[str, Store], models: Path, tmp_path: Path, how: signal.Signals
) -> None:
    values = values_of(stores["mall llava"], models / "llava", max_steps=10_000, eval_steps=2)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert driver.stdin is not None
    assert driver.stdout is not None
    try:
        driver.stdin.write(pickle.dumps((values, stores["mall llava"], str(tmp_path))))
        driver.stdin.close()
        while driver.stdout.readline() not in (b"training\n", b""):
            pass
        started = psutil.Process(driver.pid).children(recursive=True)
        engines = [process for process in started if "ray::EngineActor" in " ".join(process.cmdline())]
        assert len(engines) == 1
    finally:
        os.kill(driver.pid, how)
        driver.wait()
    left = psutil.wait_procs(engines, timeout=40)[1]
    for process in psutil.wait_procs(started, timeout=1)[1]:  # Ray's own take longer
        process.kill()
    assert left == []


def kill_the_first_engine(killed: list[int]) -> None:
    """SIGKILL the first engine's process in the middle of `start`, which Ray shows in its title."""
    while not killed:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith("ray::EngineActor.start"):
                    process.kill()
                    killed.append(process.pid)
        time.sleep(0.05)


@pytest.mark.heavy
def test_an_engine_that_dies_while_it_starts_is_started_again_by_a_trial(
    stores: dict[str, Store], models: Path, tmp_path: Path
) -> None:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    killed: list[int] = []
    killer = Thread(target=kill_the_first_engine, args=(killed,))
    try:
        values = values_of(stores["mall llava"], models / "llava", max_steps=4, eval_steps=2)
        settings = Settings.from_flags(values)
        killer.start()
        (engine,), notes = start_engines(
            settings, stores["mall llava"], count=1, trials=1, max_lora_rank=8, gpu=False
        )
        assert killed
        assert "died while it started" in " ".join(notes)
        request = TrialRequest("one", settings, f"{tmp_path}/one", f"{tmp_path}/runs")
        assert ray.get(engine.join.options(max_task_retries=3).remote(request))
        assert ray.get(engine.wait_for_report.remote("one", 0, 60.0)) is not None
    finally:
        killed.append(0)
        killer.join()
        ray.shutdown()
