"""Copies between the CPU and the device that neither of them waits for.

A blocking copy leaves a GPU without work until Python reaches its next launch: some ten milliseconds of a
training step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_asynchronous(device: torch.device) -> bool:
    """Whether Python continues while the device computes."""
    return device.type == "cuda"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from the CPU to a GPU through pinned memory, by a copy that may still run."""
    if is_asynchronous(device) and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def host_buffer(flat: Tensor) -> Tensor:
    """CPU memory for a copy of `flat` that nobody waits for: pinned for a GPU's tensor.

    Use it again for the next copy: 64 MB of pinned memory take some 20 ms, and torch gives what is freed
    back to the system whenever a CUDA graph is captured.
    """
    return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=is_asynchronous(flat.device))


class AsyncHostCopy:
    """A copy of a tensor to the CPU that may still run; reading its numbers waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.numbers = tensor.detach().to("cpu", non_blocking=True, copy=True)
        self.copied = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def tolist(self) -> Any:
        """The numbers, after the copy has ended."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.numbers.tolist()
