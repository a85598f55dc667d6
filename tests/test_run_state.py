"""What an unfinished run's folder holds, what is damaged in it, and what a resumed run may change."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from vlmtune import run_state, storage
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError, DataError
from vlmtune.run_state import COPY, SEARCH, TRAINING, RunKind, interrupted_settings
from vlmtune.storage import file_states

KINDS = pytest.mark.parametrize("kind", [TRAINING, SEARCH], ids=lambda kind: kind.noun)
OPTIONS = {"lora_r": 4, "data_path": "data.jsonl", "num_samples": 6}
SETTINGS = Settings.from_flags(OPTIONS)
ASKED = Settings.from_flags({"resume": "out"})


def interrupted(folder: Path, kind: RunKind, *, ended: bool = False) -> str:
    """An output folder as a run that was killed leaves it, or one that has ended."""
    run_state.write(str(folder), kind, SETTINGS, "of the rows", ended=ended)
    if ended and kind is SEARCH:
        storage.write_table(pa.table({"trial_id": ["a"]}), f"{folder}/{kind.finished_file}")
    elif ended:
        (folder / kind.finished_file).write_text("{}")
    return str(folder)


def requested(**changes: Any) -> tuple[Settings, tuple[str, ...]]:
    settings = Settings.from_flags({"resume": "out", **changes})
    return settings, settings.given_with_resume


@KINDS
def test_an_interrupted_run_is_resumed_with_its_own_settings(kind: RunKind, tmp_path: Path) -> None:
    assert interrupted_settings(interrupted(tmp_path / "out", kind), kind, ASKED) == SETTINGS


@KINDS
def test_what_cannot_be_resumed_is_said_in_one_line(kind: RunKind, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"absent: no {kind.noun} is there \({kind.settings_file} is missing\)"
    ):
        interrupted_settings(str(tmp_path / "absent"), kind, ASKED)
    ended = interrupted(tmp_path / "ended", kind, ended=True)
    with pytest.raises(ConfigError, match=f"this {kind.noun} has ended, nothing is left to do"):
        interrupted_settings(ended, kind, ASKED)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\x00\xfe" * 50)


DAMAGES = pytest.mark.parametrize("damage", [Path.unlink, empty, cut, binary], ids=lambda one: one.__name__)


@DAMAGES
@KINDS
@pytest.mark.parametrize("name", ["settings", "state", "copy"])
def test_one_damaged_file_keeps_nobody_from_resuming(
    kind: RunKind, name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = interrupted(tmp_path / "out", kind)
    names = {"settings": kind.settings_file, "state": kind.state_file, "copy": kind.state_file + COPY}
    damage(Path(folder, names[name]))
    assert interrupted_settings(folder, kind, ASKED) == SETTINGS
    assert run_state.read(folder, kind)["key"] == "of the rows"


@DAMAGES
@KINDS
def test_what_is_damaged_and_what_can_be_had_is_said_in_one_line(
    kind: RunKind, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = interrupted(tmp_path / "out", kind)
    for name in (kind.settings_file, kind.state_file, kind.state_file + COPY):
        if name != kind.settings_file or damage is not Path.unlink:
            damage(Path(folder, name))
    with pytest.raises(ConfigError, match="is damaged or missing, and so is its copy; ") as caught:
        interrupted_settings(folder, kind, ASKED)
    assert "\n" not in str(caught.value)
    assert ("--salvage" in str(caught.value)) == (kind is SEARCH)


def test_a_search_of_an_older_version_is_refused(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "out", SEARCH)
    for name in (SEARCH.state_file, SEARCH.state_file + COPY):
        Path(folder, name).write_text('{"key": "of the rows", "format": 2}')
    with pytest.raises(ConfigError, match="this search was started by an older vlmtune"):
        interrupted_settings(folder, SEARCH, ASKED)


@DAMAGES
def test_a_search_whose_table_is_damaged_has_not_ended(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = interrupted(tmp_path / "out", SEARCH, ended=True)
    damage(Path(folder, SEARCH.finished_file))
    assert interrupted_settings(folder, SEARCH, ASKED) == SETTINGS


def test_a_search_is_extended_finished_or_not(tmp_path: Path) -> None:
    for name, ended in (("finished", True), ("unfinished", False)):
        folder = interrupted(tmp_path / name, SEARCH, ended=ended)
        longer = interrupted_settings(folder, SEARCH, *requested(num_samples=40))
        assert longer == SETTINGS.replace(num_samples=40)
        with pytest.raises(ConfigError, match="--num_samples 3: this search was started with 6"):
            interrupted_settings(folder, SEARCH, *requested(num_samples=3))


def test_the_same_settings_may_be_given_again_and_others_are_refused_with_the_difference(
    tmp_path: Path,
) -> None:
    folder = interrupted(tmp_path / "out", SEARCH)
    assert interrupted_settings(folder, SEARCH, *requested(**OPTIONS, output_dir="elsewhere")) == SETTINGS
    with pytest.raises(
        ConfigError, match=r"was started with other settings: lora_r 4 → 8, lora_alpha 32 → 9"
    ):
        interrupted_settings(folder, SEARCH, *requested(lora_r=8, lora_alpha=9))
    Path(folder, "search.yaml").write_text("lora_r: 16\ndata_path: data.jsonl\n")
    with pytest.raises(ConfigError, match=r"search.yaml was changed since this search began: lora_r 4 → 16"):
        interrupted_settings(folder, SEARCH, ASKED)
    run = interrupted(tmp_path / "run", TRAINING)
    with pytest.raises(ConfigError, match="was started with other settings: num_samples 6 → 7"):
        interrupted_settings(run, TRAINING, *requested(num_samples=7))


def test_the_file_that_has_changed_is_named(tmp_path: Path) -> None:
    images = [tmp_path / f"{name}.png" for name in "abc"]
    for image in images:
        image.write_bytes(b"one")
    folder = str(tmp_path / "out")
    run_state.write_files(folder, SEARCH, file_states([str(image) for image in images]))
    run_state.check_same_files(folder, SEARCH)
    images[1].write_bytes(b"another")
    with pytest.raises(DataError, match=r"b.png has changed since this search began"):
        run_state.check_same_files(folder, SEARCH)
    images[0].unlink()
    with pytest.raises(DataError, match=r"a.png \(and 1 more files\) is gone since"):
        run_state.check_same_files(folder, SEARCH)
    images[0].write_bytes(b"one")
    images[1].write_bytes(b"one")
    os.utime(images[1], ns=(1, 1))
    with pytest.raises(DataError, match="has changed"):
        run_state.check_same_files(folder, SEARCH)


def test_the_state_is_json(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, SEARCH)
    state = json.loads(Path(folder, SEARCH.state_file).read_text())
    assert (state["format"], state["ended"]) == (SEARCH.state_format, False)


@pytest.mark.parametrize(
    "state", [{"key": 5}, {"key": "a", "settings": ["x"]}, {"key": "a", "format": "4"}, [], 5]
)
def test_a_state_of_other_types_is_damaged(state: object, tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "out", SEARCH)
    for name in (SEARCH.state_file, SEARCH.state_file + COPY):
        Path(folder, name).write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="is damaged or missing, and so is its copy"):
        interrupted_settings(folder, SEARCH, ASKED)
