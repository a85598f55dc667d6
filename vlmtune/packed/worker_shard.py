"""Which rows of each step are this process's, where several workers train one adapter together."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class WorkerShard:
    """The rows of worker `rank` among `world_size` workers."""

    rank: int = 0
    world_size: int = 1

    def all_reduce_sum(self, numbers: Tensor) -> Tensor:
        """Sum over all workers; each of them gets the result.

        Args:
            numbers: on the device that the workers train on. May be changed in place.
        """
        if self.world_size > 1:
            dist.all_reduce(numbers)
        return numbers


SINGLE_WORKER = WorkerShard()
