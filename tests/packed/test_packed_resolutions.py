"""Trials of several image resolutions in one engine: each is as alone over the rows of its own resolution."""

from pathlib import Path
from typing import Any

import pytest
from packed_kit import Packed, make_engine
from resolution_kit import FEW, SOME, search_settings
from training_kit import difference
from transformers import AutoProcessor
from transformers.utils.import_utils import is_torchvision_available

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store

pytestmark = pytest.mark.skipif(not is_torchvision_available(), reason="Qwen's processor needs torchvision")


@pytest.fixture(scope="module")
def settings(models: Path, mall: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return search_settings(models, mall, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def store(stores: dict[str, Store]) -> Store:
    return stores["two resolutions"]


def run_in_one_engine(
    settings: Settings, store: Store, folder: Path, trials: dict[str, dict[str, Any]]
) -> Packed:
    """Train trials over one base to their end."""
    packed = make_engine(settings.to_flags(), store, folder)
    for name, values in trials.items():
        packed.join(name, settings.replace(**values).to_flags())
    packed.run()
    packed.close()
    return packed


@pytest.mark.usefixtures("one_thread")
def test_trials_of_two_resolutions_in_one_engine_are_as_alone(
    settings: Settings, store: Store, tmp_path: Path
):
    trials = {"few": {"max_pixels": FEW, "lora_r": 2}, "some": {"max_pixels": SOME, "metric": "eval_loss"}}
    together = run_in_one_engine(settings, store, tmp_path / "together", trials)
    for name, values in trials.items():
        own = settings.replace(**values)
        alone = run_in_one_engine(
            own, Store(store.at(own.model.resolution).folder), tmp_path / name, {name: {}}
        )
        found, expected = (
            [report.metrics["eval_loss"] for report in one.reports[name]] for one in (together, alone)
        )
        assert found == pytest.approx(expected, rel=1e-6)
        assert difference(together.adapter(name), alone.adapter(name)) < 1e-5
        checkpoint = together.reports[name][-1].metrics["checkpoint_path"]
        saved: Any = AutoProcessor.from_pretrained(checkpoint)
        assert dict(saved.image_processor.size)["longest_edge"] == values["max_pixels"]
    losses = [together.reports[name][-1].metrics["eval_loss"] for name in trials]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_answers_are_measured_at_the_trial_s_own_resolution(settings: Settings, store: Store, tmp_path: Path):
    metric = {"metric": "exact_match", "mode": "max", "metric_rows": 2, "max_new_tokens": 4, "max_steps": 2}
    by_answers = settings.replace(**metric)
    trials = {"few": {"max_pixels": FEW}, "some": {"max_pixels": SOME}}
    packed = run_in_one_engine(by_answers, store, tmp_path / "together", trials)
    for name, values in trials.items():
        own = by_answers.replace(**values)
        alone = run_in_one_engine(own, store.at(own.model.resolution), tmp_path / "alone", {name: {}})
        found, expected = (
            [report.metrics["exact_match"] for report in one.reports[name]] for one in (packed, alone)
        )
        assert found == expected
