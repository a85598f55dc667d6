"""The engine's actor: what it answers to trials, and what ends it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from training_kit import values_of

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import DoesNotFitError
from vlmtune.packed import build
from vlmtune.packed.engine_actor import EngineActor
from vlmtune.packed.messages import NOTES, Availability, TrialRequest, UnknownTrialError

pytestmark = pytest.mark.timeout(120)

STEPS = 4


@pytest.fixture
def values(stores: dict[str, Store], models: Path) -> dict[str, Any]:
    return values_of(stores["mall llava"], models / "llava", max_steps=STEPS, eval_steps=2)


@pytest.fixture
def actor(values: dict[str, Any], stores: dict[str, Store], one_thread: None) -> EngineActor:
    return EngineActor(Settings.from_flags(values), stores["mall llava"], 2, 8)


def request(name: str, values: dict[str, Any], folder: Path) -> TrialRequest:
    return TrialRequest(name, Settings.from_flags(values), str(folder / name), str(folder / "runs"))


def reports(actor: EngineActor, name: str) -> Iterator[dict[str, Any]]:
    number, last = 0, False
    while not last:
        report = actor.wait_for_report(name, number, 30.0)
        assert report is not None
        number, last = number + 1, report.final
        yield report.metrics


def test_a_trial_joins_once_reports_in_order_and_can_be_asked_again(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UnknownTrialError):
        actor.wait_for_report("one", 0, 0.1)
    for _ in range(2):  # Ray may repeat a call
        assert actor.join(request("one", values, tmp_path))
    first = list(reports(actor, "one"))
    assert [metrics["step"] for metrics in first] == [2, STEPS]
    assert [metrics["step"] for metrics in reports(actor, "one")] == [2, STEPS]
    actor.leave("one")
    with pytest.raises(UnknownTrialError):
        actor.wait_for_report("one", 0, 0.1)
    assert actor.join(request("one", values, tmp_path))
    (last,) = reports(actor, "one")  # it had ended: its last checkpoint says how
    assert last["eval_loss"] == first[-1]["eval_loss"]


def test_a_trial_that_leaves_while_it_trains_joins_again_from_its_checkpoint(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path
) -> None:
    long = {**values, "max_steps": 40}
    assert actor.join(request("one", long, tmp_path))
    assert actor.wait_for_report("one", 0, 30.0) is not None
    actor.leave("one")
    assert actor.check_availability("one", 30.0).free_slots == 2
    assert actor.join(request("one", long, tmp_path))
    steps = [metrics["step"] for metrics in reports(actor, "one")]
    assert steps == list(range(steps[0], 41, 2))
    assert steps[0] > 2


def test_what_an_engine_notes_comes_once_with_the_next_report(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path
) -> None:
    actor.start()
    assert actor.take_notes() == actor.notes.lines
    actor.notes.add("out of GPU memory with 8 rows at a time")
    actor.join(request("one", values, tmp_path))
    first, last = reports(actor, "one")
    assert first[NOTES] == ["out of GPU memory with 8 rows at a time"]
    assert NOTES not in last


def test_trials_without_memory_wait_for_those_that_have_some(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_step, most = build.plan_step, []

    def only_one_fits(*args: Any, packed_adapters: int, **options: Any) -> Any:
        if packed_adapters > 1:
            raise DoesNotFitError("injected")
        return plan_step(*args, packed_adapters=packed_adapters, **options)

    monkeypatch.setattr(build, "plan_step", only_one_fits)
    actor.start()
    assert actor.notes.lines[-1] == "Memory    fits 1 of 2 trials at once; the others wait"
    engine = actor.engine
    assert engine is not None
    join = engine.join
    monkeypatch.setattr(engine, "join", lambda slot: (join(slot), most.append(len(engine.slots))))
    for name in ("one", "two"):
        assert actor.check_availability(name, 30.0) == Availability(False, 1), (
            "one that has ended leaves its place"
        )
        assert actor.join(request(name, values, tmp_path))
        assert not actor.join(request("three", values, tmp_path))
        assert actor.join(request(name, values, tmp_path)), "Ray may repeat a call"
        assert actor.check_availability("three") == Availability(False, 0)
        assert [metrics["step"] for metrics in reports(actor, name)] == [2, STEPS]
    assert most == [1, 1]


def test_trials_that_come_at_once_get_no_more_places_than_there_are(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path
) -> None:
    actor.start()
    names = [f"trial {number}" for number in range(6)]
    long = {**values, "max_steps": 1000}
    with ThreadPoolExecutor(len(names)) as threads:
        joined = list(threads.map(lambda name: actor.join(request(name, long, tmp_path)), names))
    assert sum(joined) == 2
    seated = [name for name, has_joined in zip(names, joined, strict=True) if has_joined]
    assert [actor.check_availability(name) for name in seated] == [Availability(True, 0)] * 2
    for name in seated:
        actor.leave(name)
    assert actor.check_availability("another", 30.0) == Availability(False, 2)


def test_a_call_that_comes_twice_at_once_makes_one_trial(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path
) -> None:
    actor.start()
    with ThreadPoolExecutor(4) as threads:
        joined = list(threads.map(lambda _: actor.join(request("one", values, tmp_path)), range(4)))
    assert joined == [True] * 4
    assert actor.check_availability("one") == Availability(True, 1)
    assert [metrics["step"] for metrics in reports(actor, "one")] == [2, STEPS]


def test_without_memory_for_the_largest_trial_the_others_are_trained(
    values: dict[str, Any],
    stores: dict[str, Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:
    plan_step = build.plan_step

    def only_small_ones_fit(*args: Any, lora_rank: int, **options: Any) -> Any:
        if lora_rank > 8:
            raise DoesNotFitError("injected")
        return plan_step(*args, lora_rank=lora_rank, **options)

    monkeypatch.setattr(build, "plan_step", only_small_ones_fit)
    small, large = (Settings.from_flags({**values, "lora_r": lora_rank}) for lora_rank in (8, 512))
    actor = EngineActor(small, stores["mall llava"], 2, 512, large)
    actor.join(request("one", values, tmp_path))
    assert [metrics["step"] for metrics in reports(actor, "one")] == [2, STEPS]
    assert "the largest trial of the search space does not fit" in actor.notes.lines[0]
    actor = EngineActor(large, stores["mall llava"], 2, 512)
    for call in (actor.start, partial(actor.check_availability, "one")):
        with pytest.raises(DoesNotFitError):  # else it would look like the engine with the most free places
            call()


def test_every_trial_hears_of_a_checkpoint_that_cannot_be_written(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    one = request("one", {**values, "max_steps": 2}, tmp_path)
    actor.join(replace(one, folder=str(tmp_path / "file" / "one")))
    with pytest.raises(OSError, match="file"):
        list(reports(actor, "one"))
    with pytest.raises(OSError, match="file"):
        actor.join(request("two", values, tmp_path))
    with pytest.raises(OSError, match="file"):  # else it would look like the engine with the most free places
        actor.check_availability("two")


def test_an_abandoned_trial_has_to_join_again_and_resumes(
    actor: EngineActor, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**values, "max_steps": 8, "eval_steps": 1}
    actor.join(request("one", values, tmp_path))
    assert actor.wait_for_report("one", 0, 30.0) is not None
    monkeypatch.setattr("vlmtune.packed.trial_registry.ABANDONED_AFTER_S", 0.0)
    with actor.changed:
        assert actor.changed.wait_for(lambda: not actor.registry.can_be_polled("one"), timeout=30)
    monkeypatch.undo()
    with pytest.raises(UnknownTrialError):
        actor.wait_for_report("one", 1, 0.1)
    actor.join(request("one", values, tmp_path))
    steps = [metrics["step"] for metrics in reports(actor, "one")]
    assert steps == list(range(steps[0], 9)) and steps[0] > 1
