"""Run a part of the model as CUDA graphs: below a few thousand tokens a step's time is Python and kernel
launches, not arithmetic.

A graph replays recorded kernels on fixed memory, so there is one for each shape of the inputs. Rows are
padded to a multiple of
`LENGTH_MULTIPLE` tokens on a GPU to keep the shapes few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.compat.torch import flatten, unflatten

LENGTH_MULTIPLE = 32
# of a shape that run as they are, so that compilers and autotuners are done and rare shapes are never
# recorded
CALLS_BEFORE = 3
MAX_GRAPHS = 16
# what may spoil a recording: another thread may wait for its copy of a checkpoint meanwhile
OWN_THREAD = "thread_local"
NO_MORE_GRAPHS = (
    "out of GPU memory: steps are not recorded as CUDA graphs any more, which makes short ones slower"
)
PEAK = 1.25  # memory that a recording takes, against what it still has at the end of the forward pass

Trained = Callable[[], Sequence[Tensor]]


def capture(module: nn.Module, trained: Trained, on_failure: Callable[[str], None]) -> None:
    """Let calls of `module` in training replay CUDA graphs, in place.

    A call may have a backward pass through its first output to `trained`; it must be over before the next
    call of the same shape.

    Args:
        trained: gives the leaves in `module` that a call has gradients for, the same ones for the same shape
        of the inputs; with none, the
            module runs without gradient.
        on_failure: told in a line why recording failed or stopped; the module then goes on as it was.
    """
    module.forward = _Replayed(module, trained, on_failure)


def forget_graphs(module: nn.Module) -> None:
    """Drop what was recorded of `module`, whose parameters lie elsewhere from now on; it is recorded anew."""
    if isinstance(module.forward, _Replayed):
        module.forward.forget()


def stop_recording(model: nn.Module) -> bool:
    """For want of memory, drop all that was recorded in `model`, if anything was, and record nothing any
    more; returns whether so."""
    replayed = [
        forward
        for forward in (module.forward for module in model.modules())
        if isinstance(forward, _Replayed)
    ]
    if not any(one.graphs for one in replayed):
        return False  # what comes may be smaller, and have room
    for one in replayed:
        one.module.forward = one.plain
    replayed[0].on_failure(NO_MORE_GRAPHS)
    return True


class _Replayed:
    def __init__(self, module: nn.Module, trained: Trained, on_failure: Callable[[str], None]) -> None:
        self.module, self.plain, self.trained, self.on_failure = module, module.forward, trained, on_failure
        self.calls: Counter[Any] = Counter()
        self.graphs: dict[Any, _Graphs] = {}
        self.refused: set[Any] = set()  # what had no room
        self.pool: Any = None
        self.most = MAX_GRAPHS

    def forget(self) -> None:
        self.graphs.clear()
        self.calls.clear()
        self.refused.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        trained = self.trained()
        if not self._can_replay(leaves, tensors, trained):
            return self.plain(*args, **kwargs)
        key = (
            str(spec),
            *(
                (leaf.shape, leaf.dtype, leaf.stride()) if isinstance(leaf, Tensor) else leaf
                for leaf in leaves
            ),
        )
        self.calls[key] += 1
        if key not in self.graphs:
            if self.calls[key] <= CALLS_BEFORE or key in self.refused or len(self.graphs) >= self.most:
                return self.plain(*args, **kwargs)
            places = [isinstance(leaf, Tensor) for leaf in leaves]

            def run(given: list[Tensor]) -> Any:
                values = iter(given)
                args, kwargs = unflatten(
                    [next(values) if place else leaf for leaf, place in zip(leaves, places, strict=True)],
                    spec,
                )
                return self.plain(*args, **kwargs)

            if (graphs := self._recorded(key, run, tensors, trained)) is None:
                return self.plain(*args, **kwargs)
            self.graphs[key] = graphs
        return self.graphs[key](tensors)

    def _recorded(
        self, key: Any, run: Callable[[list[Tensor]], Any], tensors: list[Tensor], trained: Sequence[Tensor]
    ) -> _Graphs | None:
        """The graphs of a call; None where it cannot be recorded, or has no memory for that.

        A recording is begun only where there is memory: torch 2.11 to 2.13 never give free what one has
        taken that failed
        (https://github.com/pytorch/pytorch/pull/190308).
        """
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[tensors[0].device.index]
        state, stream = generator.clone_state(), torch.cuda.current_stream()
        taken = max((other.kept for other in self.graphs.values()), default=0)
        graphs: _Graphs | None = None
        try:
            graphs = _Graphs(run, tensors, trained)
            torch.cuda.empty_cache()
            if graphs.needs(taken) <= torch.cuda.mem_get_info()[0]:
                graphs.record(run, self.pool)
                return graphs
            self.refused.add(key)
        except RuntimeError as error:  # what CUDA and torch raise about an operation that cannot be recorded
            torch.cuda.set_stream(stream)  # a recording that fails at its end leaves its own
            if graphs is not None:
                generator.graphsafe_set_state(state)  # the one in use still waits for the recording's end
            first = error
            while isinstance(first.__context__, RuntimeError):  # the recording's end complains once more
                first = first.__context__
            if not isinstance(first, torch.OutOfMemoryError):
                self.module.forward = self.plain
                reason = " ".join(str(first).split()[:40])  # compilers begin with a line that says nothing
                self.on_failure(f"no CUDA graphs of {type(self.module).__name__}, steps are slower: {reason}")
            elif graphs is None:
                self.refused.add(key)
            else:  # those that are there stay in use
                self.most = len(self.graphs)
            del first  # whose traceback holds what the recording has made
        torch.cuda.empty_cache()
        return None

    def _can_replay(self, leaves: list[Any], tensors: list[Tensor], trained: Sequence[Tensor]) -> bool:
        simple = all(
            isinstance(leaf, Tensor | bool | int | float | str | type(None) | torch.dtype) for leaf in leaves
        )
        grad = torch.is_grad_enabled() and bool(trained)
        again = getattr(self.module, "gradient_checkpointing", False)
        on_gpu = all(tensor.is_cuda and not tensor.requires_grad for tensor in tensors)
        return self.module.training and simple and on_gpu and not again and (grad or not trained)


class _Graphs:
    """The recorded forward pass for one shape of the inputs and, where there are trained parameters, its
    backward pass.

    Made with one run that is not recorded. `kept`: bytes that its activations take.

    Raises:
        torch.OutOfMemoryError: that run finds no memory.
    """

    def __init__(
        self, run: Callable[[list[Tensor]], Any], tensors: list[Tensor], trained: Sequence[Tensor]
    ) -> None:
        self.trained = trained
        self.inputs = [tensor.detach().clone() for tensor in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            before = torch.cuda.memory_allocated()
            outputs, _ = flatten(run(self.inputs))
            self.kept = torch.cuda.memory_allocated() - before
            if (
                trained and not outputs[0].requires_grad
            ):  # of what is trained, nothing is on the way of these inputs
                self.trained = trained = []
            if trained:
                torch.autograd.grad(outputs[0], trained, torch.zeros_like(outputs[0]), allow_unused=True)
            self.own = _bytes([*trained, *(leaf for leaf in outputs if isinstance(leaf, Tensor)), outputs[0]])
            del outputs
        torch.cuda.current_stream().wait_stream(side)

    def needs(self, taken: int) -> float:
        """Bytes that recording takes from the GPU, where recordings before have taken so many for
        activations, which all share."""
        return PEAK * max(self.kept - taken, 0) + self.own

    def record(self, run: Callable[[list[Tensor]], Any], pool: Any) -> None:
        """Record, into a pool of memory which recordings share: one is over before another is replayed."""
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph, pool=pool, capture_error_mode=OWN_THREAD):
            result = run(self.inputs)
        outputs, self.spec = flatten(result)
        self.outputs = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in outputs]
        if self.trained:
            self.upstream = torch.zeros_like(outputs[0])
            with torch.cuda.graph(self.backward_graph, pool=pool, capture_error_mode=OWN_THREAD):
                gradients = torch.autograd.grad(outputs[0], self.trained, self.upstream, allow_unused=True)
                self.used = [gradient is not None for gradient in gradients]
                self.gradient = torch.cat(
                    [gradient.flatten() for gradient in gradients if gradient is not None]
                )

    def __call__(self, tensors: list[Tensor]) -> Any:
        if not self.trained:
            self.replay(tensors)
            return unflatten(self.outputs, self.spec)
        first = _Replay.apply(self, tensors, *self.trained)  # type: ignore[no-untyped-call]
        return unflatten([first, *self.outputs[1:]], self.spec)

    def replay(self, tensors: list[Tensor]) -> None:
        for fixed, given in zip(self.inputs, tensors, strict=True):
            fixed.copy_(given)
        self.forward_graph.replay()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: _Graphs, tensors: list[Tensor], *trained: Tensor) -> Tensor:
        ctx.graphs = graphs
        graphs.replay(tensors)
        return graphs.outputs[0].view_as(graphs.outputs[0])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        graphs: _Graphs = ctx.graphs
        graphs.upstream.copy_(upstream)
        graphs.backward_graph.replay()
        used = [parameter for parameter, there in zip(graphs.trained, graphs.used, strict=True) if there]
        # A copy, because the next replay writes over it and these tensors become the parameters' gradients.
        parts = iter(graphs.gradient.clone().split([parameter.numel() for parameter in used]))
        gradients = [
            next(parts).view_as(p) if there else None
            for p, there in zip(graphs.trained, graphs.used, strict=True)
        ]
        return None, None, *gradients


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
