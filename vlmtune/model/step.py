"""`AcceleratedStep`: training steps over a frozen base, made fast or small. Both runners use it.

Each acceleration has a module of its own and changes no result: `fast` (LoRA in the activations' dtype, no
padding mask, compiled layers), `capture` (CUDA graphs), `offload` (gradient checkpoints in the CPU's memory).
`AcceleratedStep` applies those that the plan of memory names. If memory runs out all the same, it halves the
micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmtune.data.collate import split_batch
from vlmtune.library_errors import LIBRARY_ERRORS, first_line
from vlmtune.model.acceleration import Acceleration
from vlmtune.model.capture import (
    GetTrainedTensors,
    discard_graphs,
    install_capturing,
    remove_capturing,
    set_capturing,
)
from vlmtune.model.deepstack import use_dense_deepstack
from vlmtune.model.fast import (
    compile_layers,
    decoder_and_other_parts,
    disable_autocast,
    disable_vision_gradient,
    lean_lora,
    skip_padding_mask,
)
from vlmtune.model.memory import StepPlan
from vlmtune.model.offload import OffloadedCheckpoints
from vlmtune.model.transfer import to_device
from vlmtune.model.vision_attention import use_varlen_attention

Batch = dict[str, Tensor]


class AcceleratedStep:
    """A frozen base with its accelerations, and the training steps over it. The base is changed in place.

    The class is long because it is the one place that decides which accelerations are applied, and what is
    given up when memory runs out. Isolated training (`AdapterTrainer`) and the packed `Engine` both use it.

    Args:
        base: the model; it has its adapter already if a single adapter is trained.
        plan: what is compiled, checkpointed and offloaded, and how many rows the base computes at once.
        note: called with each line for the console.
        eval_micro_batch_size: rows computed at once in evaluation, if the plan sets no limit.

    Attributes:
        trained: the parameters of `base` that require a gradient.
        micro_batch_size, eval_micro_batch_size: rows computed at once; fewer after memory ran out.
        free_memory: a function that frees memory a step can do without; returns whether there was any.
        accelerations: the changes of the model's computation; the self-check can switch off each of them.
        tower_can_be_captured: whether the vision tower's computation can be recorded as a CUDA graph.
        offloads_checkpoints: whether the activations at gradient checkpoints are held in the CPU's memory.
        captures_graphs: whether capturing of CUDA graphs was installed; it may have been removed since.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        plan: StepPlan,
        note: Callable[[str], None],
        *,
        eval_micro_batch_size: int = 1,
    ) -> None:
        self.base, self.note = base, note
        self.captures_graphs = False
        self.trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
        self.micro_batch_size = plan.micro_batch_size
        self.eval_micro_batch_size = plan.eval_micro_batch_size or eval_micro_batch_size
        self.free_memory: Callable[[], bool] = lambda: False
        self.accelerations: list[Acceleration] = []
        self._add("attention without padding mask", lambda: skip_padding_mask(base))
        # Towers with such attention compute indices on the host, which no CUDA graph can hold.
        varlen = self._add("attention of the vision tower in one call", lambda: use_varlen_attention(base))
        self.tower_can_be_captured = varlen is None
        self._add("deep-stack features as whole tensors", lambda: use_dense_deepstack(base.get_decoder()))
        disable_vision_gradient(base)
        self.offloads_checkpoints = (
            plan.offload and plan.checkpointing and not _trains(decoder_and_other_parts(base)[1:])
        )
        if plan.compiled or self.offloads_checkpoints:
            checkpoints = OffloadedCheckpoints() if self.offloads_checkpoints else None
            self._add(
                "compiled layers",
                lambda: compile_layers(base, compiled=plan.compiled, checkpoints=checkpoints),
            )

    @classmethod
    def for_adapter(
        cls,
        adapted: PeftModel,
        plan: StepPlan,
        note: Callable[[str], None],
        *,
        capturable: bool,
        mixed_precision: bool,
        eval_micro_batch_size: int,
    ) -> AcceleratedStep:
        """The steps of a single PEFT adapter (isolated training).

        Args:
            capturable: whether the settings allow CUDA graphs.
            mixed_precision: whether the trainer runs the model under autocast.
        """
        lean = lean_lora(adapted)
        base: Any = adapted.get_base_model()
        step = cls(base, plan, note, eval_micro_batch_size=eval_micro_batch_size)
        step.accelerations.insert(0, lean)
        if base.device.type == "cuda":
            # A float32 base with bf16 asked for needs autocast. A graph must not be captured under it: the
            # casts that autocast keeps would be replayed with the adapter's old values.
            no_autocast = disable_autocast(adapted) if base.dtype != torch.float32 else not mixed_precision
            if no_autocast and capturable and not plan.checkpointing:
                trained = [
                    parameter for parameter in base.get_decoder().parameters() if parameter.requires_grad
                ]
                step.install_capturing(lambda: trained)
        return step

    def install_capturing(self, trained: GetTrainedTensors) -> None:
        """Capture calls of the decoder as CUDA graphs, and calls of vision parts that train nothing.

        Args:
            trained: returns the tensors that a call of the decoder computes gradients for.
        """
        decoder, *other_parts = decoder_and_other_parts(self.base)
        self.captures_graphs = True
        self.accelerations.append(Acceleration("CUDA graphs", partial(set_capturing, self.base)))
        install_capturing(decoder, trained, self.note)
        for part in other_parts:
            # Only parts without gradients: a gradient may enter a part through any of its outputs.
            if self.tower_can_be_captured and not _trains([part]):
                install_capturing(part, list, self.note)

    def discard_decoder_graphs(self) -> None:
        """Discard the decoder's graphs, because the tensors that it trains have moved."""
        discard_graphs(self.base.get_decoder())

    def discard_all_graphs(self) -> None:
        """Discard all CUDA graphs. Later calls are captured again."""
        if self.captures_graphs:
            set_capturing(self.base, True)

    def remove_capturing(self) -> bool:
        """Free the memory of all CUDA graphs, because there is too little; returns whether there were any."""
        return remove_capturing(self.base)

    def accumulate_gradients(self, batch: Batch, run: Callable[[Batch], Tensor]) -> Tensor:
        """Call `run` for each micro-batch of a batch, which adds to the gradients; returns the summed losses.

        If a micro-batch does not fit in memory, the gradients are restored and the batch is tried again:
        after `free_memory`, then without CUDA graphs, then with half as many rows at once.

        Raises:
            torch.OutOfMemoryError: not even one row fits.
        """
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in self.trained]
        while True:
            try:
                return torch.stack(self._run_parts(batch, self.micro_batch_size, run)).sum()
            except torch.OutOfMemoryError:
                if not (self.free_memory() or self.remove_capturing()):
                    self.micro_batch_size = self._half(min(self.micro_batch_size, len(batch["input_ids"])))
            for parameter, gradient in zip(self.trained, before, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            torch.cuda.empty_cache()

    def sum_without_gradients(self, batch: Batch, run: Callable[[Batch], Tensor]) -> Tensor:
        """Call `run` for each micro-batch of a batch, without gradients; returns the sum of its results.

        If a micro-batch does not fit in memory, it is tried again after `free_memory`, then with half as many
        rows at once. CUDA graphs are removed last, because training will replay them.

        Raises:
            torch.OutOfMemoryError: not even one row fits.
        """
        while True:
            try:
                with torch.no_grad():
                    first, *rest = self._run_parts(batch, self.eval_micro_batch_size, run)
                    return sum(rest, first)
            except torch.OutOfMemoryError:
                size = min(self.eval_micro_batch_size, len(batch["input_ids"]))
                if not self.free_memory() and (size > 1 or not self.remove_capturing()):
                    self.eval_micro_batch_size = self._half(size)
            torch.cuda.empty_cache()

    def average_gradients(self, world_size: int) -> None:
        """Average the gradients over `world_size` workers, in one message, once a step."""
        if world_size > 1:
            average_gradients(self.trained, world_size)

    def gradient_norm(self, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """The norm of all gradients, divided by the scale of `scaler` (fp16), if given."""
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        return norm if scaler is None else norm / scaler.get_scale()

    def _add(self, name: str, make: Callable[[], Acceleration | None]) -> Acceleration | None:
        """Apply an acceleration. If the model's class does not allow it, note why and return None."""
        try:
            acceleration = make()
        except LIBRARY_ERRORS as error:
            self.note(f"{name}: left out, {type(self.base).__name__} does not allow it ({first_line(error)})")
            return None
        if acceleration is not None:
            self.accelerations.append(acceleration)
        return acceleration

    def _run_parts(self, batch: Batch, rows: int, run: Callable[[Batch], Tensor]) -> list[Tensor]:
        return [run(part) for part in split_batch(batch, rows)]

    def _half(self, size: int) -> int:
        """Half of `size` rows, with a note. Raises the error that is being handled if `size` is 1."""
        if size == 1:
            raise
        half = -(-size // 2)
        self.note(
            f"out of GPU memory with {size} rows at a time: continuing with {half}, the step stays the same"
        )
        return half


class TrainedView(nn.Module):
    """Stands for a model in the Trainer's loop: its `train`, `parameters` and `zero_grad` skip frozen parts.

    The loop sets the mode, clips the gradients and clears them in every step. For each, Python would traverse
    all modules of the model: some 10 ms for LLaVA-1.5-7B.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trained = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        self.models = (model,)  # in a tuple, so that it is not a submodule
        self.mode_is_set = False  # a new model's modules have different modes

    def forward(self, **inputs: Any) -> Any:
        return self.models[0](**inputs)

    def train(self, mode: bool = True) -> TrainedView:
        """Skip `model.train(mode)` when the mode is unchanged."""
        (model,) = self.models
        if not self.mode_is_set or model.training != mode:
            model.train(mode)
            self.mode_is_set = True
        self.training = mode
        return self


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Average the gradients over the workers, in one message.

    A gradient that no worker has stays None, so its weight is left alone. Waits for the device only on a
    worker that lacks a gradient, such as that of cross-attention in a step whose rows have no image.
    """
    present = [parameter.grad is not None for parameter in parameters]
    sizes = [parameter.numel() for parameter in parameters]
    counts = to_device(torch.tensor(present, dtype=parameters[0].dtype), parameters[0].device)
    flat = torch.cat(
        [*(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters), counts]
    )
    dist.all_reduce(flat)
    *gradients, counts = flat.div_(world_size).split([*sizes, len(parameters)])
    anywhere = present if all(present) else counts.tolist()
    for parameter, gradient, is_anywhere in zip(parameters, gradients, anywhere, strict=True):
        parameter.grad = gradient.view_as(parameter) if is_anywhere else None


def _trains(modules: list[Any]) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())
