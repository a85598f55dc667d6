"""Copies between the CPU and the device."""

import pytest
import torch

from vlmtune.model.transfer import AsyncHostCopy, host_buffer, is_asynchronous, to_device

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
    ),
]


@pytest.mark.parametrize("name", DEVICES)
def test_a_copy_has_the_values_of_its_moment(name: str) -> None:
    device = torch.device(name)
    tensor = to_device(torch.arange(6.0).reshape(2, 3), device)
    assert tensor.device.type == name
    copy = AsyncHostCopy(tensor)
    tensor.zero_()
    assert copy.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


@pytest.mark.parametrize("name", DEVICES)
def test_a_buffer_is_on_the_cpu_and_pinned_for_a_gpu(name: str) -> None:
    device = torch.device(name)
    buffer = host_buffer(torch.zeros(4, dtype=torch.bfloat16, device=device))
    assert (buffer.shape, buffer.dtype, buffer.device.type) == ((4,), torch.bfloat16, "cpu")
    assert buffer.is_pinned() == is_asynchronous(device)
