"""Image resolution as a searched value: its stores, and whole searches."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from resolution_kit import FEW, SOME, SPACE, TOKEN, both_stores, search_settings
from search_kit import trial
from transformers import AutoProcessor
from transformers.utils.import_utils import is_torchvision_available

from vlmtune.config.settings import Settings
from vlmtune.data.cache import prepare_store
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, DataError
from vlmtune.evaluation.options import PredictOptions
from vlmtune.evaluation.predict import predict_rows
from vlmtune.image_resolution import ImageResolution
from vlmtune.preflight.inspection import inspect_data
from vlmtune.search.report.charts import ReportTrials, trade_off
from vlmtune.search.resolutions import (
    IMAGE_TOKENS,
    at_resolution_of,
    check_lengths,
    image_tokens_per_row,
    prepare_resolutions,
    resolution_lines,
    searched_resolutions,
)
from vlmtune.search.run_search import check_search, run_search
from vlmtune.search.space import Space
from vlmtune.search.trial_results import trials_table
from vlmtune.search.write_results import with_image_tokens

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not is_torchvision_available(), reason="Qwen's processor needs torchvision"),
]
OWN = 112 * 112  # the most pixels that the tiny model's processor gives by itself


@pytest.fixture(scope="module")
def settings(models: Path, mall: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return search_settings(models, mall, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def store(settings: Settings, machine: None) -> Store:
    """The rows at both resolutions."""
    return both_stores(settings)


def space_of(settings: Settings, **entries: Any) -> Space:
    return Space.parse(entries, settings)


def test_the_resolutions_of_a_search_are_its_values_and_the_config_s_own(settings: Settings):
    own = settings.replace(max_pixels=None)
    assert searched_resolutions(space_of(own, learning_rate={"choice": [1e-3]})) == [ImageResolution()]
    assert searched_resolutions(space_of(own, max_pixels={"choice": [FEW, SOME]})) == [
        ImageResolution(),
        ImageResolution(FEW),
        ImageResolution(SOME),
    ]
    assert searched_resolutions(space_of(own, max_pixels={"choice": [None, FEW]})) == [
        ImageResolution(),
        ImageResolution(FEW),
    ]
    both = space_of(
        settings,
        max_pixels={"choice": [FEW, SOME]},
        min_pixels={"expr": "max_pixels // 4"},
        lora_r={"choice": [4, 8]},
    )
    limits = [ImageResolution(SOME), ImageResolution(FEW, TOKEN), ImageResolution(SOME, SOME // 4)]
    assert searched_resolutions(both) == limits
    assert searched_resolutions(space_of(own, max_pixels=FEW, lora_r={"choice": [4, 8]})) == [
        ImageResolution(FEW)
    ], "a constant"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"max_pixels": {"quniform": [784, 7840, 784]}}, "max_pixels: the rows are prepared for each value"),
        (
            {"max_pixels": {"expr": "784 * lora_r"}, "lora_r": {"choice": [4, 8]}},
            "max_pixels: must not follow from lora_r",
        ),
        ({"max_pixels": {"choice": [0]}}, "at least 1"),
        (
            {"max_pixels": {"choice": [FEW]}, "min_pixels": {"choice": [SOME]}},
            "is more than max_pixels",
        ),
    ],
)
def test_a_space_with_any_resolution_is_refused_before_anything_is_prepared(
    settings: Settings, entries: dict[str, Any], words: str
):
    with pytest.raises(ConfigError, match=words):
        check_search(settings.replace(search_space=entries))


def test_rows_have_the_same_split_and_labels_at_every_resolution(settings: Settings, store: Store):
    few, some = store.at(ImageResolution(FEW)), store.at(ImageResolution(SOME))
    assert some is store and store.resolutions == (some, few) and store.largest is some
    for name in ("fragment", "number", "split", "group", "answer_tokens"):
        assert few.column(name).tolist() == some.column(name).tolist()
    assert image_tokens_per_row(few) <= 4 < image_tokens_per_row(some) <= 9
    rows = range(store.meta.rows)
    for one, other in zip(few.read(rows), some.read(rows), strict=True):
        assert one.labels[one.labels >= 0].tolist() == other.labels[other.labels >= 0].tolist()
    first, second = (store.first_number(ImageResolution(pixels)) for pixels in (SOME, FEW))
    assert (first, second) == (0, store.meta.rows)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.at(ImageResolution(FEW)).folder == few.folder
    with pytest.raises(KeyError):
        store.at(ImageResolution(TOKEN))
    assert at_resolution_of(few, settings).model.max_pixels == FEW
    assert resolution_lines(store)[1].startswith(f"--max_pixels {FEW}: ")


def test_a_resolution_whose_rows_are_others_is_refused(settings: Settings, store: Store):
    cache = str(settings.data.cache_dir)
    other_split = prepare_store(DataSource.from_settings(settings.replace(split_seed=7)), cache)
    with pytest.raises(DataError, match=f"max_pixels {FEW}.*the splits of their rows differ"):
        prepare_resolutions(settings, Space.parse(SPACE, settings), other_split)
    with pytest.raises(ConfigError, match="search_space: --max_pixels 5: --max_pixels 5: one image token"):
        prepare_resolutions(settings, space_of(settings, max_pixels={"choice": [5, FEW]}), store)


def test_rows_of_each_resolution_must_fit_max_length(settings: Settings, store: Store):
    shortest = int(store.at(ImageResolution(FEW)).column("required").max())
    check_lengths(settings.replace(max_length=int(store.largest.column("required").max())), store)
    with pytest.raises(DataError, match=f"search_space: --max_pixels {SOME}: .* do not fit max_length"):
        check_lengths(settings.replace(max_length=shortest), store)


def test_the_preflight_tells_every_resolution_and_plans_for_the_largest(
    settings: Settings, store: Store, tmp_path: Path
):
    summary = inspect_data(settings.replace(max_pixels=FEW), str(tmp_path / "searched")).summary
    assert any(note.startswith(f"--max_pixels {SOME}: ") for note in summary.notes)
    alone = {"max_pixels": SOME, "search_space": None}
    largest = inspect_data(settings.replace(**alone), str(tmp_path / "largest")).summary
    assert summary.memory == largest.memory != ""


def test_the_table_and_the_report_show_the_metric_against_image_tokens(settings: Settings, store: Store):
    found = ((FEW, 0.5), (FEW, 0.4), (SOME, 0.3), (SOME, 0.45))
    trials = [
        replace(trial(number, 1e-3, eval_loss=loss), values={"max_pixels": pixels, "learning_rate": 1e-3})
        for number, (pixels, loss) in enumerate(found)
    ]
    shown = [with_image_tokens(one, settings, store) for one in trials]
    objectives = {"eval_loss": "min", IMAGE_TOKENS: "min"}
    rows = trials_table(shown, ["max_pixels", "learning_rate"], objectives).to_pylist()
    few, some = (image_tokens_per_row(store.at(ImageResolution(pixels))) for pixels in (FEW, SOME))
    assert [row[IMAGE_TOKENS] for row in rows] == [few, few, some, some]
    assert [row["pareto"] for row in rows] == [False, True, True, False]
    chart = trade_off(ReportTrials(shown, {}, objectives, shown[2], None), IMAGE_TOKENS)
    assert IMAGE_TOKENS in chart and "nothing is better in both" in chart


@pytest.mark.heavy  # a whole search with its report: 60 s
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("runner", ["packed", "isolated"])
def test_a_whole_search_over_resolutions(settings: Settings, runner: str, mall: Path, tmp_path: Path):
    changed = settings.replace(
        trial_runner=runner,
        output_dir=str(tmp_path / "out"),
        num_samples=5,
        early_stopping="none",
        confirm=None,
        max_pixels=None,  # the baseline is outside the space: the processor's own 12544
    )
    result = run_search(changed)
    rows = pq.read_table(tmp_path / "out" / "trials.parquet").to_pylist()
    assert {row["max_pixels"] for row in rows} == {FEW, SOME, None}
    tokens = {row["max_pixels"]: row[IMAGE_TOKENS] for row in rows}
    assert tokens[FEW] <= 4 < tokens[SOME] <= 9 < tokens[None] <= 16
    assert any(row["pareto"] for row in rows)
    best = Settings.load(tmp_path / "out" / "best" / "config.yaml")
    assert best.model.max_pixels == result.best_trial.values["max_pixels"]
    saved: Any = AutoProcessor.from_pretrained(tmp_path / "out" / "best")
    assert dict(saved.image_processor.size)["longest_edge"] == (best.model.max_pixels or OWN)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Trade-offs" in page and IMAGE_TOKENS in page
    key = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())["data"]
    assert key == prepare_store(DataSource.from_settings(best), str(best.data.cache_dir)).meta.key
    predicted = predict_rows(
        PredictOptions(
            adapter=str(tmp_path / "out" / "best"),
            data_path=str(mall / "frames"),
            question="How many?",
            output_dir=str(tmp_path / "answers"),
            max_new_tokens=2,
        )
    )
    assert predicted.rows > 0
    more = Settings.from_flags({"resume": str(tmp_path / "out"), "num_samples": 7})
    assert len(run_search(more).trials) == 7
