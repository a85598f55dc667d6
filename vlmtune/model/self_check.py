"""Compare a step with the plain transformers model before training (`--self_check`).

For some rows, the losses and the gradients of each layer's LoRA matrix B, with B set to zero, are computed
twice: by the model as transformers loads it, one row at a time, and by the step as it will run, with the rows
in one batch. If they differ, the acceleration that causes it is found by switching each one off in turn.

In the plain model, forward hooks add LoRA. At B = 0 the gradient of A is zero, and that of B is linear in
LoRA's scaling, which is 1 here.
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

# Largest relative difference of a row's loss, and of all gradients, that rounding can cause. In half
# precision, kernels that sum in another order differ by more, and a mixture of experts may choose other
# experts for a token. A wrong mask or lost features change both by a factor.
TOLERANCES = {torch.float32: (1e-4, 2e-3), torch.bfloat16: (3e-2, 0.15), torch.float16: (2e-2, 0.1)}


@dataclass(frozen=True)
class StepResult:
    """The result of a step on some rows.

    Attributes:
        losses: the loss of each row, summed over its labelled tokens, `[rows]`.
        gradients: the gradient of each layer's B `[O, R]` by layer name, for the sum of the losses, with a
            LoRA scaling of 1.
    """

    losses: Tensor
    gradients: dict[str, Tensor]


def plain_result(base: Any, rows: Sequence[Batch], initial_a: dict[str, Tensor]) -> StepResult:
    """The result of the model as transformers loads it, one row at a time.

    Args:
        rows: batches of one row each, on the device, with labels.
        initial_a: A `[R, D]` of each layer that gets an adapter, by its full name.
    """
    initial_b = {
        name: torch.zeros(base.get_submodule(name).out_features, len(a), device=a.device, requires_grad=True)
        for name, a in initial_a.items()
    }
    handles = [
        base.get_submodule(name).register_forward_hook(partial(_add_lora, a, initial_b[name]))
        for name, a in initial_a.items()
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
    gradients = {name: torch.zeros_like(b) if b.grad is None else b.grad for name, b in initial_b.items()}
    return StepResult(torch.stack(losses), gradients)


def _add_lora(a: Tensor, b: Tensor, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    x = args[0].to(y.dtype)
    return y + nn.functional.linear(nn.functional.linear(x, a.to(y.dtype)), b.to(y.dtype))


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """In the block, the model is in training mode without dropout.

    Modes and random state are restored after it.
    """
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
    """Whether the decoder's attention has dropout, which `without_dropout` cannot switch off."""
    values: dict[str, Any] = model.config.get_text_config().to_dict()
    return any(bool(value) for name, value in values.items() if "att" in name and "drop" in name)


def difference(one: StepResult, other: StepResult) -> tuple[float, float]:
    """The largest relative difference of a row's loss, and the relative norm of the gradients' difference."""
    losses = ((one.losses - other.losses).abs() / other.losses.abs().clamp(min=1e-6)).max()
    squares = [torch.zeros(2, device=other.losses.device, dtype=torch.float64)]
    for name, gradient in other.gradients.items():
        apart = one.gradients[name].double() - gradient.double()
        squares.append(torch.stack([apart.square().sum(), gradient.double().square().sum()]))
    apart, norm = torch.stack(squares).sum(0).tolist()
    return float(losses), float((apart / max(norm, 1e-30)) ** 0.5)


@dataclass(frozen=True)
class StepComparison:
    """Compares a step with the plain model, and switches off accelerations that make them differ.

    Args:
        name: the model's name, for messages.
        plain: the result of the plain model.
        dtype: the dtype that the step computes in.
        note: called with each line for the console.
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
        """Compare, and switch accelerations off if needed; returns the names of those that stay off.

        Args:
            accelerations: the accelerations of the step.
            together: runs the step with the rows in one batch.
            alone: runs the step with one row at a time.

        Raises:
            ModelError: the step differs even without any acceleration.
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
                f"{self.name}: rows in one batch change each other's results, even without accelerations "
                "(images are padded to the largest of the batch, or the like): give images of one size, or "
                "--trial_runner isolated --per_device_train_batch_size 1 --per_device_eval_batch_size 1"
            )
        raise ModelError(
            f"{self.name}: the self-check fails: {remaining}; to train anyway: --self_check false"
        )

    def _problem(self, run: Callable[[], StepResult]) -> str | None:
        """How a step differs from the plain model, in words; None if it does not."""
        try:
            losses, gradients = difference(run(), self.plain)
        except LIBRARY_ERRORS as error:
            if lacks_memory(error):
                raise
            return f"the step fails ({first_line(error)})"
        allowed = TOLERANCES[self.dtype]
        if losses <= allowed[0] and gradients <= allowed[1]:  # False for NaN
            return None
        return f"losses differ by {losses:.1e} and gradients by {gradients:.1e} from plain transformers"


def left_out(names: Sequence[str], problem: str) -> str:
    """The console line that says which accelerations are switched off, and why."""
    them = "it" if len(names) == 1 else "them"
    return f"self-check: {' and '.join(names)} left out, steps are slower: with {them}, {problem}"
