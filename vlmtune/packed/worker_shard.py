"""`WorkerShard`: this process's part of each step's rows, if several workers train one adapter."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class WorkerShard:
    """The part of worker `rank` among `world_size` workers. All of them train the same trials."""

    rank: int = 0
    world_size: int = 1

    def all_reduce_sum(self, numbers: Tensor) -> Tensor:
        """The sum of `numbers` over all workers, which each of them gets.

        Args:
            numbers: a tensor on the device that the workers train on. It may be changed in place.
        """
        if self.world_size > 1:
            dist.all_reduce(numbers)
        return numbers


SINGLE_WORKER = WorkerShard()
