"""Replay parts of a model as CUDA graphs.

Below a few thousand tokens, a step spends its time in Python and kernel launches, not in arithmetic. A CUDA
graph replays captured kernels on fixed memory, so each shape of the inputs needs a graph of its own. On a
GPU, rows are padded to a multiple of `LENGTH_MULTIPLE` tokens, so that there are few shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.compat.torch import flatten, unflatten

LENGTH_MULTIPLE = 32
# Calls of a shape before it is captured. By then compilers and autotuners are done, and rare shapes are not
# captured.
WARM_UP_CALLS = 3
MAX_GRAPHS = 16  # graphs of a module
# With this mode, a background thread may copy a checkpoint off the GPU during a capture.
CAPTURE_ERROR_MODE = "thread_local"
CAPTURE_STOPPED = (
    "out of GPU memory: steps are no longer captured as CUDA graphs, which makes short ones slower"
)
CAPTURE_OVERHEAD = 1.25  # memory of a capture, as a multiple of the activations that the forward pass keeps

GetTrainedTensors = Callable[[], Sequence[Tensor]]


def install_capturing(
    module: nn.Module, get_trained: GetTrainedTensors, on_failure: Callable[[str], None]
) -> None:
    """Make calls of `module` in training replay CUDA graphs. Changes the module in place.

    A call may have a backward pass from its first output to the trained tensors. The backward pass must end
    before the next call of `module`, whose graphs share their memory.

    Args:
        get_trained: returns the tensors in `module` that a call computes gradients for; the same ones for the
            same shapes of the inputs. If there are none, the module runs without gradient.
        on_failure: called with a line that says why capturing failed or stopped. The module then runs as
            before.
    """
    module.forward = CapturedForward(module, get_trained, on_failure)


def discard_graphs(module: nn.Module) -> None:
    """Discard the graphs of `module`, because its parameters have moved. Later calls capture new graphs."""
    if isinstance(module.forward, CapturedForward):
        module.forward.discard()


def set_capturing(model: nn.Module, enabled: bool) -> None:
    """Switch the replaying of graphs in `model` on or off. Present graphs are discarded."""
    for module in model.modules():
        if isinstance(module.forward, CapturedForward):
            module.forward.enabled = enabled
            module.forward.discard()


def remove_capturing(model: nn.Module) -> bool:
    """Free the memory of all graphs in `model`, and capture no more.

    If there are none, nothing changes: `model` goes on capturing, because graphs of smaller inputs may fit.

    Returns:
        Whether there were graphs.
    """
    captured = [module.forward for module in model.modules() if isinstance(module.forward, CapturedForward)]
    if not any(forward.graphs for forward in captured):
        return False
    for forward in captured:
        forward.module.forward = forward.original_forward
    captured[0].on_failure(CAPTURE_STOPPED)
    return True


class CapturedForward:
    """Replaces the `forward` of a module. Calls with one signature are captured after `WARM_UP_CALLS` calls.

    The signature of a call is the structure of its arguments, the shape, dtype and strides of each tensor,
    and every other value.

    Attributes:
        original_forward: the module's own `forward`.
        graphs, calls: the graphs, and the number of calls, by signature.
        signatures_without_memory: signatures for which there was too little memory to capture.
        pool: the memory that all graphs share.
        enabled: whether calls are captured and replayed.
    """

    def __init__(
        self, module: nn.Module, get_trained: GetTrainedTensors, on_failure: Callable[[str], None]
    ) -> None:
        self.module, self.original_forward = module, module.forward
        self.get_trained, self.on_failure = get_trained, on_failure
        self.calls: Counter[Any] = Counter()
        self.graphs: dict[Any, CapturedCall] = {}
        self.signatures_without_memory: set[Any] = set()
        self.pool: Any = None
        self.max_graphs = MAX_GRAPHS
        self.enabled = True

    def discard(self) -> None:
        """Discard all graphs, and count calls from 0 again."""
        self.graphs.clear()
        self.calls.clear()
        self.signatures_without_memory.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        trained = self.get_trained()
        if not self.enabled or not self._can_capture(leaves, tensors, trained):
            return self.original_forward(*args, **kwargs)
        signature = (str(structure), *(_leaf_signature(leaf) for leaf in leaves))
        self.calls[signature] += 1
        if signature not in self.graphs:
            full = len(self.graphs) >= self.max_graphs
            if self.calls[signature] <= WARM_UP_CALLS or signature in self.signatures_without_memory or full:
                return self.original_forward(*args, **kwargs)

            def run(inputs: list[Tensor]) -> Any:
                rest = iter(inputs)
                values = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                args, kwargs = unflatten(values, structure)
                return self.original_forward(*args, **kwargs)

            captured = self._capture(signature, run, tensors, trained)
            if captured is None:
                return self.original_forward(*args, **kwargs)
            self.graphs[signature] = captured
        return self.graphs[signature](tensors)

    def _can_capture(self, leaves: list[Any], tensors: list[Tensor], trained: Sequence[Tensor]) -> bool:
        simple = all(
            isinstance(leaf, Tensor | bool | int | float | str | type(None) | torch.dtype) for leaf in leaves
        )
        has_gradient = torch.is_grad_enabled() and bool(trained)
        checkpointing = getattr(self.module, "gradient_checkpointing", False)
        on_gpu = all(tensor.is_cuda and not tensor.requires_grad for tensor in tensors)
        in_training = self.module.training and not checkpointing and (has_gradient or not trained)
        return in_training and simple and on_gpu

    def _capture(
        self,
        signature: Any,
        run: Callable[[list[Tensor]], Any],
        tensors: list[Tensor],
        trained: Sequence[Tensor],
    ) -> CapturedCall | None:
        """Capture a call; None if it cannot be captured or there is too little memory.

        A capture is begun only if there is enough memory, because torch, up to 2.13 at least, never frees the
        memory of a failed capture (https://github.com/pytorch/pytorch/pull/190308).
        """
        if not self.graphs:  # torch frees a pool with its last graph, so a new one is needed
            self.pool = torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[tensors[0].device.index]
        state, stream = generator.clone_state(), torch.cuda.current_stream()
        shared = max((graphs.activation_bytes for graphs in self.graphs.values()), default=0)
        graphs: CapturedCall | None = None
        try:
            graphs = CapturedCall(run, tensors, trained)
            torch.cuda.empty_cache()
            if graphs.bytes_needed(shared) <= torch.cuda.mem_get_info()[0]:
                graphs.capture(run, self.pool)
                return graphs
            self.signatures_without_memory.add(signature)
        except RuntimeError as error:  # raised by CUDA and torch for an operation that cannot be captured
            torch.cuda.set_stream(
                stream
            )  # after a failed capture, its side stream may still be the current one
            if graphs is not None:
                generator.graphsafe_set_state(state)  # the present state is still registered with the capture
            cause = error
            while isinstance(cause.__context__, RuntimeError):  # the end of a failed capture raises again
                cause = cause.__context__
            if not isinstance(cause, torch.OutOfMemoryError):
                self.module.forward = self.original_forward
                reason = " ".join(
                    str(cause).split()[:40]
                )  # several lines: a compiler's first line says nothing
                self.on_failure(f"no CUDA graphs of {type(self.module).__name__}, steps are slower: {reason}")
            elif graphs is None:
                self.signatures_without_memory.add(signature)
            else:  # keep the present graphs, and capture no more
                self.max_graphs = len(self.graphs)
            del cause  # its traceback refers to the memory of the capture
        torch.cuda.empty_cache()
        return None


class CapturedCall:
    """The captured forward pass for one signature and, if parameters are trained, its backward pass.

    The constructor runs both passes once without capturing them.

    Attributes:
        activation_bytes: memory that the forward pass keeps for the backward pass.
        buffer_bytes: memory for outputs, the input of the backward pass and gradients, which graphs do not
            share.

    Raises:
        torch.OutOfMemoryError: there is too little memory for the run without capturing.
    """

    def __init__(
        self, run: Callable[[list[Tensor]], Any], tensors: list[Tensor], trained: Sequence[Tensor]
    ) -> None:
        self.trained = trained
        self.inputs = [tensor.detach().clone() for tensor in tensors]
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            before = torch.cuda.memory_allocated()
            outputs, _ = flatten(run(self.inputs))
            self.activation_bytes = torch.cuda.memory_allocated() - before
            if trained and not outputs[0].requires_grad:  # with these inputs, no trained parameter is used
                self.trained = trained = []
            if trained:
                torch.autograd.grad(outputs[0], trained, torch.zeros_like(outputs[0]), allow_unused=True)
            results = [leaf for leaf in outputs if isinstance(leaf, Tensor)]
            self.buffer_bytes = _bytes([*trained, *results, outputs[0]])
            del outputs, results
        torch.cuda.current_stream().wait_stream(side_stream)

    def bytes_needed(self, shared: int) -> float:
        """Bytes that a capture needs in addition to the `shared` bytes of other graphs' activations."""
        return CAPTURE_OVERHEAD * max(self.activation_bytes - shared, 0) + self.buffer_bytes

    def capture(self, run: Callable[[list[Tensor]], Any], pool: Any) -> None:
        """Capture both passes. Graphs share the memory of `pool`, because they never run at the same time."""
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph, pool=pool, capture_error_mode=CAPTURE_ERROR_MODE):
            result = run(self.inputs)
        outputs, self.structure = flatten(result)
        self.outputs = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in outputs]
        if self.trained:
            self.upstream = torch.zeros_like(outputs[0])
            with torch.cuda.graph(self.backward_graph, pool=pool, capture_error_mode=CAPTURE_ERROR_MODE):
                gradients = torch.autograd.grad(outputs[0], self.trained, self.upstream, allow_unused=True)
                self.has_gradient = [gradient is not None for gradient in gradients]
                present = [gradient.flatten() for gradient in gradients if gradient is not None]
                self.gradient = torch.cat(present)

    def __call__(self, tensors: list[Tensor]) -> Any:
        if not self.trained:
            self.replay(tensors)
            return unflatten(self.outputs, self.structure)
        first = _ReplayFunction.apply(self, tensors, *self.trained)
        return unflatten([first, *self.outputs[1:]], self.structure)

    def replay(self, tensors: list[Tensor]) -> None:
        """Replay the forward pass with these inputs."""
        for fixed, tensor in zip(self.inputs, tensors, strict=True):
            fixed.copy_(tensor)
        self.forward_graph.replay()


class _ReplayFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: CapturedCall, tensors: list[Tensor], *trained: Tensor) -> Tensor:
        ctx.graphs = graphs
        graphs.replay(tensors)
        return graphs.outputs[0].view_as(graphs.outputs[0])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        graphs: CapturedCall = ctx.graphs
        graphs.upstream.copy_(upstream)
        graphs.backward_graph.replay()
        pairs = list(zip(graphs.trained, graphs.has_gradient, strict=True))
        sizes = [parameter.numel() for parameter, present in pairs if present]
        # A copy, because these tensors become the parameters' gradients and the next replay would overwrite
        # them.
        parts = iter(graphs.gradient.clone().split(sizes))
        gradients = [next(parts).view_as(parameter) if present else None for parameter, present in pairs]
        return None, None, *gradients


def _leaf_signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.stride()) if isinstance(leaf, Tensor) else leaf


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
