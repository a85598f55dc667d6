"""Numbers between the CPU and the device without either waiting for the other.

A blocking copy leaves a GPU without work until Python has come to its next launch: some ten milliseconds of
a training step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def runs_ahead(device: torch.device) -> bool:
    """Whether Python goes on while the device works."""
    return device.type == "cuda"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`, which need not have come so far; from the CPU to a GPU by pinned memory."""
    if runs_ahead(device) and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def host_buffer(flat: Tensor) -> Tensor:
    """Memory on the CPU for a copy of `flat` that does not wait: pinned for a GPU's, of which 64 MB cost
    some 20 ms to take.

    Keep it for the next copy. What is given free torch gives back to the system whenever a CUDA graph is
    recorded.
    """
    return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=runs_ahead(flat.device))


class AsyncHostCopy:
    """A tensor's numbers on their way to the CPU; the device is waited for when they are read."""

    def __init__(self, tensor: Tensor) -> None:
        self.numbers = tensor.detach().to("cpu", non_blocking=True, copy=True)
        self.copied = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def tolist(self) -> Any:
        if self.copied is not None:
            self.copied.synchronize()
        return self.numbers.tolist()
