"""The data of the demo's pretraining."""

from typing import Any

import numpy as np
import pytest
import torch

from vlmtune.demo.pretraining_data import (
    IGNORED,
    make_pretraining_data,
    patches,
)
from vlmtune.demo.pretraining_model import new_base
from vlmtune.demo.toy_kinds import NAMES
from vlmtune.demo.toys import Thing


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return new_base()


def test_the_data_do_not_depend_on_the_number_of_processes(made: tuple[Any, Any]) -> None:
    one, two = (
        make_pretraining_data(7, made[1].tokenizer, seed=3, processes=number).arrays() for number in (1, 2)
    )
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert (one["labels"] != IGNORED).any(-1).all()
    assert one["images"].reshape(7, -1).std(1).min() > 0


def test_patches_tell_what_has_its_middle_in_them() -> None:
    things = [
        Thing("car", "red", (0, 0, 10, 8)),
        Thing(None, "blue", (2, 2, 10, 8)),
        Thing("cup", "green", (100, 70, 118, 90)),
    ]
    number, kind, _ = patches(things)
    assert (number[0], number[-1], number.sum()) == (2, 1, 3)
    assert (kind[0], kind[-1], kind[1]) == (len(NAMES), NAMES.index("cup"), IGNORED)
