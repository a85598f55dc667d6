"""What the page shows of a folder, and what it lets a person ask."""

from pathlib import Path

import pytest

from vlmtune.errors import ConfigError
from vlmtune.search.distributions import Categorical
from vlmtune.ui.state import SearchFolder, flag_text, input_of


def test_a_running_search(running: Path) -> None:
    state = SearchFolder(str(running)).state()
    assert state["running"] and state["best"] == 1 and state["total"] == 4
    assert state["names"] == ["lora_r", "lora_alpha", "learning_rate"]
    assert state["drawn"] == {
        "lora_r": {"range": "", "choices": ["4", "8"]},
        "learning_rate": {"range": "1e-05 to 0.01, on a log scale", "choices": None},
    }


def test_a_finished_search_needs_no_live_file(finished: Path) -> None:
    state = SearchFolder(str(finished)).state()
    assert not state["running"] and state["best"] == 3 and state["total"] == 3
    assert state["trials"][0]["values"] == {"lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3}


def test_values_are_checked_before_they_wait(running: Path) -> None:
    search = SearchFolder(str(running))
    for values, message in (
        ({"lora_r": "5", "learning_rate": "1e-3"}, "lora_r: 5 is outside the search space"),
        ({"lora_r": "4", "learning_rate": "1"}, "learning_rate: 1 is outside"),
        ({"lora_r": "4", "learning_rate": "abc"}, "learning_rate: 'abc' is not a number"),
        ({"lora_r": "4"}, "learning_rate: has no value"),
        ({"lora_r": "4", "learning_rate": "1e-3", "lora_alpha": "8"}, "lora_alpha: is not searched"),
    ):
        with pytest.raises(ConfigError, match=message):
            search.propose(values)
    assert search.requests.waiting() == []
    search.propose({"lora_r": "8", "learning_rate": "3e-3"})
    assert search.state()["waiting"] == [{"lora_r": 1, "learning_rate": 3e-3}] or search.state()["waiting"]


def test_every_choice_is_a_text_that_its_flag_takes() -> None:
    for value in (None, True, 4, 0.5, "cosine", ["q_proj", "v_proj"], {"num_cycles": 2}):
        distribution = Categorical((value, 1), exhaustive=False)
        assert input_of(distribution)["choices"] == [flag_text(value), "1"]
    assert [flag_text(value) for value in (None, True, ["q", "v"])] == ["none", "true", "q,v"]


def test_only_a_running_trial_is_stopped(running: Path) -> None:
    search = SearchFolder(str(running))
    with pytest.raises(ConfigError, match="t1: no such trial is running"):
        search.stop("t1")
    with pytest.raises(ConfigError, match="no such trial is running"):
        search.stop("../../x")


def test_a_folder_without_a_search_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.yaml is missing"):
        SearchFolder(str(tmp_path))
