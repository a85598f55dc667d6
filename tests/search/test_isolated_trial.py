"""Isolated trials: when a failed one did not fit in memory."""

import pytest
import ray
import torch

from vlmtune.errors import DoesNotFitError
from vlmtune.search.isolated_trial import out_of_memory


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**14)
    assert out_of_memory(raised.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(ray.exceptions.OutOfMemoryError("node ran out"))
    assert out_of_memory(DoesNotFitError("not enough GPU memory: ..."))
    assert not out_of_memory(RuntimeError("size of tensor a must match"))
