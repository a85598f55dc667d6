"""Confirm the best trials of a search: train them again with other seeds, and choose by the mean.

A seed changes the order of the rows and the initial values of a trial's adapter. The split stays, and so do
the rows that it is evaluated on.
"""

import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune.config.settings import Settings
from vlmtune.console import console_line, format_value
from vlmtune.errors import ConfigError
from vlmtune.search.saved_trials import SavedTrial, SavedTrials, read_trials
from vlmtune.search.trial_queue import GridPoints, TrialQueue
from vlmtune.search.trial_results import COMPLETE, TrialResult, trial_results
from vlmtune.search.trial_runners import TrialRunner
from vlmtune.search.tuner import NoEarlyStopping, run_queue

logger = logging.getLogger(__name__)

TRIALS_WORTH_CONFIRMING = 12  # of fewer trials, none was chosen among so many that chance decides
FOLDER = "confirm"  # in the search's folder of Ray Tune's state


@dataclass(frozen=True)
class Confirmed:
    """The metric of trials that were trained with several seeds, the search's own seed first, by trial_id."""

    values: Mapping[str, Sequence[float]]
    mode: str

    def mean(self, trial: TrialResult) -> float:
        """The mean of a trial's metric; infinitely bad if a seed has no finite one."""
        values = self.values[trial.trial_id]
        worst = math.inf if self.mode == "min" else -math.inf
        return statistics.fmean(values) if all(map(math.isfinite, values)) else worst

    def best(self, trials: Sequence[TrialResult]) -> TrialResult:
        """The confirmed trial with the best mean."""
        candidates = [one for one in trials if one.trial_id in self.values]
        return (min if self.mode == "min" else max)(candidates, key=self.mean)

    def spread(self, trial: TrialResult) -> float:
        """The standard deviation of a trial's metric over its seeds; NaN if a seed has no finite one."""
        values = self.values[trial.trial_id]
        return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan

    def text(self, trial: TrialResult, others: Mapping[str, float]) -> str:
        """A trial's mean and spread in words, and which of the other values lie within its seeds' range."""
        values = self.values[trial.trial_id]
        worst = max(values) if self.mode == "min" else min(values)
        no_worse = [
            name
            for name, value in others.items()
            if (value <= worst if self.mode == "min" else value >= worst)
        ]
        mean, spread = format_value(self.mean(trial)), format_value(self.spread(trial))
        within = f"; the difference to the {' and the '.join(no_worse)} is within it" if no_worse else ""
        return f"{mean} ± {spread} over {len(values)} seeds{within}"


def read_confirm(settings: Settings) -> tuple[int, int] | None:
    """How many trials are confirmed, and with how many other seeds each; None if none.

    Raises:
        ConfigError: `confirm` is not TRIALSxSEEDS.
    """
    text = settings.search.confirm
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ConfigError(f"--confirm {text}: must be TRIALSxSEEDS, such as 3x2, or none")
    return int(match.group(1)), int(match.group(2))


def confirm(
    settings: Settings, runner: TrialRunner, output_dir: str, trials: Sequence[TrialResult]
) -> Confirmed | None:
    """Train the best complete trials again with other seeds; None if that is off or not worth it."""
    trials_and_seeds = read_confirm(settings)
    if (
        trials_and_seeds is None
        or len(trials) < TRIALS_WORTH_CONFIRMING
        or settings.search.time_budget_s is not None
    ):
        return None
    metric, mode = settings.search.metric, settings.search.mode
    sign = 1 if mode == "min" else -1
    complete = [one for one in trials if one.state == COMPLETE and math.isfinite(one.metric(metric))]
    best = sorted(complete, key=lambda one: sign * one.metric(metric))[: trials_and_seeds[0]]
    if len(best) < 2:  # nothing to choose between
        return None
    seeds = [(settings.training.seed + number) % 2**32 for number in range(1, trials_and_seeds[1] + 1)]
    numbers = ", ".join(str(trials.index(one) + 1) for one in best)
    logger.info(console_line("Confirm", f"trials {numbers} again with {len(seeds)} other seeds each"))
    points = [{**one.values, "seed": seed} for one in best for seed in seeds]
    again = trial_results(_train(settings, runner, points, output_dir))
    metrics: dict[str, list[float]] = {one.trial_id: [one.metric(metric)] for one in best}
    for one in best:
        for seed in seeds:
            value = next(run for run in again if run.values == {**one.values, "seed": seed})
            ended = value.state == COMPLETE
            metrics[one.trial_id].append(value.metric(metric) if ended else math.nan)
    return Confirmed(metrics, mode)


def _train(
    settings: Settings, runner: TrialRunner, points: Sequence[dict[str, Any]], output_dir: str
) -> list[SavedTrial]:
    """Train points to their end as trials of the search are, or resume."""
    saved = SavedTrials(f"{output_dir}/tune/{FOLDER}")
    trials, _ = read_trials(saved.folder)
    for trial in trials:
        trial.reopen()
    queue = TrialQueue(GridPoints(points), trials, len(points))
    run_queue(settings, runner, queue, saved, NoEarlyStopping(), None)
    return list(queue.trials.values())
