"""A search's study, read back with Optuna's own storage."""

import pickle
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from vlmtune.search.study_file import STUDY_NAME, StudyFile


def read(path: Path) -> optuna.Study:
    return optuna.load_study(study_name=STUDY_NAME, storage=JournalStorage(JournalFileBackend(str(path))))


@pytest.mark.parametrize("kind", ["path", "uri"])
def test_every_finished_trial_is_in_the_file(kind: str, tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = tmp_path / "study.journal"
    file = StudyFile(str(path) if kind == "path" else path.as_uri(), ["exact_match"])
    study = optuna.create_study(direction="maximize")
    for number in range(3):
        trial = study.ask()
        trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True)
        trial.set_user_attr("origin", "spread")
        trial.report(0.1 * number, 1)
        if number < 2:
            study.tell(trial, 0.5 + number, state=TrialState.COMPLETE)
        file.write(study)
        if number == 0:
            file = pickle.loads(pickle.dumps(file))  # the search was resumed
    found = read(path)
    assert found.direction.name == "MAXIMIZE" and found.user_attrs == {"metrics": ["exact_match"]}
    assert [trial.value for trial in found.trials] == [0.5, 1.5], "the third trial still runs"
    for one, other in zip(found.trials, study.trials[:2], strict=True):
        assert one.params == other.params
        assert one.user_attrs == {"origin": "spread"}
        assert one.intermediate_values == other.intermediate_values
    assert found.best_trial.number == 1
    study.tell(2, state=TrialState.FAIL)
    file.write(study)
    assert [trial.state.name for trial in read(path).trials] == ["COMPLETE", "COMPLETE", "FAIL"]
