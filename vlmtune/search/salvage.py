"""Save the best finished adapter and the table of trials of a search that cannot be resumed."""

from dataclasses import dataclass

import pyarrow.fs as pafs

from vlmtune import run_state, storage
from vlmtune.checksums import damaged_file
from vlmtune.cluster import in_ray_job
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.folder_owner import check_owner
from vlmtune.output import resolve_folder
from vlmtune.packed.checkpoint_folder import complete_reports
from vlmtune.packed.messages import BEST_CHECKPOINT
from vlmtune.run_state import SEARCH
from vlmtune.search.saved_trials import End, SavedTrial, read_trials
from vlmtune.search.trial_results import COMPLETE, TrialResult, best_trial, trial_results, trials_table
from vlmtune.training.save import copy_adapter

SALVAGED = "salvaged"


@dataclass(frozen=True)
class Salvaged:
    """What was copied.

    Attributes:
        adapter: folder of the best finished adapter; None if no trial has one.
        trial: the trial that trained it.
        table_file: the table of trials.
        trials: number of trials in the table.
    """

    adapter: str | None
    trial: TrialResult | None
    table_file: str
    trials: int


def salvage(settings: Settings) -> Salvaged:
    """Copy what is undamaged in the folder of the search `resume` to `salvaged/` there. Starts nothing.

    Raises:
        ConfigError: `resume` is not given, or no trial left anything there.
    """
    if settings.run.resume is None:
        raise ConfigError("--salvage: give --resume with the folder of the damaged search")
    folder = resolve_folder(settings.run.resume, in_job=in_ray_job(), flag="--resume")
    check_owner(folder, "--resume", [SEARCH.settings_file], trusted=settings.run.trust_folder)
    trials = [*read_trials(folder)[0], *_trials_with_only_checkpoints(folder)]
    if not trials:
        raise ConfigError(f"--resume {folder}: no trial has left anything there, in {folder}/tune")
    search = (run_state.readable_settings(folder, SEARCH) or settings).search
    results = trial_results(trials)
    names = sorted({name for one in results for name in one.values})
    target = f"{folder}/{SALVAGED}"
    table = trials_table(results, names, {search.metric: search.mode})
    storage.write_table(table, f"{target}/trials.parquet")
    undamaged = [one for one in results if one.state == COMPLETE and _is_undamaged(one)]
    best = best_trial(undamaged, search.metric, search.mode)
    if best is not None:
        copy_adapter(best.checkpoint, f"{target}/best")
    adapter = None if best is None else f"{target}/best"
    return Salvaged(adapter, best, f"{target}/trials.parquet", table.num_rows)


def _is_undamaged(result: TrialResult) -> bool:
    files, path = storage.filesystem(result.checkpoint)
    is_there = files.get_file_info(path).type == pafs.FileType.Directory
    return is_there and damaged_file(files, path) is None


def _trials_with_only_checkpoints(folder: str) -> list[SavedTrial]:
    """The trials of which only checkpoints are left; their searched values are lost."""
    files, path = storage.filesystem(f"{folder}/tune/train")
    known = {trial.trial_id for trial in read_trials(folder)[0]}
    found: list[SavedTrial] = []
    for entry in files.get_file_info(pafs.FileSelector(path, allow_not_found=True)):
        if entry.type != pafs.FileType.Directory or entry.base_name in known:
            continue
        trial = SavedTrial(len(known) + len(found), entry.base_name, {})
        for report in complete_reports(files, entry.path):
            place = f"{folder}/tune/train/{entry.base_name}/checkpoint-{report['step']}"
            trial.add_report({**report, BEST_CHECKPOINT: place})
        if trial.reports:
            trial.end = End.LAST_REPORT
            found.append(trial)
    return found
