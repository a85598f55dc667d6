"""Gradient checkpointing whose checkpoints are held in pinned CPU memory.

A layer's input is copied to the CPU while the next layers compute, and copied back before the backward pass
of the layer needs it. torch keeps gradient checkpoints on the GPU. TRL's offloading copies each one back only
when it is needed, so that every layer waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_COPIES = 2  # copies to the CPU at the same time; the copied tensors stay on the GPU until a copy ends


class OffloadedCheckpoints:
    """The inputs of the decoder's layers, for one forward and backward pass at a time.

    Attributes:
        free: unused pinned memory by shape and dtype, because allocating it takes milliseconds.
        last: the checkpoint that was stored last.
        copies: (source, event) of the copies to the CPU that may still run.
    """

    def __init__(self) -> None:
        self.stream: Any = None
        self.free: dict[Any, list[Tensor]] = {}
        self.last: _Checkpoint | None = None
        self.copies: deque[tuple[Tensor, Any]] = deque()

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor, *, first: bool) -> Tensor:
        """Compute `function(x)` and keep only `x`. The backward pass computes it again.

        Args:
            function: the forward pass of a layer.
            first: whether this is the first layer.
        """
        if not torch.is_grad_enabled():
            return function(x)
        if first:
            self.stream = self.stream or torch.cuda.Stream()
            self.last = None
        if (
            not x.requires_grad
        ):  # so that the layer gets a backward pass although nothing before it is trained
            x = x.detach().requires_grad_()
        return _RecomputeFunction.apply(x, self, function)  # type: ignore[no-any-return]

    def store(self, x: Tensor) -> _Checkpoint:
        """Start to copy the input of a layer to the CPU."""
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
        """The input of a layer on the GPU. Also starts to copy back the input of the layer before it."""
        # The forward pass has ended. Its copies end before their sources can be overwritten.
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
    """The input of a layer on the CPU and, shortly before the backward pass needs it, on the GPU."""

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
