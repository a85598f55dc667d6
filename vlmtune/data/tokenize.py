"""One conversation → token ids, the kind of each token (`EncodedExample.kinds`) and image tensors.

The model's own processor makes them. An item is one image or one video of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmtune.data.box_formats import BoxWriter
from vlmtune.data.chat_template import ChatTemplate, ChatText
from vlmtune.data.encoded_example import ANSWER, EncodedExample
from vlmtune.data.input_format import (
    ITEMS,
    NO_VIDEOS,
    UINT8_VIDEOS,
    InputFormat,
    TensorLayout,
    as_array,
    is_ragged,
)
from vlmtune.data.labels import token_kinds
from vlmtune.data.template_rendering import EncodeError
from vlmtune.data.video_frames import Video
from vlmtune.library_errors import LIBRARY_ERRORS, first_line, lacks_memory

Message = dict[str, Any]
# Messages, images, and perhaps videos, of one row.
Row = (
    tuple[Sequence[Message], Sequence[Image.Image]]
    | tuple[Sequence[Message], Sequence[Image.Image], Sequence[Video]]
)

# Entries of a processor's output that are no inputs of the model, or that vlmtune makes elsewhere. `labels`
# are discarded, because a processor's labels are for another task than the conversation's answers.
NOT_MODEL_TENSORS = (
    "input_ids",
    "attention_mask",
    "labels",
    "offset_mapping",
    "text_replacement_offsets",
    "special_tokens_mask",
    "length",
)


RAW_PIXELS = {"do_rescale": False, "do_normalize": False}


@dataclass(frozen=True)
class Features:
    """What a processor makes of a batch of rows.

    Attributes:
        ids: `[B, T]`.
        offsets: `[B, T, 2]`, characters of each token in the text that was tokenized; None if unknown.
        image_replacements: for each row, the image tokens that it expanded: old and new span, and new text.
        tensors: the model's other inputs; a list of tensors where items have different sizes.
    """

    ids: np.ndarray
    offsets: np.ndarray | None
    image_replacements: list[list[dict[str, Any]]]
    tensors: dict[str, Any]


class RowEncoder:
    """Turns conversations into examples with one model's processor.

    Args:
        processor: a transformers processor with a tokenizer and an image processor.
        input_format: how its tensors are stored, as `find_input_format` finds it.
        box_format: how its model writes boxes, as `box_formats.box_format_name` gives it.
        video_frames: how many frames are read of a video; None where none is read.

    Raises:
        ModelError: the processor is not one for conversations with images.
    """

    def __init__(
        self,
        processor: Any,
        input_format: InputFormat | None = None,
        box_format: str = "unknown",
        video_frames: int | None = None,
    ) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.input_format = InputFormat() if input_format is None else input_format
        self.template = ChatTemplate(processor)
        self.boxes = BoxWriter(box_format, processor.image_processor)
        self.video_frames = video_frames

    @cached_property
    def vision_token_ids(self) -> list[int]:
        """The tokens that stand for an image or a video in the model's input."""
        ids = getattr(self.processor, "image_token_id", None)
        if ids is None:
            ids = self.tokenizer.convert_tokens_to_ids(self.template.renderer.image_token)
        found = [ids] if isinstance(ids, int) else list(ids or [])
        if self.template.renderer.video_token is not None:
            found.append(self.tokenizer.convert_tokens_to_ids(self.template.renderer.video_token))
        return found

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image],
        videos: Sequence[Video] = (),
        pixels: Sequence[np.ndarray] | None = None,
    ) -> EncodedExample:
        """Tokenize one conversation of typed parts, with its images and videos in the order of their parts.

        Args:
            pixels: `[height, width, 3]` uint8 of each image, where the caller has copied them out of Pillow,
                which costs 0.2 ms.

        Raises:
            EncodeError: a text holds one of the model's special tokens, the template or the processor cannot
                take the conversation, or its answers cannot be found again in the tokens.
        """
        chat = self.template.render(messages)
        if videos and self.input_format.videos == NO_VIDEOS:
            raise EncodeError(
                "the row has a video, and this model's processor has no way to read one that is supported: "
                "save its frames as images"
            )
        features = self._call(
            [chat.text],
            [self._image_inputs(images, pixels)],
            [videos],
            skip_normalization=self.input_format.stores_uint8_pixels,
        )
        ids = features.ids[0]
        offsets = None if features.offsets is None else features.offsets[0]
        kinds, problem = token_kinds(
            self.tokenizer,
            chat,
            self.template.renderer.image_token,
            self.vision_token_ids,
            ids,
            offsets,
            features.image_replacements[0],
        )
        if problem is not None:
            raise EncodeError(f"its answers are not found again in its tokens: {problem}")
        tensors = {name: self._stored(name, value) for name, value in features.tensors.items()}
        axes = self.input_format.token_axes(tensors, len(ids))
        return _move_trailing_tokens(EncodedExample(ids, kinds, tensors, axes))

    def features(self, rows: Sequence[Row], *, skip_normalization: bool = False) -> Features:
        """The processor's own batch of rows, padded on the right.

        Args:
            skip_normalization: leave the pixels as they are after resizing.
        """
        texts = [self.template.render(row[0]).text for row in rows]
        videos = [row[2] if len(row) == 3 else () for row in rows]
        images = [self._image_inputs(row[1]) for row in rows]
        return self._call(texts, images, videos, skip_normalization=skip_normalization)

    def chat_text(self, messages: Sequence[Message]) -> str:
        """The conversation as the text that the processor gets."""
        return self.template.render(messages).text

    def end_token_id(self) -> int:
        """The token that closes an answer."""
        question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
        text = self.chat_text([question, answer])  # the template's text ends with the answer's end token
        return int(self.tokenizer(text, add_special_tokens=False)["input_ids"][-1])

    def _image_inputs(
        self, images: Sequence[Image.Image], pixels: Sequence[np.ndarray] | None = None
    ) -> Sequence[Image.Image] | Sequence[torch.Tensor]:
        """The images as the processor gets them."""
        if not self.input_format.images_as_tensors:
            return images
        # numpy puts the channels first in 0.3 ms, torch in 0.7.
        arrays = map(np.asarray, images) if pixels is None else pixels
        return [torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))) for array in arrays]

    def _call(
        self,
        texts: list[str],
        images: Sequence[Sequence[Image.Image] | Sequence[torch.Tensor]],
        videos: Sequence[Sequence[Video]],
        *,
        skip_normalization: bool,
    ) -> Features:
        """The processor's features of texts with their images and videos."""
        options: dict[str, Any] = {"return_text_replacement_offsets": True}
        if self.tokenizer.is_fast:
            options["return_offsets_mapping"] = True
        if len(texts) > 1:
            options |= {"padding": True, "padding_side": "right"}
        if any(images):
            rows = [list(row) for row in images]
            options["images"] = (
                rows if self.input_format.nested_images else [image for row in rows for image in row]
            )
            options["images_kwargs"] = RAW_PIXELS if skip_normalization else {}
        if any(videos):
            every = [video for row in videos for video in row]
            options["videos"] = [video.frames for video in every]
            options["video_metadata"] = [video.metadata for video in every]
            raw_videos = skip_normalization and self.input_format.videos == UINT8_VIDEOS
            options["videos_kwargs"] = {"do_sample_frames": False, **(RAW_PIXELS if raw_videos else {})}
        bos = self.tokenizer.bos_token
        options["add_special_tokens"] = not (bos and texts[0].startswith(bos))
        try:
            features = self._processed(texts, options)
        except LIBRARY_ERRORS as error:
            if lacks_memory(error):
                raise
            raise EncodeError(f"the model's processor refuses this row: {first_line(error)}") from error
        return _as_features(features, len(texts))

    def _processed(self, texts: list[str], options: dict[str, Any]) -> dict[str, Any]:
        # Only images and videos become tensors: transformers takes 1.5 ms to turn a row's offsets into one.
        tensors: dict[str, Any] = {
            name: {**options[name], "return_tensors": "pt"}
            for name in ("images_kwargs", "videos_kwargs")
            if name in options
        }
        try:
            return dict(self.processor(text=texts, **{**options, **tensors}))
        except ValueError:
            if len(texts) > 1 or not tensors:
                raise
        # Items of one row may have different sizes, which makes no tensor: take them as they are.
        return dict(self.processor(text=texts, **options))

    def _stored(self, name: str, value: Any) -> np.ndarray:
        """A tensor as the store holds it."""
        layout = self.input_format.layouts.get(name, TensorLayout(ITEMS, ragged=is_ragged(value)))
        array = as_array(value, layout)
        return _as_uint8(array) if name in self.input_format.normalizations else array


def _as_features(features: dict[str, Any], rows: int) -> Features:
    ids = as_array(features["input_ids"]).astype(np.int32)
    offsets = features.get("offset_mapping")
    image_replacements = features.get("text_replacement_offsets")
    if not isinstance(image_replacements, list) or len(image_replacements) != rows:  # it reports nothing
        image_replacements = [[]] * rows
    tensors = {}
    for name, value in features.items():
        if name not in NOT_MODEL_TENSORS and (tensor := _tensor(value)) is not None:
            tensors[name] = tensor
    return Features(
        ids,
        None if offsets is None else as_array(offsets).reshape(*ids.shape, 2).astype(np.int64),
        image_replacements,
        tensors,
    )


def _tensor(value: Any) -> Any:
    """A tensor, a list of tensors of different sizes, or None for what is neither."""
    if isinstance(value, torch.Tensor):
        return value
    try:
        tensor = torch.from_numpy(as_array(value))
        # A list of floats has torch's default type, as transformers' own tensors do.
        return tensor.float() if isinstance(value, list) and tensor.dtype == torch.float64 else tensor
    except ValueError:
        pass
    items = [_tensor(item) for item in value] if isinstance(value, list | tuple) else [None]
    return items if items and all(isinstance(item, torch.Tensor) for item in items) else None


def _move_trailing_tokens(example: EncodedExample) -> EncodedExample:
    """Move tokens that the processor adds after every text to before the last answer.

    A prompt, which ends before that answer, has them there too when answers are generated. Chameleon's
    processor, for example, adds its separator token `<reserved08706>`.
    """
    answers = np.flatnonzero(example.kinds == ANSWER)
    length = len(example.input_ids)
    if not len(answers) or answers[-1] == length - 1:
        return example
    start = len(example.prompt().input_ids)
    positions = np.arange(length)
    return example.take(
        np.concatenate([positions[:start], positions[answers[-1] + 1 :], positions[start : answers[-1] + 1]])
    )


def _as_uint8(pixels: np.ndarray) -> np.ndarray:
    """Resized pixels as uint8; some processors return them as floats.

    Raises:
        ValueError: they are not whole numbers from 0 to 255.
    """
    if pixels.dtype == np.uint8:
        return pixels
    as_uint8 = pixels.astype(np.uint8)
    if not np.array_equal(as_uint8, pixels):
        raise ValueError("this processor's resized pixels are not whole numbers from 0 to 255")
    return as_uint8


__all__ = ["ChatText", "EncodeError", "Features", "RowEncoder"]
