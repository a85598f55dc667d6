"""The state files of a run in its output folder: its settings, the key of its data, whether it has ended.

The settings are stored in `search.yaml` (or `config.yaml`) and in the state file, which has a copy. So a run
can be resumed although one file is damaged.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune import output, storage
from vlmtune.config import yaml12
from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.errors import ConfigError, DataError
from vlmtune.shown_text import redacted, redacted_values, with_secrets_of
from vlmtune.storage import file_states

logger = logging.getLogger(__name__)

COPY = ".copy"  # suffix of the second state file
FILES = "files.parquet"  # beside the state file: the data files with their state when the run began
# Options that may change when a search is resumed, because they change no trial.
MAY_CHANGE = ("num_samples", "time_budget_s", "max_concurrent_trials", "gpus")
# Options that concern one call of the command, and are not compared.
NOT_COMPARED = ("resume", "output_dir", "storage_path", "overwrite", "salvage", "trust_folder")
CHANGES_SHOWN = 3


@dataclass(frozen=True)
class RunKind:
    """The state files of a training run or of a search.

    Attributes:
        noun: what messages call the run.
        settings_file: file with the settings that the run was started with.
        state_file: file with the key of the prepared rows, the settings, and `state_format`.
        finished_file: a file that exists once the run has finished.
        state_format: version of the checkpoints and the trials' files. It is raised when older ones can no
            longer be resumed.
    """

    noun: str
    settings_file: str
    state_file: str
    finished_file: str
    state_format: int


TRAINING = RunKind("run", "config.yaml", "checkpoints/data.json", "metrics.json", 1)
# Format 4: the trials have files of their own, and Ray Tune's state is not read.
SEARCH = RunKind("search", "search.yaml", "tune/data.json", "trials.parquet", 4)


def write(folder: str, kind: RunKind, settings: Settings, key: str, *, ended: bool = False) -> None:
    """Write the settings and the state of a run.

    Args:
        key: key of the prepared rows.
        ended: whether the run has finished.
    """
    text = output.settings_yaml(settings)
    state = {"key": key, "format": kind.state_format, "ended": ended, "settings": text}
    storage.write_text(f"{folder}/{kind.settings_file}", text)
    for name in (kind.state_file, kind.state_file + COPY):
        storage.write_json(f"{folder}/{name}", state)


def read(folder: str, kind: RunKind) -> dict[str, Any]:
    """The state of a run, from the state file or its copy; empty if neither can be read."""
    for name in (kind.state_file, kind.state_file + COPY):
        text = _read_text(f"{folder}/{name}")
        try:
            state = json.loads(text or "")
        except (ValueError, RecursionError):
            continue
        if isinstance(state, dict) and "key" in state and _has_types(state):
            return state
    return {}


def _has_types(state: Mapping[str, Any]) -> bool:
    """Whether a state's values are of the types that `write` gives them."""
    types = {"key": str, "format": int, "ended": bool, "settings": str}
    return all(isinstance(state[name], kind) for name, kind in types.items() if name in state)


def check_is_there(folder: str, kind: RunKind) -> None:
    """Raises ConfigError if the folder holds no run of this kind."""
    if not storage.exists(f"{folder}/{kind.settings_file}") and not read(folder, kind):
        raise ConfigError(
            f"--resume {folder}: no {kind.noun} is there ({kind.settings_file} is missing); name the "
            f"--output_dir of an interrupted {kind.noun}"
        )


def interrupted_settings(
    folder: str, kind: RunKind, requested: Settings, given: Sequence[str] = ()
) -> Settings:
    """The settings of the interrupted run in a folder, with the changes that the user may request.

    Args:
        requested: the settings of the command with `--resume`, with absolute paths.
        given: the flags that the command gives beside `--resume`, see `Settings.given_with_resume`.

    Raises:
        ConfigError: there is no run, it has finished, its settings are lost, an older vlmtune started it, or
            a setting is requested that may not change.
    """
    check_is_there(folder, kind)
    state = read(folder, kind)
    settings = _saved_settings(folder, kind, state)
    if state and state.get("format", 1) != kind.state_format:
        if is_finished(folder, kind, state):
            raise ConfigError(f"--resume {folder}: this {kind.noun} has ended, nothing is left to do")
        raise ConfigError(
            f"--resume {folder}: this {kind.noun} was started by an older vlmtune, whose state this one "
            f"cannot read; start a new {kind.noun}, or resume with the version that started it"
        )
    if not state:
        raise ConfigError(_damaged(folder, kind, kind.state_file))
    changes = changed_options(settings, requested, given)
    extended = _check_changes(folder, kind, settings, changes)
    if is_finished(folder, kind, state) and not extended:
        raise ConfigError(f"--resume {folder}: this {kind.noun} has ended, nothing is left to do")
    return settings.replace(**changes, trust_folder=requested.run.trust_folder)


def is_finished(folder: str, kind: RunKind, state: Mapping[str, Any]) -> bool:
    """Whether a run has written all of its results."""
    path = f"{folder}/{kind.finished_file}"
    if not state.get("ended", True) or not storage.exists(path):
        return False
    return not path.endswith(".parquet") or _has_rows(path)


def changed_options(saved: Settings, requested: Settings, given: Sequence[str]) -> dict[str, Any]:
    """The options that are given beside `--resume` and differ from the saved ones, by flag name."""
    names = [name for name in given if name not in NOT_COMPARED]
    return {
        name: requested.value(name)
        for name in names
        if redacted_values(requested.value(name)) != redacted_values(saved.value(name))  # as they are saved
    }


def _check_changes(folder: str, kind: RunKind, saved: Settings, changes: Mapping[str, Any]) -> bool:
    """Refuse changes that a resumed run may not make; returns whether a search gets more trials."""
    allowed = MAY_CHANGE if kind is SEARCH else ()
    refused = {name: value for name, value in changes.items() if name not in allowed}
    if refused:
        raise ConfigError(
            f"--resume {folder}: was started with other settings: {_differences(saved, refused)}; give "
            f"--resume alone, or start a new {kind.noun}"
        )
    more = changes.get("num_samples")
    if more is not None and more < saved.search.num_samples:
        raise ConfigError(
            f"--num_samples {more}: this search was started with {saved.search.num_samples}; a resumed "
            "search may only get more trials"
        )
    return more is not None


def _differences(saved: Settings, changes: Mapping[str, Any]) -> str:
    lines = [f"{name} {saved.value(name)} → {value}" for name, value in changes.items()]
    more = len(lines) - CHANGES_SHOWN
    return ", ".join(lines[:CHANGES_SHOWN]) + (f", and {more} more" if more > 0 else "")


def readable_settings(folder: str, kind: RunKind) -> Settings | None:
    """The settings of a run, from the settings file or the state; None if neither can be read."""
    own = _parse(_read_text(f"{folder}/{kind.settings_file}"))
    return own if own is not None else _parse(read(folder, kind).get("settings"))


def _saved_settings(folder: str, kind: RunKind, state: Mapping[str, Any]) -> Settings:
    """The settings of a run: from its settings file, or from its state if that file is damaged."""
    own, copy = (
        _parse(text) for text in (_read_text(f"{folder}/{kind.settings_file}"), state.get("settings"))
    )
    if own is None and copy is None:
        raise ConfigError(_damaged(folder, kind, kind.settings_file))
    if own is None:
        assert copy is not None
        logger.info(
            console_line("", f"{kind.settings_file} is damaged: its copy in {kind.state_file} is used")
        )
        return copy
    if copy is not None and own != copy:
        own_values = own.to_flags() | {name: own.value(name) for name in copy.to_flags()}
        changes = {
            name: value
            for name, value in own_values.items()
            if copy.value(name) != value and name not in (*MAY_CHANGE, *NOT_COMPARED)
        }
        if changes:
            raise ConfigError(
                f"--resume {folder}: {kind.settings_file} was changed since this {kind.noun} began: "
                f"{_differences(copy, changes)}; change it back, or start a new {kind.noun}"
            )
    return own


def _damaged(folder: str, kind: RunKind, name: str) -> str:
    rescue = (
        f"; to copy the best finished adapter and the table of trials: python ray_jobs/tune.py --resume "
        f"{folder} --salvage"
        if kind is SEARCH
        else f"; its checkpoints are in {folder}/checkpoints"
    )
    return f"--resume {folder}: {name} is damaged or missing, and so is its copy{rescue}"


def _parse(text: str | None) -> Settings | None:
    if not text:
        return None
    try:
        options = yaml12.load_options(text)
        return None if options is None else Settings.from_flags(options)
    except (yaml12.YamlError, ConfigError):
        return None


def _read_text(path: str) -> str | None:
    try:
        return storage.read_text(path) if storage.exists(path) else None
    except UnicodeDecodeError:
        return None


def _has_rows(path: str) -> bool:
    """Whether a file is a Parquet table with at least one row."""
    files, inner = storage.filesystem(path)
    try:
        return bool(pq.read_metadata(inner, filesystem=files).num_rows)
    except (pa.ArrowInvalid, OSError):
        return False


def write_files(folder: str, kind: RunKind, files: Sequence[tuple[str, str]]) -> None:
    """Save the state of the data files, so that a resumed run can name a file that has changed."""
    table = pa.table({"path": [redacted(path) for path, _ in files], "state": [state for _, state in files]})
    storage.write_table(table, _files_path(folder, kind))


def check_same_files(folder: str, kind: RunKind, data_paths: Sequence[str] = ()) -> None:
    """Raises DataError, which names the file, if a data file has changed since the run began.

    Args:
        data_paths: the paths and URIs of the data, with the secrets that the saved ones lack.
    """
    path = _files_path(folder, kind)
    if not storage.exists(path) or not _has_rows(path):
        return  # the prepared rows' key is compared later
    files, inner = storage.filesystem(path)
    known = pq.read_table(inner, filesystem=files).to_pydict()
    now = {
        redacted(path): state
        for path, state in file_states([with_secrets_of(path, data_paths) for path in known["path"]])
    }
    changed = [one for one, state in zip(known["path"], known["state"], strict=True) if now[one] != state]
    if changed:
        gone = now[changed[0]].startswith("NotFound")
        more = f" (and {len(changed) - 1} more files)" if len(changed) > 1 else ""
        raise DataError(
            f"--resume {folder}: {changed[0]}{more} {'is gone' if gone else 'has changed'} since this "
            f"{kind.noun} began; put the file back as it was, with its time, or start a new {kind.noun}"
        )


def _files_path(folder: str, kind: RunKind) -> str:
    return f"{storage.parent(f'{folder}/{kind.state_file}')}/{FILES}"
