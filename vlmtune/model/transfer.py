"""Asynchronous copies between the CPU and the GPU.

After a blocking copy, the GPU has no work until Python reaches the next kernel launch: some ten milliseconds
of a training step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_asynchronous(device: torch.device) -> bool:
    """Whether Python continues while the device computes."""
    return device.type == "cuda"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. A copy from the CPU to a GPU goes through pinned memory and may still run."""
    if is_asynchronous(device) and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def host_buffer(flat: Tensor) -> Tensor:
    """CPU memory for an asynchronous copy of `flat`; pinned if `flat` is on a GPU.

    Use the memory again for the next copy, because allocating 64 MB of pinned memory takes some 20 ms, and
    torch returns freed pinned memory to the system whenever a CUDA graph is captured.
    """
    return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=is_asynchronous(flat.device))


class AsyncHostCopy:
    """A copy of a tensor to the CPU, which may still run. `tolist` waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.numbers = tensor.detach().to("cpu", non_blocking=True, copy=True)
        self.copied = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def tolist(self) -> Any:
        """The numbers, after the copy has ended."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.numbers.tolist()
