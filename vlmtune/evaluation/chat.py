"""Asks an adapter about images, with the model loaded once, for `vlmtune chat`."""

import pickle
from dataclasses import dataclass
from typing import Any

from vlmtune.data.find_input_format import find_input_format
from vlmtune.errors import DataError
from vlmtune.evaluation.adapter import adapter_settings, check_adapter_fits, load_model, read_adapter_files
from vlmtune.evaluation.generate import BatchBuilder, end_tokens, generate
from vlmtune.evaluation.questions import ImageList, image_paths, read_questions
from vlmtune.session import with_absolute_paths
from vlmtune.storage import absolute

ADAPTER = "adapter"


@dataclass(frozen=True)
class Chat:
    """A loaded model that answers questions about images, exactly as `predict` does."""

    model: Any
    processor: Any
    settings: Any
    builder: BatchBuilder
    max_new_tokens: int

    @classmethod
    def load(cls, adapter: str, max_new_tokens: int, **overrides: Any) -> "Chat":
        """Load the base with an adapter, on the GPU if there is one.

        Raises:
            UserError: the adapter or its base cannot be loaded, or they do not fit.
        """
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        settings = with_absolute_paths(adapter_settings(adapter, overrides))
        check_adapter_fits(settings, adapter)
        on_gpu = torch.cuda.is_available() and not settings.run.use_cpu
        model = load_model(
            settings, {ADAPTER: read_adapter_files(adapter)}, torch.device("cuda" if on_gpu else "cpu")
        )
        processor: Any = settings.model.ref.processor()
        pad = processor.tokenizer.pad_token_id
        builder = BatchBuilder(
            find_input_format(processor), processor.tokenizer.eos_token_id if pad is None else pad
        )
        return cls(model, processor, settings, builder, max_new_tokens)

    def ask(self, image: str, question: str) -> str:
        """The answer to a question about one image.

        Args:
            image: path of a file.

        Raises:
            DataError: the image cannot be read, or the model cannot take the question.
        """
        fragment = ImageList((image,), question)
        found = next(read_questions(fragment, 0, 0, self.settings.model.ref, self.builder.input_format))
        row, example = pickle.loads(found["row"]), pickle.loads(found["example"])
        if example is None:
            raise DataError(f"{image}: {row.error}")
        (answer,) = generate(
            self.model,
            self.processor.tokenizer,
            self.builder,
            [example],
            max_new_tokens=self.max_new_tokens,
            ends=end_tokens(self.model, self.processor),
        )
        return answer


def one_image(path: str) -> str:
    """The absolute path or URI of an image file.

    Raises:
        DataError: it is not an image, or a folder.
    """
    try:
        image = absolute(path)
    except ValueError as error:
        raise DataError(f"--image {path}: {error}") from error
    if (found := image_paths(image)) == [image]:
        return image
    if found:
        raise DataError(
            f"--image {path}: is a folder; `vlmtune predict` answers a question about each of its images"
        )
    raise DataError(f"--image {path}: there is no image file of this name")
