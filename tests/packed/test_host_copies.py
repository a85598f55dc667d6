"""Copies for checkpoints, in memory that is used again."""

import pytest
import torch

from vlmtune.packed.host_copies import CHECKPOINT_VECTORS, HostMemory


def test_a_copy_keeps_its_numbers() -> None:
    memory, vector = HostMemory(), torch.arange(4.0)
    copies = memory.copy({"adapter": vector})
    vector += 1
    copies.wait()
    assert copies.tensors["adapter"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_memory_is_used_again_once_it_is_released() -> None:
    memory, vectors = HostMemory(), {"adapter": torch.ones(4), "average": torch.zeros(4)}
    first = memory.copy(vectors)
    second = memory.copy(vectors)
    addresses = [copies.tensors["adapter"].data_ptr() for copies in (first, second)]
    assert addresses[0] != addresses[1]
    memory.release(first)
    assert memory.copy(vectors).tensors["adapter"].data_ptr() == addresses[0]


@pytest.mark.parametrize("size", [4, 6])
def test_reserved_memory_is_for_vectors_of_its_size(size: int) -> None:
    memory = HostMemory()
    memory.reserve(torch.zeros(4))
    ((*buffers,),) = memory.free
    assert len(buffers) == CHECKPOINT_VECTORS
    copies = memory.copy({"adapter": torch.ones(size)})
    assert copies.tensors["adapter"].tolist() == [1.0] * size
    assert (copies.tensors["adapter"].data_ptr() == buffers[0].data_ptr()) == (size == 4)
