"""Ray Tune 2.60.0: the Optuna study and trials inside an OptunaSearch."""

import optuna
from ray.tune.search.optuna import OptunaSearch


def optuna_trial(search: OptunaSearch, trial_id: str) -> optuna.Trial:
    """Optuna's trial of Tune's `trial_id`. Private: `OptunaSearch._ot_trials`.

    OptunaSearch itself cannot report intermediate values with vlmtune's numbers, constraints or pruned
    trials.
    """
    trial: optuna.Trial = search._ot_trials[trial_id]
    return trial


def optuna_study(search: OptunaSearch) -> optuna.Study:
    """The Optuna study of a searcher. Private: `OptunaSearch._ot_study`.

    OptunaSearch can enqueue points only when it is constructed.
    """
    study: optuna.Study = getattr(search, "_ot_study")  # noqa: B009  # typed as None
    return study


def completed_trials(search: OptunaSearch) -> set[str]:
    """The set of ids of trials whose end Optuna knows.

    Callers that tell Optuna of an end themselves add the id.

    Private: `OptunaSearch._completed_trials`, which its own `on_trial_complete` reads.
    """
    trials: set[str] = search._completed_trials
    return trials
