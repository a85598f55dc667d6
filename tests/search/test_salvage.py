"""What can still be had of a search whose state is damaged."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vlmtune import run_state
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.packed.checkpoint_folder import write_checkpoint
from vlmtune.run_state import SEARCH
from vlmtune.search.salvage import salvage
from vlmtune.search.saved_trials import End, SavedTrial, SavedTrials, paths_of


def damaged_search(folder: Path, *losses: float) -> list[SavedTrial]:
    """Finished trials of these losses, in a search without readable settings or state."""
    saved, trials = SavedTrials(str(folder)), []
    for number, loss in enumerate(losses):
        trial = SavedTrial(number, f"id{number}", {"lora_r": number + 1}, end=End.LAST_REPORT)
        path = f"{folder}/tune/train/id{number}/checkpoint-8"
        metrics = {"step": 8, "max_steps": 8, "eval_loss": loss, "checkpoint_path": path}

        def write(local: Path, text: str = f"of {number}") -> None:
            (local / "adapter_model.safetensors").write_text(text)
            (local / "optimizer.pt").write_text("only training needs it")

        write_checkpoint(write, path, metrics)
        trial.add_report(metrics)
        saved.save(trial)
        trials.append(trial)
    saved.flush()
    run_state.write(str(folder), SEARCH, Settings(), "key")
    for name in (SEARCH.settings_file, SEARCH.state_file, SEARCH.state_file + run_state.COPY):
        (folder / name).write_bytes(b"\xff\x00")
    return trials


def requested(folder: Path) -> Settings:
    return Settings.from_flags({"resume": str(folder), "salvage": True})


def test_the_best_whole_adapter_and_the_table_are_copied(tmp_path: Path) -> None:
    trials = damaged_search(tmp_path, 2.0, 1.0, 3.0)
    (tmp_path / "tune/train/id1/checkpoint-8/adapter_model.safetensors").write_text("of X")
    for path in paths_of(trials[2], str(tmp_path)):
        Path(path).write_text("")
    result = salvage(requested(tmp_path))
    assert result.adapter == f"{tmp_path}/salvaged/best"
    assert [path.name for path in Path(result.adapter).iterdir()] == ["adapter_model.safetensors"]
    assert Path(result.adapter, "adapter_model.safetensors").read_text() == "of 0"
    rows = pq.read_table(result.table_file).to_pylist()
    assert [(row["trial_id"], row["lora_r"], row["eval_loss"]) for row in rows] == [
        ("id0", 1, 2.0),
        ("id1", 2, 1.0),
        ("id2", None, 3.0),
    ]


def test_what_salvage_cannot_do_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--salvage: give --resume"):
        salvage(Settings.from_flags({"salvage": True}))
    with pytest.raises(ConfigError, match="no trial has left anything there"):
        salvage(requested(tmp_path))
