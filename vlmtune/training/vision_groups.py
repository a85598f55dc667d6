"""Set a separate learning rate for the trained weights of vision tower and projector."""

from typing import Any

from torch.optim import Optimizer

from vlmtune.model.lora_targets import language_prefix

PEFT_PREFIX = "base_model.model."


def set_vision_learning_rate(optimizer: Optimizer, model: Any, rate: float) -> None:
    """Move the parameters of vision tower and projector to parameter groups with another learning rate.

    The groups of the language model come first, because the Trainer logs the learning rate of the first
    group.

    Args:
        optimizer: the Trainer's optimizer, before its scheduler is made.
        model: the base with its adapter.
    """
    base = model.get_base_model()
    prefix, head = language_prefix(base), base.get_output_embeddings()
    of_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    vision = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and not name.removeprefix(PEFT_PREFIX).startswith(prefix)
        and id(parameter) not in of_head
    }
    added = []
    for group in optimizer.param_groups:
        beside = [parameter for parameter in group["params"] if id(parameter) in vision]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in vision]
        if beside:
            added.append({**group, "params": beside, "lr": rate})
    optimizer.param_groups[:] = [*(group for group in optimizer.param_groups if group["params"]), *added]
