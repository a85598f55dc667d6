"""The output of a vision tower as tensors with one vector for each image token, and back: `OutputLayout`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RowFeatures = list[Tensor]  # [image tokens of the row, D] for each tensor of an output

# Fields of a tower's output that the decoder does not read.
NOT_READ = ("last_hidden_state", "hidden_states", "attentions")


class UnsupportedTowerError(Exception):
    """A tower's output cannot be split by rows. The message says why."""


@dataclass(frozen=True)
class OutputLayout:
    """How a tower's output is made up of tensors [image tokens, D].

    Attributes:
        kind: the class of the output.
        fields: for each field that the decoder reads, (structure, number of tensors). The structure is
            "tensor", "images" (a tensor for each image), "levels" (a tensor for each inner layer of the tower
            that the decoder reads) or "levels of images".
    """

    kind: type[Any]
    fields: dict[str, tuple[str, int]]

    @classmethod
    def of(cls, output: Any, tokens: int) -> tuple[OutputLayout, list[Tensor]]:
        """The layout of an output for `tokens` image tokens, and its tensors [tokens, D].

        Raises:
            UnsupportedTowerError: the output has another structure.
        """
        if not isinstance(output, dict):  # transformers' outputs are dicts
            raise UnsupportedTowerError(f"the tower returns a {type(output).__name__}")
        fields: dict[str, tuple[str, int]] = {}
        tensors: list[Tensor] = []
        for name, value in output.items():
            if name not in NOT_READ:
                structure, parts = _parts(value, tokens)
                fields[name] = structure, len(parts)
                tensors += parts
        if not tensors or any(len(tensor) != tokens for tensor in tensors):
            sizes = ", ".join(str(len(tensor)) for tensor in tensors)
            raise UnsupportedTowerError(f"the tower gives {sizes or 'no'} vectors for {tokens} image tokens")
        return cls(type(output), fields), tensors

    def inputs(self, rows: Sequence[RowFeatures]) -> dict[str, Any]:
        """The argument of the model that holds the features of these rows, by its name."""
        joined = iter([torch.cat(parts) for parts in zip(*rows, strict=True)])
        values: dict[str, Any] = {}
        for name, (structure, count) in self.fields.items():
            values[name] = _joined(structure, [next(joined) for _ in range(count)])
        try:
            return {"mm_encoder_outputs": {"image": self.kind(**values)}}
        except TypeError as error:  # its class requires a field that the decoder does not read
            raise UnsupportedTowerError(f"{self.kind.__name__} cannot be made again: {error}") from error


def _joined(structure: str, tensors: list[Tensor]) -> Any:
    """The value of a field from its tensors, the inverse of `_parts`. Each tensor covers all images."""
    if structure == "tensor":
        return tensors[0]
    if structure == "images":
        return tuple(tensors)
    return tensors if structure == "levels" else [(tensor,) for tensor in tensors]


def _parts(value: Any, tokens: int) -> tuple[str, list[Tensor]]:
    """The structure of a field's value, as `OutputLayout` names it, and its tensors [tokens, D]."""
    if isinstance(value, Tensor):
        return "tensor", [value.flatten(0, -2)]
    if isinstance(value, list | tuple) and value and all(isinstance(part, Tensor) for part in value):
        flat = [part.flatten(0, -2) for part in value]
        if len(flat) > 1 and all(len(part) == tokens for part in flat):
            return "levels", flat
        return "images", [torch.cat(flat)]
    if isinstance(value, list | tuple) and value and all(isinstance(part, list | tuple) for part in value):
        return "levels of images", [torch.cat([image.flatten(0, -2) for image in level]) for level in value]
    raise UnsupportedTowerError(f"the tower's output has a {type(value).__name__} in it")
