"""The engine's actor: what it answers, what ends it, and that it never outlives its driver."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import ActorUnavailableError
from training_kit import values_of

from vlmtune.background import in_background
from vlmtune.data.store import Store
from vlmtune.errors import DoesNotFitError
from vlmtune.packed import build
from vlmtune.packed.engine_actor import EngineActor
from vlmtune.packed.messages import NOTES, TrialReport, UnknownTrialError
from vlmtune.packed.packed_trial import PackedTrial

pytestmark = pytest.mark.timeout(120)

STEPS = 4
REPORT = TrialReport({"step": 2}, last=False)
# Starts Ray and an engine that trains one trial, and waits to be killed.
DRIVER = """
import pickle, sys, time
from vlmtune.cluster import connect
from vlmtune.packed.engine_actor import start_engines
values, store, folder = pickle.load(sys.stdin.buffer)
connect()
(engine,), _ = start_engines(values, store, count=1, trials=1, rank=8, gpu=False)
import ray
ray.get(engine.join.remote("one", values, folder + "/one", folder + "/runs"))
assert ray.get(engine.wait.remote("one", 0, 60.0)) is not None
print("training", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def values(stores: dict[str, Store], models: Path) -> dict[str, Any]:
    return values_of(stores["mall llava"], models / "llava", max_steps=STEPS, eval_steps=2)


@pytest.fixture
def actor(values: dict[str, Any], stores: dict[str, Store], one_thread: None) -> EngineActor:
    return EngineActor(values, stores["mall llava"], 2, 8)


def reports(actor: EngineActor, name: str) -> Iterator[dict[str, Any]]:
    number, last = 0, False
    while not last:
        found = actor.wait(name, number, 30.0)
        assert found is not None
        metrics, last = found
        number += 1
        yield metrics


def test_a_trial_joins_once_reports_in_order_and_can_be_asked_again(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UnknownTrialError):
        actor.wait("one", 0, 0.1)
    for _ in range(2):  # Ray may repeat a call
        actor.join("one", values, str(tmp_path / "one"), str(tmp_path / "runs"))
    found = list(reports(actor, "one"))
    assert [metrics["step"] for metrics in found] == [2, STEPS]
    assert [metrics["step"] for metrics in reports(actor, "one")] == [2, STEPS]
    actor.leave("one")
    with pytest.raises(UnknownTrialError):
        actor.wait("one", 0, 0.1)
    actor.join("one", values, str(tmp_path / "one"), str(tmp_path / "runs"))
    (last,) = reports(actor, "one")  # it had ended: its last checkpoint says how
    assert last["eval_loss"] == found[-1]["eval_loss"]


def test_the_search_has_a_moment_to_stop_trials(actor: EngineActor) -> None:
    actor.engine = engine = SimpleNamespace(slots=dict.fromkeys(("one", "two", "gone")), round_seconds=60.0)  # type: ignore[assignment]
    actor.reports, actor.taken = (
        {"one": [REPORT], "two": [REPORT], "gone": [REPORT]},
        {"one": 0, "two": 0, "gone": 1},
    )
    actor.training = in_background(partial(actor._let_the_search_decide, engine), "training")  # type: ignore[arg-type]
    actor.wait("one", 1, 0.0)
    assert not actor._stopped(), "nothing is known of the other"
    actor.leave("two")
    actor.training.result(10)
    actor.reports["gone"], actor.taken["gone"] = [REPORT, REPORT], 0
    actor._let_the_search_decide(engine)  # type: ignore[arg-type]  # it is parked, so there are no rows of it to wait for
    engine.round_seconds, actor.taken["one"] = 0.2, 0
    started = time.monotonic()
    actor._let_the_search_decide(engine)  # type: ignore[arg-type]
    assert 0.03 < time.monotonic() - started < 10, "a sixth of it: half of the rows of one of three trials"


def test_what_an_engine_notes_comes_once_with_the_next_report(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path
) -> None:
    actor.start()
    assert actor.news() == actor.notes
    actor.notes.append("out of GPU memory with 8 rows at a time")
    actor.join("one", values, str(tmp_path / "one"), str(tmp_path / "runs"))
    first, last = reports(actor, "one")
    assert first[NOTES] == ["out of GPU memory with 8 rows at a time"]
    assert NOTES not in last


def test_trials_without_memory_wait_for_those_that_have_some(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_step, most = build.plan_step, []

    def only_one_fits(*args: Any, packed: int, **options: Any) -> Any:
        if packed > 1:
            raise DoesNotFitError("injected")
        return plan_step(*args, packed=packed, **options)

    monkeypatch.setattr(build, "plan_step", only_one_fits)
    actor.start()
    assert actor.notes[-1] == "Memory    is there for 1 of 2 trials at once; the others wait"
    assert actor.engine is not None
    take_in = actor.engine.join
    monkeypatch.setattr(
        actor.engine, "join", lambda *args: (take_in(*args), most.append(len(actor.engine.slots)))
    )  # type: ignore[union-attr]
    for name in ("one", "two"):
        place = [name, values, str(tmp_path / name), str(tmp_path / "runs")]
        assert actor.room(name, 30.0) == (False, 1), "one that has ended leaves its place"
        assert actor.join(*place)
        assert not actor.join("three", *place[1:])
        assert actor.join(*place), "Ray may repeat a call"
        assert actor.room("three") == (False, 0)
        assert [metrics["step"] for metrics in reports(actor, name)] == [2, STEPS]
    assert most == [1, 1]


def test_trials_that_come_at_once_get_no_more_places_than_there_are(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path
) -> None:
    actor.start()
    names = [f"trial {number}" for number in range(6)]
    with ThreadPoolExecutor(len(names)) as threads:
        long = {**values, "max_steps": 1000}
        taken = list(
            threads.map(
                lambda name: actor.join(name, long, str(tmp_path / name), str(tmp_path / "runs")), names
            )
        )
    assert sum(taken) == 2
    here = [name for name, there in zip(names, taken, strict=True) if there]
    assert [actor.room(name) for name in here] == [(True, 0)] * 2
    for name in here:
        actor.leave(name)
    assert actor.room("another", 30.0) == (False, 2)


def test_without_memory_for_the_largest_trial_the_others_are_trained(
    values: dict[str, Any],
    stores: dict[str, Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:
    plan_step = build.plan_step

    def only_small_ones_fit(*args: Any, rank: int, **options: Any) -> Any:
        if rank > 8:
            raise DoesNotFitError("injected")
        return plan_step(*args, rank=rank, **options)

    monkeypatch.setattr(build, "plan_step", only_small_ones_fit)
    actor = EngineActor({**values, "lora_r": 8}, stores["mall llava"], 2, 512, {**values, "lora_r": 512})
    actor.join("one", values, str(tmp_path / "one"), str(tmp_path / "runs"))
    assert [metrics["step"] for metrics in reports(actor, "one")] == [2, STEPS]
    assert "not for the largest trial" in actor.notes[0]
    actor = EngineActor({**values, "lora_r": 512}, stores["mall llava"], 2, 512)
    for call in (
        actor.start,
        partial(actor.room, "one"),
    ):  # else it would look like the engine with most room
        with pytest.raises(DoesNotFitError):
            call()


def test_a_checkpoint_that_cannot_be_written_is_told_to_all(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    actor.join("one", {**values, "max_steps": 2}, str(tmp_path / "file" / "one"), str(tmp_path / "runs"))
    with pytest.raises(OSError, match="file"):
        list(reports(actor, "one"))
    with pytest.raises(OSError, match="file"):
        actor.join("two", values, str(tmp_path / "two"), str(tmp_path / "runs"))
    with pytest.raises(OSError, match="file"):  # else it would look like the engine with most room
        actor.room("two")


def test_a_trial_nobody_asked_for_has_to_join_again_and_goes_on(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**values, "max_steps": 8, "eval_steps": 1}
    actor.join("one", values, str(tmp_path / "one"), str(tmp_path / "runs"))
    assert actor.wait("one", 0, 30.0) is not None
    monkeypatch.setattr("vlmtune.packed.engine_actor.FORGOTTEN_AFTER", 0.0)
    with actor.changed:
        assert actor.changed.wait_for(lambda: "one" not in actor.reports, timeout=30)
    monkeypatch.undo()
    with pytest.raises(UnknownTrialError):
        actor.wait("one", 1, 0.1)
    actor.join("one", values, str(tmp_path / "one"), str(tmp_path / "runs"))
    steps = [metrics["step"] for metrics in reports(actor, "one")]
    assert steps == list(range(steps[0], 9)) and steps[0] > 1


@ray.remote
class Engine:
    """What a trial asks of an engine before it joins."""

    def __init__(self, room: int | None, seconds: float = 0) -> None:
        self.answer, self.seconds = room, seconds

    def room(self, trial_id: str, seconds: float = 0.0) -> tuple[bool, int]:
        time.sleep(self.seconds)
        if self.answer is None:
            raise OSError("its disk was full")
        return False, self.answer


@ray.remote
class Restarted:
    """An engine that came back empty: of its trial's reports the second one had no checkpoint yet."""

    def __init__(self) -> None:
        self.steps = [2, 4]

    def room(self, trial_id: str) -> tuple[bool, int]:
        return True, 1

    def join(self, *_: Any) -> bool:
        self.steps = [4, 6]
        return True

    def wait(self, trial_id: str, number: int, seconds: float) -> tuple[dict[str, Any], bool]:
        if number >= len(self.steps):
            raise UnknownTrialError(trial_id)
        return {"step": self.steps[number]}, self.steps[number] == 6


def test_a_report_that_comes_once_more_is_passed_over() -> None:
    ray.init(num_cpus=1, log_to_driver=False, logging_level="error")
    try:
        trial = object.__new__(PackedTrial)
        trial.name, trial.values, trial.output_dir, trial.failure, trial.missed = "one", {}, "out", None, 0.0
        trial.reported = trial.taken = 0
        trial.notes = []
        trial.engine = Restarted.options(num_cpus=0).remote()  # type: ignore[attr-defined]
        trial.engines = [trial.engine]
        assert [trial.step() for _ in range(3)] == [
            {"step": 2, "done": False},
            {"step": 4, "done": False},
            {"step": 6, "done": True},
        ]
    finally:
        ray.shutdown()


def test_a_trial_joins_an_engine_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.packed.packed_trial.WAIT", 3.0)
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error")
    try:
        trial = object.__new__(PackedTrial)
        full, roomy, ended, slow = (
            Engine.options(num_cpus=0).remote(*given) for given in ((1,), (2,), (None,), (9, 60))
        )  # type: ignore[attr-defined]
        gone = Engine.options(num_cpus=0, resources={"no such node": 1}).remote(9)  # type: ignore[attr-defined]
        ray.wait(
            [engine.room.remote("one") for engine in (full, roomy, ended)], num_returns=3
        )  # their processes have started
        trial.name, trial.engines = "one", [full, gone, ended, roomy, slow]
        assert trial._roomiest() == roomy
        trial.engines = [Engine.options(num_cpus=0).remote(0), gone]  # type: ignore[attr-defined]
        assert trial._roomiest() is None
        trial.engines = [ended, gone]
        with pytest.raises(OSError, match="its disk was full"):
            trial._roomiest()
        trial.engines = [gone]
        with pytest.raises(ActorUnavailableError):
            trial._roomiest()
    finally:
        ray.shutdown()


def test_a_trial_waits_for_a_place_where_all_are_taken(
    values: dict[str, Any], stores: dict[str, Store], tmp_path: Path
) -> None:
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error")
    try:
        engine: Any = (
            ray.remote(EngineActor)
            .options(num_cpus=1, max_concurrency=16)
            .remote(values, stores["mall llava"], 1, 8)
        )
        ray.get(engine.start.remote())

        def steps(name: str) -> list[int]:
            trial = object.__new__(PackedTrial)
            trial.shared, trial.engines, trial.output_dir, trial.point_key = (
                values,
                [engine],
                str(tmp_path),
                "",
            )
            trial._trial_info = SimpleNamespace(trial_id=name)  # type: ignore[assignment]
            trial._begin({})
            found = [trial.step()]
            while not found[-1]["done"]:
                found.append(trial.step())
            trial.cleanup()
            return [report["step"] for report in found]

        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(steps, ["one", "two", "three"])) == [[2, STEPS]] * 3
    finally:
        ray.shutdown()


@pytest.mark.heavy
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_engine_outlives_its_driver(
    values: dict[str, Any], stores: dict[str, Store], tmp_path: Path, how: signal.Signals
) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert driver.stdin is not None
    assert driver.stdout is not None
    try:
        long = {**values, "max_steps": 10_000, "eval_steps": 2}
        driver.stdin.write(pickle.dumps((long, stores["mall llava"], str(tmp_path))))
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
