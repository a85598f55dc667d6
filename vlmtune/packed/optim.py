"""Optimizer, schedule and clipping of one trial: what SFTTrainer does for it alone, on the flat vector of
its adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler
from trl.trainer.sft_config import SFTConfig

# Those that treat every number of an adapter by itself, so that they do the same on a flat vector as on its
# matrices.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd", "adagrad", "rmsprop")


class AdapterOptimizer:
    """Steps of one adapter, float32 `[P]`, of which the first `always` numbers are trained by every row, the
    others by rows with a picture.

    torch's optimizers leave a parameter without a gradient alone, weight decay and momentum included: as
    cross-attention's adapters are in
    a step whose rows have no picture.
    """

    def __init__(self, flat: Tensor, always: int, args: SFTConfig, max_steps: int) -> None:
        self.flat, self.always, self.max_grad_norm = flat, always, args.max_grad_norm
        self.gradient = torch.zeros_like(flat)
        self.parameters = [nn.Parameter(flat[:always]), nn.Parameter(flat[always:])]
        make, options = Trainer.get_optimizer_cls_and_kwargs(args)
        used = [parameter for parameter in self.parameters if len(parameter)]
        self.optimizer = make([{"params": used, "weight_decay": args.weight_decay}], **options)
        warm_up, details = args.get_warmup_steps(max_steps), args.lr_scheduler_kwargs
        self.schedule = get_scheduler(args.lr_scheduler_type, self.optimizer, warm_up, max_steps, details)  # type: ignore[arg-type]

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def step(self, *, pictured: bool) -> Tensor:
        """One update with the gradient that was summed up; returns its norm before clipping, a tensor that
        is not waited for.

        `pictured`: whether any row of the step has a picture.
        """
        parts = [self.gradient[: self.always], self.gradient[self.always :] if pictured else None]
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part if len(parameter) else None
        norm: Tensor = self.gradient.norm()
        if self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        self.optimizer.step()
        self.schedule.step()
        self.gradient.zero_()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, copied: `flat`, the optimizer's averages as `[P]` by name; `parts`, what
        else it keeps; `schedule`."""
        parts = [self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        names = {name for part in parts for name, value in part.items() if _is_average(value)}
        flat = {name: torch.zeros_like(self.flat) for name in sorted(names)}
        for part, piece in zip(parts, self._pieces(), strict=True):
            for name in names & part.keys():
                flat[name][piece] = part[name]
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
        """Go on from a `state_dict`, which may be on another device."""
        fused = any(
            group.get("fused") for group in self.optimizer.param_groups
        )  # its counter of steps lies beside the parameters
        for parameter, part, piece in zip(self.parameters, state["parts"], self._pieces(), strict=True):
            if part:
                averages = {
                    name: value[piece].to(self.flat.device, copy=True)
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

    def _pieces(self) -> list[slice]:
        return [slice(0, self.always), slice(self.always, None)]


def _is_average(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1
