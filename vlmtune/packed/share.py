"""Which part of a run is this process's, where several train one adapter together."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """The rows of `rank` among `world` workers."""

    rank: int = 0
    world: int = 1

    def add_up(self, numbers: Tensor) -> Tensor:
        """The sum over all workers, each of which gets it; `numbers` on the device that they train on. May
        be `numbers` itself."""
        if self.world > 1:
            dist.all_reduce(numbers)
        return numbers


ALONE = Share()
