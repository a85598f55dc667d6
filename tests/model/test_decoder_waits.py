"""No operation in a decoder waits for the device, or has a result whose size depends on values.

Either would spoil a CUDA graph. It shows without a GPU: such operations have names of their own.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.tiny_qwen import batch_of_two, qwen2_5_vl, qwen3_vl
from torch.utils._python_dispatch import TorchDispatchMode

from vlmtune.model.memory import StepPlan
from vlmtune.model.step import AcceleratedStep

WAITING = {
    "aten::_local_scalar_dense",  # .item(), .tolist(), bool(tensor)
    "aten::nonzero",
    "aten::masked_select",
    "aten::repeat_interleave.Tensor",
    "aten::equal",
    "aten::_unique2",
}


class OperationNames(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith(("aten::index.", "aten::index_put")):
            name += " by a mask" if any(i is not None and i.dtype == torch.bool for i in args[1]) else ""
        self.names.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("build", [qwen2_5_vl, qwen3_vl])
def test_a_decoder_never_waits(build: Callable[[], Any], padded: bool) -> None:
    model, batch = build().train(), batch_of_two()
    if padded:
        batch["attention_mask"][0, 20:] = 0
    AcceleratedStep(model, StepPlan(False, False, micro_batch_size=2, compiled=False), pytest.fail)
    decoder = model.get_decoder()
    run, operations = decoder.forward, OperationNames()

    def forward(*args: Any, **kwargs: Any) -> Any:
        with operations:
            return run(*args, **kwargs)

    decoder.forward = forward
    model(**batch, use_cache=False)
    assert "aten::mm" in operations.names or "aten::addmm" in operations.names
    assert not [name for name in operations.names if name in WAITING or name.endswith(" by a mask")]
