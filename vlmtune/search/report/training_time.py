"""The part of the report page about time: how long trials trained, and what early stopping saved."""

from collections.abc import Sequence

from vlmtune.html_page import section, table
from vlmtune.search.report.report_data import SearchReport
from vlmtune.search.trial_results import PRUNED, TrialResult


def training_seconds(trials: Sequence[TrialResult]) -> tuple[float, float, float]:
    """Seconds of training: (of all trials, of pruned trials, saved by pruning).

    The saved seconds are those that pruned trials would have needed for their remaining steps at their pace.
    """
    total = pruned = saved = 0.0
    for one in trials:
        seconds, step, steps = (one.metrics.get(name) for name in ("seconds", "step", "max_steps"))
        if seconds is None:
            continue
        total += seconds
        if one.state == PRUNED and step and steps:
            pruned += seconds
            saved += seconds * (steps / step - 1)
    return total, pruned, saved


def elapsed_seconds(trials: Sequence[TrialResult]) -> float | None:
    """Seconds from the first trial's start to the last report, by Ray Tune's clock."""
    reports = [
        (one.metrics["timestamp"], one.metrics["time_total_s"])
        for one in trials
        if {"timestamp", "time_total_s"} <= one.metrics.keys()
    ]
    return max(end for end, _ in reports) - min(end - took for end, took in reports) if reports else None


def format_seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def time_section(report: SearchReport) -> str:
    """A table of the seconds, with GPU-hours on GPUs."""
    trials, gpus = report.trials.results, report.gpus
    total, pruned, saved = training_seconds(trials)
    stopped = sum(one.state == PRUNED for one in trials)

    def text(seconds: float) -> str:
        return format_seconds(seconds) + (f", {gpus * seconds / 3600:.2g} GPU-hours" if gpus else "")

    percent = 100 * saved / (total + saved) if total else 0
    lines = [
        f"<td>all {len(trials)} trials, as trained</td><td>{text(total)}</td>",
        f"<td>of it, {stopped} trials that were stopped early</td><td>{text(pruned)}</td>",
        f"<td>all trials to their end, at their own pace</td><td>{text(total + saved)}</td>",
        f"<td>saved by stopping early</td><td>{text(saved)} ({percent:.0f} %)</td>",
    ]
    if (elapsed := elapsed_seconds(trials)) is not None:
        lines.append(
            f"<td>from the first trial's start to the last report</td><td>{format_seconds(elapsed)}</td>"
        )
    note = "Added over trials: those that ran side by side took less on the clock."
    if report.settings.search.trial_runner == "packed":
        note = "A packed trial's time is its share of its device, which loaded the base once for all trials."
    return section(
        "Time", f'<p class="soft small">{note}</p>', f'<div class="versus">{table((), lines)}</div>'
    )
