"""Which linear layers of a model get a LoRA adapter: `target_modules`.

The language model is what the model class itself calls its decoder. Everything else (vision tower, projector)
counts as vision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmtune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

ALL_LINEAR = "all-linear"

ATTENTION = re.compile(r"(^|[._])(attn|attention)\.")  # matches the full names of layers in attention modules


def target_modules(model: PreTrainedModel, names: list[str] | str | None, *, lora_vision: bool) -> list[str]:
    """The full names of the linear layers that get an adapter, in the model's order.

    The output head is never among them.

    Args:
        names: one of:
            - a list of bare names (`q_proj`, `self_attn.q_proj`) or full names, or one such name as a string
            - `all-linear`
            - a regular expression that must match a whole full name, as in PEFT
            - None for `DEFAULT_TARGETS`, or for all linear layers of attention modules if the decoder has
              other names for these
        lora_vision: whether names also match layers of the vision tower and projector.

    Raises:
        ModelError: a name or the pattern matches no linear layer, the pattern is not a regular expression,
            or it reaches vision layers without `lora_vision`.
    """
    linears = linear_names(model)
    prefix = language_prefix(model)
    allowed = linears if lora_vision else [name for name in linears if name.startswith(prefix)]
    if names == ALL_LINEAR:
        return allowed
    if isinstance(names, str) and not re.fullmatch(r"[\w.]+", names):
        return _matching_pattern(names, linears, allowed)
    if not names or list(names) == list(DEFAULT_TARGETS):
        return _default_targets(model, linears, allowed)
    bare = [names] if isinstance(names, str) else list(names)
    for target in bare:
        if not any(_ends_with(name, target) for name in allowed):
            in_vision = any(_ends_with(name, target) for name in linears)
            if in_vision:
                problem = f"{target!r} is found in the vision tower only: add --lora_vision"
            else:
                problem = f"no linear layer is called {target!r}; there are {_leaf_names(allowed)}"
            raise ModelError(f"lora_target_modules: {problem}")
    return [name for name in allowed if any(_ends_with(name, target) for target in bare)]


def _default_targets(model: PreTrainedModel, linears: list[str], allowed: list[str]) -> list[str]:
    """The layers `DEFAULT_TARGETS`; if the decoder lacks a name, all linear layers of attention."""
    decoder = [name for name in linears if name.startswith(language_prefix(model))]
    if not all(any(_ends_with(name, target) for name in decoder) for target in DEFAULT_TARGETS):
        attention = [name for name in allowed if ATTENTION.search(name)]
        if not attention:
            raise ModelError(
                "lora_target_modules: no linear layer of the decoder is part of an attention; "
                f"name some of {_leaf_names(allowed)}"
            )
        return attention
    return [name for name in allowed if any(_ends_with(name, target) for target in DEFAULT_TARGETS)]


def linear_names(model: PreTrainedModel) -> list[str]:
    """The full names of all linear layers but the output head, in the model's order."""
    from torch import nn

    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]


def language_prefix(model: PreTrainedModel) -> str:
    """The prefix of the names of the language model's modules, for example `model.language_model.`.

    Raises:
        ModelError: the model class does not say which of its parts is the language model.
    """
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        if module is decoder and name:
            return f"{name}."
    raise ModelError(
        f"{model.name_or_path}: {type(model).__name__} does not tell its language model from its vision tower"
    )


def _matching_pattern(pattern: str, linears: list[str], allowed: list[str]) -> list[str]:
    try:
        matching = [name for name in linears if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ModelError(
            f"lora_target_modules: {pattern!r} is neither a layer's name nor a regular expression: {error}"
        ) from error
    if not matching:
        raise ModelError(
            f"lora_target_modules: {pattern!r} matches no linear layer; a pattern must match a whole name "
            f"such as {allowed[0]} (there are {_leaf_names(allowed)})"
        )
    outside = [name for name in matching if name not in set(allowed)]
    if outside:
        raise ModelError(
            f"lora_target_modules: {pattern!r} reaches the vision tower ({outside[0]}): add --lora_vision, "
            f"or begin the pattern with the language model's name as in {allowed[0]}"
        )
    return matching


def _ends_with(name: str, target: str) -> bool:
    """Whether a full name matches a bare one, by PEFT's rule for lists of names."""
    return name == target or name.endswith(f".{target}")


def _leaf_names(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def shortest_targets(model: PreTrainedModel, names: list[str]) -> list[str] | str:
    """The shortest form in which PEFT matches exactly `names`: bare names, a pattern, or full names."""
    modules = [name for name, _ in model.named_modules()]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    if {name for name in modules if any(_ends_with(name, leaf) for leaf in leaves)} == set(names):
        return leaves
    pattern = rf"{re.escape(language_prefix(model))}.*\.({'|'.join(leaves)})"
    if {name for name in modules if re.fullmatch(pattern, name)} == set(names):
        return pattern
    return names
