"""`SlotAdapter`: a trial's adapter and optimizer, in the layout that all trials of the engine share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_config import SFTConfig

from vlmtune.config.settings import Settings
from vlmtune.errors import DoesNotFitError
from vlmtune.model.lora import initial_a
from vlmtune.model.memory import is_out_of_memory
from vlmtune.packed.adapter_binding import AdapterBinding
from vlmtune.packed.host_copies import HostCopies, HostMemory
from vlmtune.packed.layers import AdapterLayout, Pair, TargetLayer
from vlmtune.packed.optim import AdapterOptimizer
from vlmtune.packed.trial_checkpoint import TrialCheckpoint


class SlotAdapter:
    """One trial's adapter and its optimizer.

    Args:
        targets: the layers with an adapter.
        max_steps: the number of optimizer steps of the trial.
        checkpoint: the checkpoint to resume from; None for a new adapter.

    Attributes:
        own_layout: the layout of this adapter alone, which its checkpoints have.
        layout: the present layout, which the engine's trials share.
        host_memory: memory for copies, from which checkpoints are written.
    """

    def __init__(
        self,
        targets: Sequence[TargetLayer],
        settings: Settings,
        args: SFTConfig,
        max_steps: int,
        checkpoint: TrialCheckpoint | None,
    ) -> None:
        lora = settings.lora
        self.targets, self.args, self.max_steps = targets, args, max_steps
        self.lora_rank = lora.r
        self.scaling = lora.alpha / (math.sqrt(self.lora_rank) if lora.use_rslora else self.lora_rank)
        self.own_layout = self.layout = AdapterLayout(targets, self.lora_rank)
        self.host_memory = HostMemory()
        self._checkpoint = checkpoint
        self._optimizer: AdapterOptimizer | None = None

    @property
    def names(self) -> list[str]:
        """Names of the layers that have an adapter."""
        return [target.name for target in self.targets]

    @property
    def optimizer(self) -> AdapterOptimizer:
        """The optimizer. Call `lay_out` before."""
        assert self._optimizer is not None
        return self._optimizer

    @property
    def flat(self) -> Tensor:
        """The adapter as a flat float32 vector `[P]` in the present layout."""
        return self.optimizer.flat

    def lay_out(self, layout: AdapterLayout, device: torch.device) -> None:
        """Move adapter, gradient and optimizer state to `layout` on `device`.

        If memory runs out, nothing is changed.
        """
        new = self._start(layout, device) if self._optimizer is None else self._moved(layout, device)
        self.layout, self._optimizer, self._checkpoint = layout, new, None

    def add_gradient(self, gradient: Tensor) -> None:
        self.optimizer.gradient += gradient

    def begin_copy(self) -> AdapterCopy:
        """Start to copy the adapter and its optimizer's state to the CPU. Training can continue at once."""
        state = self.optimizer.state_dict()
        copies = self.host_memory.copy({**state.pop("flat"), _ADAPTER: self.flat})
        return AdapterCopy(self, self.layout, copies, state)

    def reserve_host_memory(self) -> None:
        self.host_memory.reserve(self.flat)

    def _start(self, layout: AdapterLayout, device: torch.device) -> AdapterOptimizer:
        saved = self._checkpoint
        adapter = saved.adapter if saved is not None else self._new_adapter()
        optimizer = self._make_optimizer(layout.pack(adapter, device), layout)
        if saved is not None:
            averages = saved.optimizer["flat"].items()
            flat = {name: self._move(average, self.own_layout, layout, device) for name, average in averages}
            optimizer.load_state_dict({**saved.optimizer, "flat": flat})
        return optimizer

    def _moved(self, layout: AdapterLayout, device: torch.device) -> AdapterOptimizer:
        old = self.optimizer
        optimizer = self._make_optimizer(self._move(old.flat, self.layout, layout, device), layout)
        optimizer.gradient.copy_(self._move(old.gradient, self.layout, layout, device))
        state = old.state_dict()
        averages = state["flat"].items()
        flat = {name: self._move(average, self.layout, layout, device) for name, average in averages}
        optimizer.load_state_dict({**state, "flat": flat})
        return optimizer

    def _move(self, flat: Tensor, old: AdapterLayout, new: AdapterLayout, device: torch.device) -> Tensor:
        return new.pack(old.unpack(flat, self.names, self.lora_rank), device)

    def _make_optimizer(self, flat: Tensor, layout: AdapterLayout) -> AdapterOptimizer:
        return AdapterOptimizer(flat, layout.image_start, self.args, self.max_steps)

    def _new_adapter(self) -> dict[str, Pair]:
        return {
            target.name: (
                initial_a(target.name, self.lora_rank, target.in_features, seed=self.args.seed),
                torch.zeros(target.out_features, self.lora_rank),
            )
            for target in self.targets
        }


# Name of the adapter among the vectors of a copy; the others are the optimizer's averages.
_ADAPTER = "adapter"


@dataclass(frozen=True)
class AdapterCopy:
    """A copy of an adapter and its optimizer's state to the CPU, which may be in progress.

    Attributes:
        layout: the layout of the copied vectors.
        state: the rest of the optimizer's state.
    """

    adapter: SlotAdapter
    layout: AdapterLayout
    copies: HostCopies
    state: dict[str, Any]

    def wait(self) -> tuple[dict[str, Pair], dict[str, Any]]:
        """Wait for the copy; returns `adapter` and `optimizer` of a `TrialCheckpoint`."""
        self.copies.wait()
        own = self.adapter.own_layout
        vectors = {
            name: self.layout.unpack(vector, self.adapter.names, self.adapter.lora_rank)
            for name, vector in self.copies.tensors.items()
        }
        adapter = vectors.pop(_ADAPTER)
        return adapter, {**self.state, "flat": {name: own.pack(pairs) for name, pairs in vectors.items()}}

    def release(self) -> None:
        """Give back the copy's memory, once the checkpoint is written."""
        self.adapter.host_memory.release(self.copies)


def lay_out_together(new: SlotAdapter, others: Sequence[SlotAdapter], binding: AdapterBinding) -> bool:
    """Give a new adapter and the engine's other adapters a common layout.

    Returns:
        Whether the layout of the other adapters has changed.

    Raises:
        DoesNotFitError: there is no memory for the new adapter. The others are not changed.
    """
    before = binding.layout
    try:
        # On the CPU first: an adapter that does not fit even alone must not change the others' layout.
        new.lay_out(new.own_layout, torch.device("cpu"))
        layout_changed = binding.make_room(new.targets, new.lora_rank)
        if layout_changed:
            for other in others:
                other.lay_out(binding.layout, binding.device)
        new.lay_out(binding.layout, binding.device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        binding.set_layout(before)
        for other in others:
            if other.layout is not before:
                other.lay_out(before, binding.device)
        raise DoesNotFitError("no memory for another adapter") from error
    return layout_changed
