"""The metrics that a search can optimize, and which direction is better."""

from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError, nearest
from vlmtune.evaluation.metrics import ANSWER_METRICS, METRICS

# What every trial reports, beside a metric of the answers, which it reports only if the search is for it.
REPORTED_METRICS = (
    *("eval_loss", "train_loss", "seconds", "eval_seconds", "rows_per_second", "tokens_per_second"),
    "peak_memory",
)


def check_objectives(settings: Settings) -> None:
    """Raises ConfigError for a metric that no trial reports, or the wrong mode for a metric of answers."""
    metric, mode = settings.search.metric, settings.search.mode
    known = (*REPORTED_METRICS, *ANSWER_METRICS)
    if metric not in known:
        raise ConfigError(
            f"--metric {metric}: no trial reports it; there are {', '.join(known)}{nearest(metric, known)}"
        )
    if metric in ANSWER_METRICS and mode != (right := mode_of(metric)):
        better = "higher" if right == "max" else "lower"
        raise ConfigError(f"--metric {metric}: {better} is better for this metric: add --mode {right}")
    more = settings.search.more_metrics or []
    for name in more:
        if name not in REPORTED_METRICS:
            raise ConfigError(
                f"--more_metrics {name}: no trial reports it; there are {', '.join(REPORTED_METRICS)}"
                f"{nearest(name, REPORTED_METRICS)}"
            )
        if name == metric or more.count(name) > 1:
            raise ConfigError(f"--more_metrics {name}: is an objective already; name it once")


def objectives_of(settings: Settings) -> dict[str, str]:
    """The mode of each objective, "min" or "max". The first one decides early stopping and the best trial."""
    search = settings.search
    return {search.metric: search.mode, **{name: mode_of(name) for name in search.more_metrics or ()}}


def mode_of(metric: str) -> str:
    """Whether a lower ("min") or higher ("max") value of a metric is better."""
    if metric in METRICS:
        return METRICS[metric].mode
    return "max" if metric.endswith("_per_second") else "min"
