"""The tensors that a model passes to its decoder, found without running the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.library_errors import LIBRARY_ERRORS, lacks_memory

Batch = dict[str, Tensor]


class _DecoderReachedError(Exception):
    """Raised by a hook to end a forward pass before its decoder runs."""


@torch.no_grad()
def decoder_difference(base: Any, one: Batch, other: dict[str, Any]) -> float:
    """The largest relative difference between the tensors that the decoder gets from two sets of inputs.

    It is infinite if the decoder gets different tensors, or the model does not take one of the sets. The
    decoder does not run.
    """
    found = [decoder_inputs(base, inputs) for inputs in (one, other)]
    if not all(found) or found[0].keys() != found[1].keys():
        return float("inf")
    differences = [0.0]
    for name, tensor in found[0].items():
        twin = found[1][name]
        if tensor.shape != twin.shape:
            return float("inf")
        norm = tensor.double().norm().clamp(min=1e-12)
        differences.append(float((tensor.double() - twin.double()).norm() / norm))
    return max(differences)


@torch.no_grad()
def takes_multimodal_positions(base: Any, inputs: dict[str, Any]) -> bool:
    """Whether the decoder gets position ids on several axes, and the model passes given ones on unchanged."""
    computed = decoder_inputs(base, inputs)
    positions = computed.get("position_ids")
    if positions is None or positions.ndim != 3:
        return False
    passed = decoder_inputs(base, {**inputs, "position_ids": positions})
    return passed.keys() == computed.keys() and all(
        torch.equal(tensor, passed[name]) for name, tensor in computed.items()
    )


@torch.no_grad()
def decoder_inputs(base: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The decoder's arguments that are position ids or floating-point tensors, by name or position.

    Empty if the decoder is not called. The decoder does not run.
    """
    found: dict[str, Tensor] = {}

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def collect(name: str, value: Any) -> None:
            if isinstance(value, Tensor) and (value.is_floating_point() or name == "position_ids"):
                found[name] = value
            elif isinstance(value, list | tuple):
                for number, part in enumerate(value):
                    collect(f"{name}.{number}", part)

        for name, value in [*((str(number), value) for number, value in enumerate(args)), *kwargs.items()]:
            collect(name, value)
        raise _DecoderReachedError

    rest = {name: value for name, value in inputs.items() if name != "labels"}
    hook = base.get_decoder().register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        base.base_model(**rest, use_cache=False)
    except _DecoderReachedError:
        return found
    except LIBRARY_ERRORS as error:
        if lacks_memory(error):
            raise
        return {}  # the model does not take these inputs
    finally:
        hook.remove()
    return {}
