"""Copy device tensors to pinned memory, which later copies use again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmtune.model.transfer import host_buffer

CHECKPOINT_VECTORS = 3  # the adapter and AdamW's two averages


@dataclass(frozen=True)
class HostCopies:
    """Copies of tensors by name. They are complete after `wait`."""

    tensors: dict[str, Tensor]
    copied: torch.cuda.Event | None

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


class HostMemory:
    """Pinned memory for copies of flat vectors of one size.

    Attributes:
        free: lists of unused buffers; each list is for one checkpoint.
    """

    def __init__(self) -> None:
        self.free: list[list[Tensor]] = []

    def reserve(self, like: Tensor) -> None:
        """Allocate a set of buffers for vectors such as `like`, and drop those of another size.

        Pinning takes some 20 ms for 64 MB, so call it in a thread that training does not wait for.
        """
        self.free = [[host_buffer(like) for _ in range(CHECKPOINT_VECTORS)]]

    def copy(self, vectors: dict[str, Tensor]) -> HostCopies:
        """Start to copy vectors of the same size. Later work on their stream may change them safely."""
        first = next(iter(vectors.values()))
        buffers = self.free.pop() if self.free else []
        buffers = [buffer for buffer in buffers if buffer.shape == first.shape]
        buffers += [host_buffer(vector) for vector in list(vectors.values())[len(buffers) :]]
        for buffer, vector in zip(buffers, vectors.values(), strict=False):
            buffer.copy_(vector.detach(), non_blocking=True)
        copied = (
            torch.cuda.current_stream(first.device).record_event() if first.device.type == "cuda" else None
        )
        return HostCopies(dict(zip(vectors, buffers, strict=False)), copied)

    def release(self, copies: HostCopies) -> None:
        """Give back the memory of these copies, for later copies."""
        self.free.append(list(copies.tensors.values()))
