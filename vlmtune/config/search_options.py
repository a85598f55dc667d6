"""The options of a search: its space, its objectives, and how its trials run and end."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from vlmtune.config.options import option


@dataclass(frozen=True)
class SearchSettings:
    """What is searched, with how many trials, and which trial is the best."""

    search_space: dict[str, Any] | None = option(
        None, "What to search, by flag name; usually in the YAML file. On the command line, as JSON."
    )
    recipe: dict[str, Any] | None = option(
        {"learning_rate": 2e-4, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": "all-linear"},
        "Values that people use without a search, by flag name. They are the second trial, or one more trial "
        "if the search space does not contain them, and the result of the search is compared with them; "
        "none: "
        "no such trial.",
    )
    warm_start: list[str] | None = option(
        None,
        "Output folders of earlier searches. Trials of the same problem teach the sampler; of others the "
        "best values are tried first, with a tenth of the trials.",
    )
    num_samples: int = option(16, "Trials to run. A space that is all grid runs every combination instead.")
    max_concurrent_trials: int | None = option(
        None, "Trials that run at once. By default, as many as the resources allow."
    )
    trial_runner: Literal["auto", "isolated", "packed"] = option(
        "auto",
        "How a trial runs: packed trains many over one frozen base on each GPU, isolated gives each its "
        "own training workers. By default packed, where every option of the search allows it.",
    )
    metric: str = option(
        "eval_loss",
        "What the search optimizes: eval_loss, a metric of generated answers such as exact_match or mae, "
        "or another number that trials report.",
    )
    more_metrics: list[str] | None = option(
        None,
        "Further objectives beside --metric, such as seconds or peak_memory. The search then looks for the "
        "Pareto front: trials that no other trial beats in every objective. --metric alone decides early "
        "stopping and the best trial.",
    )
    metric_rows: int = option(
        64,
        "With a metric of answers: evaluation rows that are answered at each evaluation; all of them at a"
        " trial's end.",
    )
    max_new_tokens: int = option(32, "With a metric of answers: the longest answer, in tokens.")
    live_answers: int = option(
        0,
        "Evaluation rows, such as 3, whose answers the page of the search shows as they change. Trials "
        "generate them in at most 2 % of their time.",
    )
    mode: Literal["min", "max"] = option("min", "Whether a smaller or a larger metric is better.")
    time_budget_s: float | None = option(None, "Seconds after which no more trials run.")
    confirm: str | None = option(
        "3x2",
        "NxS: after a search of at least 12 trials, train the N best again with S other seeds, and choose "
        "the "
        "best by the mean; none: choose by the search's own seed.",
    )
    refit: bool = option(
        False, "After the search, train the best values once more, alone and on the full training data."
    )
    report: bool = option(
        True, "After the search, answer the test rows with the base and the adapters, and write report.html."
    )
    early_stopping: Literal["asha", "none"] = option(
        "asha",
        "In a search, stop trials whose metric is behind that of other trials (ASHA), or none. "
        "early_stopping_patience ends a run by its own evaluations.",
    )
    grace_period: float = option(
        0.5,
        "Share of its run that every trial gets before early stopping may end it; the first rung of ASHA.",
    )
    reduction_factor: int = option(
        3,
        "One in this many trials continues at each rung of early stopping; each rung comes at this many "
        "times the steps of the one before.",
    )

    @property
    def unmeasured(self) -> dict[str, float]:
        """NaN for every objective, as a trial reports those that it did not measure.

        Ray Tune ends a search whose searcher misses an objective in a report.
        """
        return dict.fromkeys((self.metric, *(self.more_metrics or ())), math.nan)
