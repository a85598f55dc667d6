"""The log-probabilities of a batch's labels, from TRL's fused head or from the model class's own logits.

TRL's fused head multiplies hidden states with the output head's weights, in tiles. Some model classes compute
other logits: they ignore a scale of the decoder's config, or mask image tokens. transformers generates with
the class's logits, so if the two differ, training and `eval_loss` use the class's logits too. On a GPU the
fused head finds the labelled positions itself. On other devices it would compute logits at all positions,
most of which have no label, so the positions are passed to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from vlmtune.data.encoded_example import IGNORED
from vlmtune.library_errors import LIBRARY_ERRORS

# The number of positions is rounded up to a multiple of this, so that it rarely changes.
POSITIONS_MULTIPLE = 8
# Allowed relative difference of the log-probabilities of TRL's head and of the class, for the same hidden
# states.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def log_probs_at_labels(model: Any, batch: dict[str, Tensor]) -> Any:
    """The log-probability of each label of a batch.

    Args:
        model: a model with TRL's fused head, on which `add_positions_argument` was called.

    Returns:
        TRL's output with `log_probs`, `is_top1` (whether the label is the most probable token) and
        `label_mask`, each [B, K]. The first two are zero where there is no label. K is the number of
        positions at which any row of the batch has a label, rounded up.
    """
    labels = batch["labels"]
    if labels.is_cuda:
        return model(**batch, use_cache=False, fused_lm_head=True)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    shifted = labels[:, 1:]
    positions = labelled_positions(shifted)
    return model(
        **inputs,
        shift_labels=shifted[:, positions],
        positions=positions,
        use_cache=False,
        fused_lm_head=True,
    )


def labelled_positions(shifted: Tensor) -> Tensor:
    """The positions at which any row of `[B, T]` labels has a label, and a few more: `[K]`."""
    labelled = (shifted != IGNORED).any(0).nonzero().squeeze(1)
    missing = -len(labelled) % POSITIONS_MULTIPLE if len(labelled) else POSITIONS_MULTIPLE
    others = (shifted == IGNORED).all(0).nonzero().squeeze(1)[:missing]
    return torch.cat([labelled, others]).sort().values


def add_positions_argument(base: Any) -> None:
    """Give `base`, in place, an argument `positions`, at which alone it computes logits and loss.

    `base` must have TRL's head. If that head differs from the class's own logits, the latter are used
    instead.
    """
    if not fused_head_agrees(base):
        _use_class_logits(base)
        return
    backbone = base.base_model
    forward_all = backbone.forward

    @wraps(forward_all)
    def forward(*args: Any, positions: Tensor | None = None, **kwargs: Any) -> Any:
        outputs = forward_all(*args, **kwargs)
        if positions is not None:
            outputs.last_hidden_state = outputs.last_hidden_state[:, positions]
        return outputs

    backbone.forward = forward


def fused_head_agrees(base: Any) -> bool:
    """Whether TRL's head and the class have the same log-probabilities for random hidden states."""
    backbone = base.base_model
    if backbone is base:
        return False  # the class has no backbone of its own
    head = base.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(1, POSITIONS_MULTIPLE, head.weight.shape[-1], generator=generator)
    hidden_states = hidden_states.to(head.weight.device, base.dtype)
    ids = torch.arange(POSITIONS_MULTIPLE, device=hidden_states.device)[None] % head.weight.shape[0]
    with torch.no_grad(), _returning_hidden_states(backbone, hidden_states):
        try:
            own = base(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            fused = base(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs
        except LIBRARY_ERRORS:  # the backbone's output is not what the head takes
            return False
    if own.shape[:2] != ids.shape or own.shape[-1] <= int(ids.max()):
        return False
    expected = own[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    difference = (expected - fused).abs().max() / expected.abs().mean()
    return bool(difference <= TOLERANCES[base.dtype])


class _Output(dict[Any, Any]):
    """A backbone's output with hidden states only."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


@contextmanager
def _returning_hidden_states(backbone: Any, hidden_states: Tensor) -> Iterator[None]:
    """In the block, `backbone` returns these hidden states for any input."""
    forward = backbone.forward
    backbone.forward = lambda *args, **kwargs: _Output({"last_hidden_state": hidden_states, 0: hidden_states})
    try:
        yield
    finally:
        backbone.forward = forward


def _use_class_logits(base: Any) -> None:
    """Make `base` compute the fused head's outputs from its class's logits, in place."""
    class_forward = base.forward
    takes_logits_to_keep = "logits_to_keep" in inspect.signature(type(base).forward).parameters

    @wraps(class_forward)
    def forward(
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            with_labels = {"labels": labels} if labels is not None else {}
            return class_forward(*args, **with_labels, **kwargs)
        if shift_labels is None or positions is None:
            assert labels is not None, "log-probabilities are those of labels"
            positions = labelled_positions(labels[:, 1:])
            shift_labels = labels[:, 1:][:, positions]
        options = {"logits_to_keep": positions} if takes_logits_to_keep else {}
        logits = class_forward(*args, **options, **kwargs).logits
        if logits.shape[1] != len(positions):  # the class ignores `logits_to_keep`
            logits = logits[:, positions]
        mask = shift_labels != IGNORED
        log_probs = logits.float().log_softmax(-1).gather(-1, shift_labels.clamp(min=0)[..., None])[..., 0]
        correct = logits.argmax(-1) == shift_labels
        return FusedCausalLMOutput(
            log_probs=log_probs.masked_fill(~mask, 0), is_top1=correct & mask, label_mask=mask
        )

    base.forward = forward
