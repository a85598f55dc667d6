"""Optimizer, learning rate schedule and gradient clipping of one trial, with SFTTrainer's results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler
from trl.trainer.sft_config import SFTConfig

# Optimizers that update each value independently, so that a flat vector gives the same result as matrices.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd", "adagrad", "rmsprop")


class AdapterOptimizer:
    """Updates one adapter, a flat float32 vector `[P]`.

    The vector is divided into two parameters: the values before `image_start`, which every row trains, and
    the rest (adapters of cross-attention), which only rows with an image train. torch's optimizers do not
    change a parameter without a gradient, also not by weight decay or momentum. This happens to the second
    parameter in a step whose rows have no image, as with SFTTrainer.
    """

    def __init__(self, flat: Tensor, image_start: int, args: SFTConfig, max_steps: int) -> None:
        self.flat, self.image_start, self.max_grad_norm = flat, image_start, args.max_grad_norm
        self.gradient = torch.zeros_like(flat)
        self.parameters = [nn.Parameter(flat[:image_start]), nn.Parameter(flat[image_start:])]
        make, options = Trainer.get_optimizer_cls_and_kwargs(args)
        not_empty = [parameter for parameter in self.parameters if len(parameter)]
        self.optimizer = make([{"params": not_empty, "weight_decay": args.weight_decay}], **options)
        warmup, details = args.get_warmup_steps(max_steps), args.lr_scheduler_kwargs
        self.schedule = get_scheduler(args.lr_scheduler_type, self.optimizer, warmup, max_steps, details)  # type: ignore[arg-type]

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def step(self, *, has_images: bool) -> Tensor:
        """Update once with the accumulated gradient; returns the gradient's norm before clipping.

        The norm is a scalar tensor on the device.

        Args:
            has_images: whether any row of the step has an image.
        """
        parts = [self.gradient[: self.image_start], self.gradient[self.image_start :] if has_images else None]
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part if len(parameter) else None
        # In float64, because the layout, and with it the order of the sum, depends on the other trials'
        # ranks. In float32 they would change the last bits of the norm, and so of every clipped step.
        norm: Tensor = torch.linalg.vector_norm(self.gradient, dtype=torch.float64).float()
        if self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        self.optimizer.step()
        self.schedule.step()
        self.gradient.zero_()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint needs, as copies on the device.

        Returns:
            "flat": the optimizer's averages by name, `[P]` each.
            "parts": the rest of the optimizer's state, for each of the two parameters.
            "schedule": the state of the learning rate schedule.
        """
        parts = [self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        names = {name for part in parts for name, value in part.items() if _is_average(value)}
        flat = {name: torch.zeros_like(self.flat) for name in sorted(names)}
        for part, where in zip(parts, self._slices(), strict=True):
            for name in names & part.keys():
                flat[name][where] = part[name]
        others = [
            {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in part.items()
                if name not in names
            }
            for part in parts
        ]
        return {"flat": flat, "parts": others, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`, which may be on another device."""
        # A fused optimizer has its step counter on the parameters' device.
        fused = any(group.get("fused") for group in self.optimizer.param_groups)
        for parameter, part, where in zip(self.parameters, state["parts"], self._slices(), strict=True):
            if part:
                averages = {
                    name: value[where].to(self.flat.device, copy=True)
                    for name, value in state["flat"].items()
                }
                others = {
                    name: value.to(self.flat.device) if fused and isinstance(value, Tensor) else value
                    for name, value in part.items()
                }
                self.optimizer.state[parameter] = {**others, **averages}
        self.schedule.load_state_dict(state["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate

    def _slices(self) -> list[slice]:
        return [slice(0, self.image_start), slice(self.image_start, None)]


def _is_average(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1
