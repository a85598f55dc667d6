"""Cached vision features: a frozen tower's output for a row is the same in every epoch and trial.

transformers takes a tower's outputs in place of pixels (`mm_encoder_outputs`), for most of its families. An
output has one vector for each image token of a row, in one tensor or several: Qwen3-VL's decoder also reads
inner layers of the tower. It is split by rows, kept on the device, and joined again for a batch's rows.

Multimodal position ids `[3, B, T]` follow from the row's tokens and image sizes. transformers computes them
in Python for each row of each batch, and waits for the device some seven times a row. They are cached too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.library_errors import LIBRARY_ERRORS, first_line, lacks_memory

Batch = dict[str, Tensor]
RowFeatures = list[Tensor]  # [image tokens of the row, D] for each tensor of an output

BYTES_WITHOUT_GPU = 2 * 2**30
SPARE_FRACTION = 0.8  # on a GPU, of the memory that the plan leaves free

NOT_READ = ("last_hidden_state", "hidden_states", "attentions")  # fields that the decoder does not read
# Relative difference of the decoder's inputs from features and from pixels: rounding of a tower.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class VisionFeatures:
    """The vision features of rows by their number in the store, on the device of the base.

    Whether a model takes features in place of pixels is tried with the first row: its decoder must get the
    same inputs. Else pixels go through the tower every time, and a line for the console says why.

    Args:
        max_bytes: memory that the features may take.
        note: takes a line for the console.

    Attributes:
        bytes: memory that the cached features take.
        image_token_id: of the tokens that the features replace; -1 where the config names none.
        positions: position ids `[3, T]` by row number and T, of decoders that take them on several axes.
    """

    def __init__(self, base: Any, *, max_bytes: float, note: Callable[[str], None]) -> None:
        self.base, self.max_bytes, self.note = base, max_bytes, note
        self.rows: dict[int, RowFeatures] = {}
        self.positions: dict[tuple[int, int], Tensor] = {}
        self.has_positions = False
        self.bytes = 0
        self.layout: OutputLayout | None = None
        names = ("image_token_id", "image_token_index")
        ids = [getattr(base.config, name, None) for name in names]
        self.image_token_id: int = next((token for token in ids if token is not None), -1)
        if not has_fixed_tower(base):
            self.max_bytes = 0

    def cached(self, rows: Sequence[int]) -> list[RowFeatures] | None:
        """The features of rows; None where one of them is not cached."""
        features = [self.rows.get(row) for row in rows]
        return None if None in features else features  # type: ignore[return-value]

    def inputs(self, features: Sequence[RowFeatures]) -> dict[str, Any]:
        """The model's inputs that replace the pixels of rows with images, in their order."""
        assert self.layout is not None, "call compute first"
        return self.layout.inputs(features)

    def batch_inputs(self, features: Sequence[RowFeatures | None], batch: Batch) -> dict[str, Any]:
        """The model's inputs that replace the pixels of a batch, of which some rows have no image (None).

        Args:
            batch: the batch without its pixels. Mllama's features are padded to its number of tiles.
        """
        return self.inputs([row for row in features if row is not None])

    def position_ids(self, keys: Sequence[tuple[int, int]], length: int) -> dict[str, Tensor]:
        """The model's position ids for rows padded to `length` tokens on the right, where all are cached."""
        if not self.has_positions or any(key not in self.positions for key in keys):
            return {}
        padded = [nn.functional.pad(self.positions[key], (0, length - key[1]), value=1) for key in keys]
        return {"position_ids": torch.stack(padded, dim=1)}

    def compute(self, row: int, tokens: int, batch: Batch) -> RowFeatures | None:
        """Run the tower on one row, and cache its features if there is memory for them.

        Args:
            row: its number.
            tokens: how many image tokens it has.
            batch: the model's inputs, on the device, with pixels. It may have padding on the right.

        Returns:
            The features; None where the pixels have to go through the model.
        """
        if not self.max_bytes:
            return None
        try:
            features, layout = self._run_tower(tokens, batch)
            inputs = {**without_pixels(batch), **layout.inputs([features])}
        except UnsupportedTowerError as error:
            self._give_up(str(error))
            return None
        if self.layout is None:
            difference = decoder_difference(self.base, batch, inputs)
            if not difference <= TOLERANCES[self.base.dtype]:
                self._give_up(f"the decoder would get other inputs (relative difference {difference:.1e})")
                return None
            self.layout = layout
            self.has_positions = takes_multimodal_positions(self.base, inputs)
        self.keep(row, features)
        self.add_positions(row, inputs)
        return features

    def keep(self, row: int, features: RowFeatures) -> None:
        """Cache the features of a row if there is memory for them."""
        size = sum(leaf.numel() * leaf.element_size() for leaf in features)
        if row not in self.rows and self.bytes + size <= self.max_bytes:
            # Copies: a captured tower writes its next output to the same memory.
            self.rows[row] = [leaf.clone() for leaf in features]
            self.bytes += size

    def add_positions(self, row: int, inputs: dict[str, Any]) -> None:
        """Cache the position ids of a row, given the model's inputs for it alone; not where it needs none."""
        if self.has_positions:
            length = int(inputs["attention_mask"].sum())
            positions = decoder_inputs(self.base, inputs).get("position_ids")
            if positions is None:  # a row without an image: every axis counts its tokens
                axes = len(next(iter(self.positions.values())))
                positions = torch.arange(length, device=self.base.device).expand(axes, 1, length)
            self.positions[row, length] = positions[:, 0, :length].clone()

    def disable(self) -> bool:
        """Drop the features and cache none from now on, to free memory; returns whether there were any."""
        self.rows.clear()
        self.positions.clear()
        self.bytes, self.max_bytes, before = 0, 0, self.bytes
        return before > 0

    def _give_up(self, reason: str) -> None:
        self.disable()
        self.note(f"vision features are not cached, pixels go through the tower in every epoch: {reason}")

    @torch.no_grad()
    def _run_tower(self, tokens: int, batch: Batch) -> tuple[RowFeatures, OutputLayout]:
        encode = getattr(self.base.base_model, "get_image_features", None)
        if encode is None:
            raise UnsupportedTowerError(f"{type(self.base).__name__} has no get_image_features")
        known = inspect.signature(encode).parameters
        try:
            output = encode(**{name: tensor for name, tensor in batch.items() if name in known})
        except LIBRARY_ERRORS as error:
            if lacks_memory(error):
                raise
            raise UnsupportedTowerError(f"its image features fail ({first_line(error)})") from error
        layout, tensors = OutputLayout.of(output, tokens)
        return tensors, layout


def room_for_features(device: torch.device, spare_bytes: float) -> float:
    """Bytes that features may take where a plan leaves `spare_bytes` bytes of the GPU free."""
    return spare_bytes * SPARE_FRACTION if device.type == "cuda" else BYTES_WITHOUT_GPU


class UnsupportedTowerError(Exception):
    """A tower's output that cannot be split by rows."""


@dataclass(frozen=True)
class OutputLayout:
    """How a tower's output is made of one tensor [image tokens, D] or several.

    Attributes:
        kind: the class of the output.
        fields: for each field in use, "tensor", "images" (a sequence with a tensor for each image), "levels"
            (one for each inner layer) or "levels of images"; and its number of tensors [image tokens, D].
    """

    kind: type[Any]
    fields: dict[str, tuple[str, int]]

    @classmethod
    def of(cls, output: Any, tokens: int) -> tuple[OutputLayout, list[Tensor]]:
        """The layout of an output for `tokens` image tokens, and its tensors [tokens, D].

        Raises:
            UnsupportedTowerError: it has something else in it.
        """
        if not isinstance(output, dict):  # transformers' outputs are
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
        """The model's input for the features of these rows."""
        joined = iter([torch.cat(parts) for parts in zip(*rows, strict=True)])
        values: dict[str, Any] = {}
        for name, (structure, count) in self.fields.items():
            values[name] = _joined(structure, [next(joined) for _ in range(count)])
        try:
            return {"mm_encoder_outputs": {"image": self.kind(**values)}}
        except TypeError as error:  # it has fields that the decoder does not read
            raise UnsupportedTowerError(f"{self.kind.__name__} cannot be made again: {error}") from error


def _joined(structure: str, tensors: list[Tensor]) -> Any:
    """A field's value from its tensors, the inverse of `_parts`: each tensor stands for all images."""
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


def without_pixels(batch: Batch) -> Batch:
    """The batch without what only the tower reads: its floating-point tensors. Grids stay, for positions."""
    return {name: tensor for name, tensor in batch.items() if not is_pixels(tensor)}


def is_pixels(tensor: Tensor) -> bool:
    """Whether a batch's tensor holds pixels: only these are uint8 (stored) or floating-point (normalised)."""
    return tensor.is_floating_point() or tensor.dtype == torch.uint8


class _DecoderReachedError(Exception):
    """Ends a forward pass before its decoder runs."""


@torch.no_grad()
def decoder_difference(base: Any, one: Batch, other: dict[str, Any]) -> float:
    """The largest relative difference of a tensor that the decoder gets from two sets of inputs.

    Infinite where the tensors are not the same ones, or where a set cannot be used. The decoder does not run.
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
    """Whether the decoder gets position ids on several axes, the same ones where the model is given them."""
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
    """What the decoder is called with: its position ids, and the floating-point tensors by place.

    Empty if it is not reached. The decoder does not run.
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
        return {}  # it does not take these inputs
    finally:
        hook.remove()
    return {}


def has_fixed_tower(base: Any) -> bool:
    """Whether the base has a vision tower that gives an image the same output each time: without dropout."""
    vision = getattr(base.config, "vision_config", None)
    return vision is not None and not any(
        value for name, value in vision.to_dict().items() if "dropout" in name
    )
