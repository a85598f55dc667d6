"""A trial's side of the engines: which one it joins, and how it joins again after one has restarted."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError
from training_kit import values_of

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError
from vlmtune.packed.engine_actor import EngineActor
from vlmtune.packed.engine_client import EngineClient
from vlmtune.packed.messages import NOTES, Availability, TrialReport, TrialRequest, UnknownTrialError

pytestmark = pytest.mark.timeout(120)

STEPS = 4


@pytest.fixture(scope="module")
def cluster(stores: dict[str, Store]) -> Iterator[None]:
    """A Ray of two CPUs, whatever the machine has. After `stores`, which starts and ends one of its own."""
    ray.init("local", num_cpus=2, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
def values(stores: dict[str, Store], models: Path) -> dict[str, Any]:
    return values_of(stores["mall llava"], models / "llava", max_steps=STEPS, eval_steps=2)


@pytest.fixture
def engine(cluster: None, values: dict[str, Any], stores: dict[str, Store]) -> Iterator[Any]:
    """A real engine with one place."""
    remote: Any = ray.remote(EngineActor)
    options = {"num_cpus": 1, "max_concurrency": 16, "max_restarts": 2}
    handle = remote.options(**options).remote(Settings.from_flags(values), stores["mall llava"], 1, 8)
    ray.get(handle.start.remote())
    yield handle
    ray.kill(handle, no_restart=True)


def client_of(engines: list[Any], name: str = "one", folder: str = "out", **values: Any) -> EngineClient:
    request = TrialRequest(name, Settings.from_flags(values), f"{folder}/{name}", f"{folder}/runs")
    return EngineClient(engines, name, lambda engine: engine.join.remote(request))


def read_all(client: EngineClient) -> list[TrialReport]:
    reports = [client.read_report()]
    while not reports[-1].final:
        reports.append(client.read_report())
    return reports


def steps_of(reports: list[TrialReport]) -> list[int]:
    return [report.metrics["step"] for report in reports]


@ray.remote
class Choice:
    """What an engine says of its free places."""

    def __init__(self, free_slots: int | None, seconds: float = 0) -> None:
        self.free_slots, self.seconds = free_slots, seconds

    def check_availability(self, trial_id: str, wait_s: float = 0.0) -> Availability:
        time.sleep(self.seconds)
        if self.free_slots is None:
            raise OSError("its disk was full")
        return Availability(False, self.free_slots)


@ray.remote
class Restarted:
    """An engine that came back empty: the second report of its trial had no checkpoint yet."""

    def __init__(self) -> None:
        self.steps = [2, 4]

    def check_availability(self, trial_id: str) -> Availability:
        return Availability(False, 1)

    def join(self, request: TrialRequest) -> bool:
        self.steps = [4, 6] if self.steps == [] else self.steps
        return True

    def wait_for_report(self, trial_id: str, number: int, wait_s: float) -> TrialReport:
        if number >= len(self.steps):
            self.steps = []
            raise UnknownTrialError(trial_id)
        step = self.steps[number]
        return TrialReport({"step": step, NOTES: [f"noted at {step}"]}, final=step == 6)


def test_a_report_that_comes_again_is_skipped_but_not_its_notes(cluster: None) -> None:
    reports = read_all(client_of([Restarted.options(num_cpus=0).remote()]))  # type: ignore[attr-defined]
    assert steps_of(reports) == [2, 4, 6]
    assert [report.metrics[NOTES] for report in reports] == [
        ["noted at 2"],
        ["noted at 4"],
        ["noted at 4", "noted at 6"],
    ]


def test_a_trial_joins_the_engine_with_most_places_that_answers(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmtune.packed.engine_client.CALL_WAIT_S", 3.0)
    engines = [Choice.options(num_cpus=0).remote(*given) for given in ((1,), (2,), (None,), (9, 60))]  # type: ignore[attr-defined]
    full, roomy, failed, slow = engines
    gone = Choice.options(num_cpus=0, resources={"no such node": 1}).remote(9)  # type: ignore[attr-defined]
    # Their processes have started then.
    ray.wait([engine.check_availability.remote("one") for engine in (full, roomy, failed)], num_returns=3)
    assert client_of([full, gone, failed, roomy, slow])._choose_engine() == roomy
    assert client_of([Choice.options(num_cpus=0).remote(0), gone])._choose_engine() is None  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="its disk was full"):
        client_of([failed, gone])._choose_engine()
    with pytest.raises(ActorUnavailableError):
        client_of([gone])._choose_engine()


def test_trials_wait_for_a_place_where_all_are_taken(
    engine: Any, values: dict[str, Any], tmp_path: Path
) -> None:
    def steps(name: str) -> list[int]:
        client = client_of([engine], name, str(tmp_path), **values)
        reports = read_all(client)
        client.leave()
        return steps_of(reports)

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(steps, ["one", "two", "three"])) == [[2, STEPS]] * 3


def test_a_trial_joins_again_after_its_engine_was_killed(
    engine: Any, values: dict[str, Any], tmp_path: Path
) -> None:
    long = {**values, "max_steps": 30}
    client = client_of([engine], "one", str(tmp_path), **long)
    before = [client.read_report(), client.read_report()]
    pid = ray.get(engine.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    after = read_all(client)
    assert steps_of(before + after) == list(range(2, 31, 2)), "each report once, in order"
    assert ray.get(engine.__ray_call__.remote(lambda _: os.getpid())) != pid


def test_a_trial_that_cannot_be_trained_raises_its_own_error(
    engine: Any, values: dict[str, Any], tmp_path: Path
) -> None:
    client = client_of([engine], "dora", str(tmp_path), **{**values, "use_dora": True})
    with pytest.raises(ConfigError, match="cannot train use_dora") as caught:
        client.read_report()
    assert type(caught.value) is ConfigError
