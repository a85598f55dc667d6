"""Confirm the best trials of a search: train them again with other seeds, and choose by the mean.

A seed changes the order of the rows and the initial values of a trial's adapter. The split stays, so all
seeds are evaluated on the same rows.
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
from vlmtune.search.trial_console import TrialConsole
from vlmtune.search.trial_queue import GridPoints, TrialQueue
from vlmtune.search.trial_results import COMPLETE, TrialResult, trial_results
from vlmtune.search.trial_runners import TrialRunner
from vlmtune.search.tuner import NoEarlyStopping, run_queue

logger = logging.getLogger(__name__)

TRIALS_WORTH_CONFIRMING = 12  # the best of fewer trials is rarely the best by chance alone
FOLDER = "confirm"  # in OUTPUT_DIR/tune


@dataclass(frozen=True)
class Confirmed:
    """The metric of confirmed trials for each of their seeds.

    Attributes:
        values: by trial_id, the metric for each seed; the first one is the search's own.
        mode: whether a lower ("min") or a higher ("max") metric is better.
    """

    values: Mapping[str, Sequence[float]]
    mode: str

    def mean(self, trial: TrialResult) -> float:
        """The mean of a trial's metric over its seeds; infinitely bad if a seed has no finite metric."""
        values = self.values[trial.trial_id]
        worst = math.inf if self.mode == "min" else -math.inf
        return statistics.fmean(values) if all(map(math.isfinite, values)) else worst

    def best(self, trials: Sequence[TrialResult]) -> TrialResult:
        """The confirmed trial with the best mean."""
        candidates = [trial for trial in trials if trial.trial_id in self.values]
        return (min if self.mode == "min" else max)(candidates, key=self.mean)

    def spread(self, trial: TrialResult) -> float:
        """The standard deviation of a trial's metric over its seeds; NaN if a seed has no finite metric."""
        values = self.values[trial.trial_id]
        return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan

    def text(self, trial: TrialResult, others: Mapping[str, float]) -> str:
        """A trial's mean and spread in words.

        Args:
            others: the metric of other trials by name. The text names those that are no worse than the worst
                of this trial's seeds.
        """
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
    """(number of trials to confirm, number of other seeds for each); None if no trial is confirmed.

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


def runs_to_confirm(settings: Settings, trials: int) -> int:
    """Number of runs that confirm a search of this many trials; 0 if `confirm` is off or not worth it."""
    trials_and_seeds = read_confirm(settings)
    limited = settings.search.time_budget_s is not None
    if trials_and_seeds is None or trials < TRIALS_WORTH_CONFIRMING or limited:
        return 0
    return trials_and_seeds[0] * trials_and_seeds[1]


def confirm(
    settings: Settings,
    runner: TrialRunner,
    output_dir: str,
    trials: Sequence[TrialResult],
    console: TrialConsole | None = None,
) -> Confirmed | None:
    """Train the best complete trials again with other seeds; None if `confirm` is off or not worth it.

    Args:
        console: shows the runs, of `runs_to_confirm`.
    """
    trials_and_seeds = read_confirm(settings)
    if trials_and_seeds is None or not runs_to_confirm(settings, len(trials)):
        return None
    metric, mode = settings.search.metric, settings.search.mode
    sign = 1 if mode == "min" else -1
    complete = [trial for trial in trials if trial.state == COMPLETE and math.isfinite(trial.metric(metric))]
    best = sorted(complete, key=lambda trial: sign * trial.metric(metric))[: trials_and_seeds[0]]
    if len(best) < 2:  # nothing to choose between
        return None
    seeds = [(settings.training.seed + number) % 2**32 for number in range(1, trials_and_seeds[1] + 1)]
    numbers = ", ".join(str(trials.index(trial) + 1) for trial in best)
    logger.info(console_line("Confirm", f"trials {numbers} again with {len(seeds)} other seeds each"))
    points = [{**trial.values, "seed": seed} for trial in best for seed in seeds]
    repeats = trial_results(_train(settings, runner, points, output_dir, console))
    metrics: dict[str, list[float]] = {trial.trial_id: [trial.metric(metric)] for trial in best}
    for trial in best:
        for seed in seeds:
            repeat = next(one for one in repeats if one.values == {**trial.values, "seed": seed})
            metrics[trial.trial_id].append(repeat.metric(metric) if repeat.state == COMPLETE else math.nan)
    return Confirmed(metrics, mode)


def _train(
    settings: Settings,
    runner: TrialRunner,
    points: Sequence[dict[str, Any]],
    output_dir: str,
    console: TrialConsole | None,
) -> list[SavedTrial]:
    """Train each point to its end as a trial, or continue where an interrupted call ended."""
    saved = SavedTrials(f"{output_dir}/tune/{FOLDER}")
    trials, _ = read_trials(saved.folder)
    for trial in trials:
        trial.reopen()
    queue = TrialQueue(GridPoints(points), trials, len(points))
    if console is not None:
        console.open([])
    run_queue(settings, runner, queue, saved, NoEarlyStopping(), console)
    if console is not None:
        console.close()
    return list(queue.trials.values())
