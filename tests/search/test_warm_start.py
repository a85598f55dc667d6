"""What a search takes over from earlier ones."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.search.space import Space
from vlmtune.search.warm_start import EarlierSearch, is_point_of, read_earlier_trials

SPACE = {
    "lora_r": {"choice": [4, 8]},
    "lora_alpha": {"expr": "2 * lora_r"},
    "learning_rate": {"loguniform": [1e-5, 1e-2]},
}
SETTINGS = Settings.from_flags({"model_name_or_path": "a", "search_space": SPACE})


def row(rate: float, loss: float | None, state: str = "COMPLETE", **values: Any) -> dict[str, Any]:
    known = {"lora_r": 8, "lora_alpha": 16, "learning_rate": rate}
    return {**known, **values, "state": state, "eval_loss": loss}


ROWS = [
    row(1e-3, 0.5),
    row(1e-4, 0.3),
    row(1e-4, 0.1, lora_alpha=8),
    row(5e-3, 0.2, "PRUNED"),
    row(2e-3, 0.4),
]


def finished(folder: Path, settings: Settings = SETTINGS, rows: Any = ROWS, key: str = "k") -> str:
    """The output folder of a finished search."""
    (folder / "best").mkdir(parents=True)
    settings.save(folder / "search.yaml")
    (folder / "best" / "metrics.json").write_text(json.dumps({"data": key}))
    pq.write_table(pa.Table.from_pylist(rows), folder / "trials.parquet")
    return str(folder)


def read(folders: list[str], **changes: Any) -> Any:
    settings = SETTINGS.replace(warm_start=folders, **changes)
    return read_earlier_trials(settings, Space.parse(settings.search.search_space or {}, settings), "k")


def test_results_of_the_same_problem_are_taken_over(tmp_path: Path) -> None:
    earlier = read([finished(tmp_path / "one")])
    assert earlier.results == [
        ({"lora_r": 8, "learning_rate": 1e-4}, 0.3),
        ({"lora_r": 8, "learning_rate": 2e-3}, 0.4),
        ({"lora_r": 8, "learning_rate": 1e-3}, 0.5),
    ], "the one with another alpha is no point of this space"
    assert earlier.points == []


@pytest.mark.parametrize(
    "changes", [{"model_name_or_path": "b"}, {"weight_decay": 0.1}, {"metric": "exact_match", "mode": "max"}]
)
def test_another_search_only_says_what_to_try_with_a_tenth_of_the_trials(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    rows = [one for one in ROWS if one["lora_alpha"] == 16]
    folders = [finished(tmp_path / "one", rows=rows), finished(tmp_path / "two", rows=[row(3e-3, 0.9)])]
    earlier = read(folders, **changes)
    assert earlier.results == []
    assert earlier.points == [{"lora_r": 8, "learning_rate": 1e-4}]
    many = read(folders, **changes, num_samples=39)
    assert [one["learning_rate"] for one in many.points] == [1e-4, 3e-3, 2e-3], "in turn"


def test_other_rows_make_another_problem_and_the_more_alike_search_comes_first(tmp_path: Path) -> None:
    other_model = SETTINGS.replace(model_name_or_path="b")
    other = finished(tmp_path / "one", other_model, [row(9e-3, 0.1)], key="x")
    alike = finished(tmp_path / "two", rows=[row(1e-3, 0.9)], key="x")
    assert [one["learning_rate"] for one in read([other, alike]).points] == [1e-3]


def test_only_values_that_the_space_contains_are_taken_over(tmp_path: Path) -> None:
    rows = [row(0.5, 0.1), row(1e-3, 0.2, lora_r=64)]
    earlier = read([finished(tmp_path / "one", rows=rows, key="x")], num_samples=20)
    assert earlier.points == [{"lora_r": 8}, {"learning_rate": 1e-3}]


def test_lists_and_options_that_are_fixed_now_are_compared() -> None:
    targets = {"choice": [["q_proj"], ["q_proj", "v_proj"]]}
    space = Space.parse({"lora_target_modules": targets}, SETTINGS)
    both = json.dumps(["q_proj", "v_proj"])
    rank = SETTINGS.lora.r
    assert is_point_of({"lora_target_modules": both, "lora_r": rank, "state": "COMPLETE"}, space)
    assert not is_point_of({"lora_target_modules": both, "lora_r": rank + 1}, space)
    assert not is_point_of({"lora_target_modules": json.dumps(["k_proj"])}, space)


def test_an_option_that_an_earlier_search_did_not_vary_has_no_value_and_none_is_one() -> None:
    space = Space.parse({"max_pixels": {"choice": [None, 200704]}}, SETTINGS)
    assert not is_point_of({"lora_r": SETTINGS.lora.r}, space)
    assert is_point_of({"max_pixels": None}, space)
    assert is_point_of({"max_pixels": 200704}, space)
    assert not is_point_of({"max_pixels": 401408}, space)


def test_a_folder_without_a_finished_search_and_a_grid_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--warm_start .*no finished search is there \(search.yaml"):
        read([str(tmp_path)])
    folder = finished(tmp_path / "one")
    with pytest.raises(ConfigError, match="is a grid"):
        read([folder], search_space={"lora_r": {"grid": [4, 8]}})
    (tmp_path / "one" / "search.yaml").write_text("no_such_option: 3")
    with pytest.raises(ConfigError, match=r"--warm_start .*search.yaml: no_such_option"):
        read([folder])


def test_a_damaged_search_to_start_from_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text("lora_r: 4")
    table = tmp_path / "trials.parquet"
    table.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(ConfigError, match=r"^--warm_start .*: trials\.parquet is damaged: [^\n]*$"):
        EarlierSearch.read(str(tmp_path))
    pq.write_table(pa.table({"other": [1]}), table)
    with pytest.raises(ConfigError, match=r"trials\.parquet is no table of trials$"):
        EarlierSearch.read(str(tmp_path))
    pq.write_table(pa.table({"state": ["COMPLETE"], "eval_loss": [1.0]}), table)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "metrics.json").write_text("[1, 2")
    assert EarlierSearch.read(str(tmp_path)).data_key is None
    (tmp_path / "search.yaml").write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError, match=r"--warm_start .*: search\.yaml: "):
        EarlierSearch.read(str(tmp_path))
