"""Ray Tune 2.60.0: Tune's and Optuna's own objects for a trial."""

import optuna
from ray.tune.search.optuna import OptunaSearch


def optuna_trial(search: OptunaSearch, trial_id: str) -> optuna.Trial:
    """Optuna's trial of Tune's `trial_id`. Private: `OptunaSearch._ot_trials`.

    OptunaSearch itself reports no intermediate values as ours are numbered, no constraints, no pruned trials.
    """
    trial: optuna.Trial = search._ot_trials[trial_id]
    return trial


def optuna_study(search: OptunaSearch) -> optuna.Study:
    """The Optuna study of a searcher. Private: `OptunaSearch._ot_study`.

    OptunaSearch enqueues points only when it is made.
    """
    study: optuna.Study = getattr(search, "_ot_study")  # noqa: B009  # typed as None
    return study


def completed_trials(search: OptunaSearch) -> set[str]:
    """The ids of the trials whose end Optuna was told of; add to it what was told in another way.

    Private: `OptunaSearch._completed_trials`, in which its own `on_trial_complete` looks.
    """
    trials: set[str] = search._completed_trials
    return trials


def study_of(search: OptunaSearch) -> optuna.Study:
    """Optuna's study. Private: `OptunaSearch._ot_study`."""
    study: optuna.Study | None = search._ot_study
    assert study is not None  # it is made with a space
    return study
