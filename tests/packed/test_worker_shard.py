"""Sums over workers. `test_train_packed.py` has them in a run of two."""

import torch

from vlmtune.packed.worker_shard import SINGLE_WORKER, WorkerShard


def test_a_single_worker_needs_no_process_group() -> None:
    assert WorkerShard(rank=0, world_size=1) == SINGLE_WORKER
    numbers = torch.tensor([1.0, 2.0])
    assert SINGLE_WORKER.all_reduce_sum(numbers).tolist() == [1.0, 2.0]
