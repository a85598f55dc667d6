"""Isolated trials: their values, and when a failed one did not fit in memory."""

import pytest
import ray
import torch

from vlmtune.errors import DoesNotFitError
from vlmtune.search.isolated_trial import GRID_POINT, out_of_memory, trial_values


def test_a_trial_of_a_grid_has_its_values_under_a_key() -> None:
    values = {"lora_r": 8, "learning_rate": 1e-3}
    assert trial_values(values) == trial_values({GRID_POINT: values}) == values


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**14)
    assert out_of_memory(raised.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(ray.exceptions.OutOfMemoryError("node ran out"))
    assert out_of_memory(DoesNotFitError("not enough GPU memory: ..."))
    assert not out_of_memory(RuntimeError("size of tensor a must match"))
