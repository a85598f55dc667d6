"""A packed trial as Tune sees it."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError, DataError
from vlmtune.packed.engine_client import EngineClient
from vlmtune.packed.messages import FAILURE, TRIAL_ID, VALUES, TrialReport
from vlmtune.packed.packed_trial import PackedTrial

UNMEASURED = {"mae": math.nan, "seconds": math.nan}  # equal to another dict with the same NaN


def config_of(values: dict[str, Any]) -> dict[str, Any]:
    return {VALUES: values, TRIAL_ID: "one"}


def make_trial(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, read: Callable[[], Any]
) -> PackedTrial:
    """A trial without a Tune session, whose client reads reports from `read`."""
    monkeypatch.setattr(EngineClient, "read_report", lambda self: read())
    trial = object.__new__(PackedTrial)
    settings = Settings.from_flags({"metric": "mae", "more_metrics": ["seconds"], "lora_r": 8})
    trial.setup(config_of(config), settings=settings, output_dir="out")
    return trial


def test_a_step_is_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = iter([TrialReport({"step": 2}, final=False), TrialReport({"step": 4}, final=True)])
    trial = make_trial({"lora_r": 2}, monkeypatch, lambda: next(reports))
    assert [trial.step(), trial.step()] == [
        {"step": 2, "done": False, **UNMEASURED},
        {"step": 4, "done": True, **UNMEASURED},
    ]
    assert trial.client is not None
    engine: Any = SimpleNamespace(join=SimpleNamespace(remote=lambda request: request))
    request = trial.client.join(engine)
    assert (request.settings.search.metric, request.settings.lora.r) == ("mae", 2)
    assert (request.folder, request.runs_dir) == ("out/tune/train/one", "out/runs/one")


def test_a_trial_that_cannot_be_trained_reports_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> TrialReport:
        raise ConfigError("cannot train use_dora")

    trial = make_trial({}, monkeypatch, refuse)
    report = trial.step()
    assert report[FAILURE] == "cannot train use_dora"
    assert report["done"]
    assert math.isnan(report["mae"]) and math.isnan(report["seconds"])
    trial.reset_config(config_of({}))
    assert trial.failure is None


def test_a_searched_value_that_is_not_allowed_fails_the_trial_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = make_trial({"lora_r": 0.5}, monkeypatch, lambda: TrialReport({"step": 2}, final=True))
    assert "lora_r" in trial.step()[FAILURE]
    trial.reset_config(config_of({"lora_r": 4}))
    assert trial.step() == {"step": 2, "done": True, **UNMEASURED}


def test_an_engine_whose_training_fails_fails_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's exception is a UserError too where its cause is one."""

    def fail() -> TrialReport:
        raise RayTaskError("train", "traceback", DataError("a row is gone")).as_instanceof_cause()

    with pytest.raises(RayTaskError) as caught:
        make_trial({}, monkeypatch, fail).step()
    assert isinstance(caught.value, DataError)
