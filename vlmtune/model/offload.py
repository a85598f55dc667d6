"""Gradient checkpointing whose checkpoints lie in pinned CPU memory: a layer's input leaves the GPU while
the next layers compute, and
comes back before its turn in the backward pass.

torch's own checkpoints stay on the GPU. TRL's offloading brings each back only when it is asked for, so that
every layer waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AHEAD = 2  # copies to the CPU that may be under way: what they copy stays on the GPU until then


class Checkpoints:
    """The inputs of a stack of layers, one forward and backward pass at a time."""

    def __init__(self) -> None:
        self.stream: Any = None
        self.free: dict[Any, list[Tensor]] = {}  # pinned memory to use again: taking it costs milliseconds
        self.last: _Kept | None = None
        self.leaving: deque[tuple[Tensor, Any]] = deque()

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor, *, first: bool) -> Tensor:
        """`function(x)` with nothing kept but `x`; computed again in the backward pass. `first`: of the
        stack's layers."""
        if not torch.is_grad_enabled():
            return function(x)
        if first:
            self.stream = self.stream or torch.cuda.Stream()
            self.last = None
        if not x.requires_grad:  # nothing before the first layer is trained, but the layer is
            x = x.detach().requires_grad_()
        return _Recomputed.apply(x, self, function)  # type: ignore[no-untyped-call,no-any-return]

    def keep(self, x: Tensor) -> _Kept:
        free = self.free.setdefault((x.shape, x.dtype), [])
        host = free.pop() if free else torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(x, non_blocking=True)
            gone = torch.cuda.Event()
            gone.record(self.stream)
        self.leaving.append((x, gone))
        while len(self.leaving) > AHEAD:
            self.leaving.popleft()[1].synchronize()
        self.last = _Kept(host, before=self.last)
        return self.last

    def fetch(self, kept: _Kept) -> Tensor:
        """The input of a layer; that of the layer before it is asked for as well."""
        # the forward pass is over, and so are the copies by the time that anything is written over them
        self.leaving.clear()
        for one in (kept, kept.before):
            if one is not None and one.device is None:
                with torch.cuda.stream(self.stream):
                    one.device = torch.empty(one.host.shape, dtype=one.host.dtype, device="cuda")
                    one.device.copy_(one.host, non_blocking=True)
                    one.there.record(self.stream)
        torch.cuda.current_stream().wait_event(kept.there)
        x, kept.device, kept.before = kept.device, None, None
        assert x is not None
        x.record_stream(torch.cuda.current_stream())
        self.free[x.shape, x.dtype].append(kept.host)
        return x


class _Kept:
    def __init__(self, host: Tensor, before: _Kept | None) -> None:
        self.host, self.before = host, before
        self.device: Tensor | None = None
        self.there = torch.cuda.Event()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, checkpoints: Checkpoints, function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.checkpoints, ctx.function = checkpoints, function
        ctx.random = torch.cuda.get_rng_state(x.device)
        ctx.autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        ctx.kept = checkpoints.keep(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        x = ctx.checkpoints.fetch(ctx.kept).requires_grad_()
        enabled, dtype = ctx.autocast
        with (
            torch.random.fork_rng(devices=[x.device]),
            torch.enable_grad(),
            torch.autocast("cuda", dtype=dtype, enabled=enabled),
        ):
            torch.cuda.set_rng_state(ctx.random, x.device)
            y = ctx.function(x)
        torch.autograd.backward(y, gradient)
        return x.grad, None, None
