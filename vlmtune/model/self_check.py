"""Proof that a step computes what the plain transformers model computes, before a model trains.

The losses of some rows, and the gradient of B of every layer's LoRA at B = 0, come once from the model as
transformers made it, one row at a time, and once from the step as it will run, with the rows in one batch.
Where they differ, the acceleration at fault is found by leaving each out in turn.

For this the plain model gets LoRA from forward hooks alone. At B = 0 the gradient of A is zero and that of B
is linear in LoRA's scaling, which is left at 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.errors import ModelError
from vlmtune.library_errors import LIBRARY_ERRORS, first_line, lacks_memory
from vlmtune.model.acceleration import Acceleration
from vlmtune.model.causal import labelled_logits

Batch = dict[str, Tensor]

# Largest relative difference of a row's loss, and of the norm of all gradients, that rounding explains.
# Kernels that add in another order differ by more in half precision, and a mixture of experts may then choose
# other experts for a token; a wrong mask or lost features change both by a factor.
TOLERANCES = {torch.float32: (1e-4, 2e-3), torch.bfloat16: (3e-2, 0.15), torch.float16: (2e-2, 0.1)}


@dataclass(frozen=True)
class StepResult:
    """What a step makes of some rows.

    Attributes:
        losses: `[B]`, summed over the labelled tokens of each row.
        gradients: of B `[O, R]` of each layer by name, for the sum of these losses, at a scaling of 1.
    """

    losses: Tensor
    gradients: dict[str, Tensor]


def plain_result(base: Any, rows: Sequence[Batch], first: dict[str, Tensor]) -> StepResult:
    """The result of the model as transformers made it, one row at a time.

    Args:
        rows: batches of one row each, on the device, with labels.
        first: A `[R, D]` of each layer that gets an adapter, by its full name.
    """
    second = {
        name: torch.zeros(base.get_submodule(name).out_features, len(a), device=a.device, requires_grad=True)
        for name, a in first.items()
    }
    handles = [
        base.get_submodule(name).register_forward_hook(partial(_add_lora, a, second[name]))
        for name, a in first.items()
    ]
    losses = []
    try:
        with without_dropout(base):
            for row in rows:
                logits, labels = labelled_logits(base, row)
                loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
                if loss.requires_grad:
                    loss.backward()
                losses.append(loss.detach())
    finally:
        for handle in handles:
            handle.remove()
    gradients = {name: torch.zeros_like(b) if b.grad is None else b.grad for name, b in second.items()}
    return StepResult(torch.stack(losses), gradients)


def _add_lora(a: Tensor, b: Tensor, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    x = args[0].to(y.dtype)
    return y + nn.functional.linear(nn.functional.linear(x, a.to(y.dtype)), b.to(y.dtype))


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """The model in training mode without dropout inside the block; then as before, with the random state."""
    training = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.training = False
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def attention_has_dropout(model: Any) -> bool:
    """Whether the decoder's attention drops weights at random, which no module of its own does."""
    values: dict[str, Any] = model.config.get_text_config().to_dict()
    return any(bool(value) for name, value in values.items() if "att" in name and "drop" in name)


def difference(one: StepResult, other: StepResult) -> tuple[float, float]:
    """The largest relative difference of a loss, and the relative norm by which the gradients differ."""
    losses = ((one.losses - other.losses).abs() / other.losses.abs().clamp(min=1e-6)).max()
    squares = [torch.zeros(2, device=other.losses.device, dtype=torch.float64)]
    for name, gradient in other.gradients.items():
        apart = one.gradients[name].double() - gradient.double()
        squares.append(torch.stack([apart.square().sum(), gradient.double().square().sum()]))
    apart, norm = torch.stack(squares).sum(0).tolist()
    return float(losses), float((apart / max(norm, 1e-30)) ** 0.5)


@dataclass(frozen=True)
class StepComparison:
    """Compares a step with the plain model, and leaves out what makes them differ.

    Args:
        name: of the model, for messages.
        plain: the result of the plain model.
        dtype: that the step computes in.
        note: takes a line for the person who watches.
    """

    name: str
    plain: StepResult
    dtype: torch.dtype
    note: Callable[[str], None]

    def verify(
        self,
        accelerations: Sequence[Acceleration],
        together: Callable[[], StepResult],
        alone: Callable[[], StepResult],
    ) -> list[str]:
        """The names of the accelerations that are left out from now on.

        Args:
            together, alone: run the rows through the step in one batch, and one by one.

        Raises:
            ModelError: the step is wrong without any acceleration too.
        """
        problem = self._problem(together)
        if problem is None:
            return []
        for one in accelerations:
            one.switch(False)
            if self._problem(together) is None:
                self.note(left_out([one.name], problem))
                return [one.name]
            one.switch(True)
        for one in accelerations:
            one.switch(False)
        remaining = self._problem(together)
        if remaining is None:
            names = [one.name for one in accelerations]
            self.note(left_out(names, problem))
            return names
        if self._problem(alone) is None:
            raise ModelError(
                f"{self.name}: rows in one batch change each other's results, in transformers too (images "
                "are padded to the largest of the batch, or the like): give images of one size, or "
                "--trial_runner isolated --per_device_train_batch_size 1 --per_device_eval_batch_size 1"
            )
        raise ModelError(
            f"{self.name}: the self-check fails: {remaining}; --self_check false trains all the same"
        )

    def _problem(self, run: Callable[[], StepResult]) -> str | None:
        """What is wrong with a step, in words; None if it agrees with the plain model."""
        try:
            losses, gradients = difference(run(), self.plain)
        except LIBRARY_ERRORS as error:
            if lacks_memory(error):
                raise
            return f"the step fails ({first_line(error)})"
        allowed = TOLERANCES[self.dtype]
        if losses <= allowed[0] and gradients <= allowed[1]:  # not for NaN
            return None
        return f"losses differ by {losses:.1e} and gradients by {gradients:.1e} from plain transformers"


def left_out(names: Sequence[str], problem: str) -> str:
    """The line that says which accelerations are left out, and why."""
    return f"self-check: {' and '.join(names)} left out, steps are slower: with it {problem}"
