"""Gradient checkpointing whose checkpoints lie in pinned CPU memory.

A layer's input leaves the GPU while the next layers compute, and comes back before its turn in the backward
pass. torch's own checkpoints stay on the GPU. TRL's offloading brings each one back only when it is needed,
so that every layer waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_COPIES = 2  # to the CPU at the same time: their sources stay on the GPU until they end


class OffloadedCheckpoints:
    """The inputs of a stack of layers, for one forward and backward pass at a time.

    Attributes:
        free: pinned memory to use again, by shape and dtype; taking new memory costs milliseconds.
        last: the checkpoint that was stored last.
        copies: the copies to the CPU that may still run, each with its source.
    """

    def __init__(self) -> None:
        self.stream: Any = None
        self.free: dict[Any, list[Tensor]] = {}
        self.last: _Checkpoint | None = None
        self.copies: deque[tuple[Tensor, Any]] = deque()

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor, *, first: bool) -> Tensor:
        """`function(x)`, of which only `x` is kept; it is computed again in the backward pass.

        Args:
            first: whether this is the first layer of the stack.
        """
        if not torch.is_grad_enabled():
            return function(x)
        if first:
            self.stream = self.stream or torch.cuda.Stream()
            self.last = None
        if not x.requires_grad:  # nothing before the first layer is trained, but the layer is
            x = x.detach().requires_grad_()
        return _RecomputeFunction.apply(x, self, function)  # type: ignore[no-any-return]

    def store(self, x: Tensor) -> _Checkpoint:
        """Begin to copy the input of a layer to the CPU."""
        free = self.free.setdefault((x.shape, x.dtype), [])
        host = free.pop() if free else torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(x, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self.stream)
        self.copies.append((x, copied))
        while len(self.copies) > MAX_COPIES:
            self.copies.popleft()[1].synchronize()
        self.last = _Checkpoint(host, previous=self.last)
        return self.last

    def load(self, checkpoint: _Checkpoint) -> Tensor:
        """The input of a layer on the GPU. The copy of the layer before it begins as well."""
        # The forward pass is over, and so are its copies before anything is written over their sources.
        self.copies.clear()
        for each in (checkpoint, checkpoint.previous):
            if each is not None and each.device is None:
                with torch.cuda.stream(self.stream):
                    each.device = torch.empty(each.host.shape, dtype=each.host.dtype, device="cuda")
                    each.device.copy_(each.host, non_blocking=True)
                    each.copied_back.record(self.stream)
        torch.cuda.current_stream().wait_event(checkpoint.copied_back)
        x, checkpoint.device, checkpoint.previous = checkpoint.device, None, None
        assert x is not None
        x.record_stream(torch.cuda.current_stream())
        self.free[x.shape, x.dtype].append(checkpoint.host)
        return x


class _Checkpoint:
    """The input of a layer on the CPU and, shortly before it is needed, on the GPU."""

    def __init__(self, host: Tensor, previous: _Checkpoint | None) -> None:
        self.host, self.previous = host, previous
        self.device: Tensor | None = None
        self.copied_back = torch.cuda.Event()


class _RecomputeFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, checkpoints: OffloadedCheckpoints, function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.checkpoints, ctx.function = checkpoints, function
        ctx.random_state = torch.cuda.get_rng_state(x.device)
        ctx.autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        ctx.checkpoint = checkpoints.store(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        x = ctx.checkpoints.load(ctx.checkpoint).requires_grad_()
        enabled, dtype = ctx.autocast
        with (
            torch.random.fork_rng(devices=[x.device]),
            torch.enable_grad(),
            torch.autocast("cuda", dtype=dtype, enabled=enabled),
        ):
            torch.cuda.set_rng_state(ctx.random_state, x.device)
            y = ctx.function(x)
        torch.autograd.backward(y, gradient)
        return x.grad, None, None
