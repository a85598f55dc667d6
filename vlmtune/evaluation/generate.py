"""Greedy answers to prepared rows, and how likely the model holds their references; in this process, on a
model that is there.

A row's prompt is all that comes before its last answer. Prompts of a batch are padded on the left: every
answer begins at the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlmtune.data.collate import PixelFormat, collate, split_batch
from vlmtune.data.encoded_example import IMAGE, SEQUENCE_TENSORS, TEMPLATE, TEXT, EncodedExample
from vlmtune.data.store import Store
from vlmtune.data.tokenize import RowEncoder
from vlmtune.model.capture import stop_recording

Read = Callable[[Store, Sequence[int]], list[EncodedExample]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Layout:
    """What makes a batch of examples, as a store's meta tells it."""

    pixels: PixelFormat
    pad_token_id: int

    @classmethod
    def of(cls, store: Store) -> Layout:
        return cls(store.meta.pixels, store.meta.pad_token_id)

    def batch(self, model: Any, examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """The examples as the model takes them, on its device, padded on the right."""
        arrays = collate(examples, pad_token_id=self.pad_token_id, per_row=self.pixels.per_row)
        tensors = {name: torch.from_numpy(array).to(model.device) for name, array in arrays.items()}
        return self.pixels.normalize(next(split_batch(tensors, len(examples))), model.dtype)


def answers(
    model: Any,
    processor: Any,
    store: Store,
    rows: Sequence[int],
    *,
    max_new_tokens: int,
    batch_size: int,
    read: Read = Store.read,
) -> list[str]:
    """The model's answers to these rows of a store, in their order. The model is left in the mode it was in.

    Args:
        model: a transformers model, or one with PEFT adapters, which then count; on any device.
        read: gives the examples of rows; `data.examples.read_examples` where the store may hold rows that are
        not encoded.
    """
    layout, ends = Layout.of(store), end_tokens(model, processor)
    texts: list[str] = []
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            examples = read(store, rows[start : start + batch_size])
            texts += generate(
                model, processor.tokenizer, layout, examples, max_new_tokens=max_new_tokens, ends=ends
            )
    return texts


def generate(
    model: Any,
    tokenizer: Any,
    layout: Layout,
    examples: Sequence[EncodedExample],
    *,
    max_new_tokens: int,
    ends: list[int],
) -> list[str]:
    """The answers to one batch of rows, without special tokens and white space around them; of half a batch
    after the other where memory
    is short."""
    from transformers import GenerationConfig

    # Every choice that the model's own generation config could make otherwise is made here.
    plain: Any = GenerationConfig
    config = plain(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=layout.pad_token_id,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
    )

    def run(some: Sequence[EncodedExample]) -> list[str]:
        batch = padded_left(layout.batch(model, [example.prompt() for example in some]))
        batch.pop("labels")
        written = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
        return [
            tokenizer.decode(_until(row, ends), skip_special_tokens=True).strip() for row in written.tolist()
        ]

    return in_memory(run, examples, model)


def likelihoods(model: Any, layout: Layout, examples: Sequence[EncodedExample]) -> list[tuple[float, int]]:
    """(summed negative log-likelihood, number) of each row's labelled tokens, in all its answers, at full
    length: parts of `eval_loss`."""

    def run(some: Sequence[EncodedExample]) -> list[tuple[float, int]]:
        batch = layout.batch(model, some)
        labels = batch.pop("labels")[:, 1:]
        labelled = labels >= 0
        logits = model(**batch, use_cache=False).logits[:, :-1][labelled].float()
        losses = torch.nn.functional.cross_entropy(logits, labels[labelled], reduction="none").double()
        counts = labelled.sum(dim=1)
        return [(float(part.sum()), len(part)) for part in losses.cpu().split(counts.tolist())]

    with torch.no_grad():
        return in_memory(run, examples, model)


def in_memory(
    run: Callable[[Sequence[EncodedExample]], list[Result]], examples: Sequence[EncodedExample], model: Any
) -> list[Result]:
    """`run` on all examples, or on one half after the other where they do not fit in the GPU's memory
    together.

    For the last one, steps of `model` that were recorded in training give way.
    """
    try:
        return run(examples)
    except torch.OutOfMemoryError:
        if len(examples) == 1 and not stop_recording(model):
            raise
    torch.cuda.empty_cache()
    middle = len(examples) // 2
    return [
        found
        for part in (examples[:middle], examples[middle:])
        if part
        for found in in_memory(run, part, model)
    ]


def padded_left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch that is padded on the right with its padding moved to the left, in every tensor that runs
    along the tokens."""
    gaps = (batch["attention_mask"] == 0).sum(dim=1).tolist()
    along = ("input_ids", "attention_mask", "labels", *SEQUENCE_TENSORS)
    return {
        name: torch.stack([row.roll(gap, dims=0) for row, gap in zip(tensor, gaps, strict=True)])
        if name in along
        else tensor
        for name, tensor in batch.items()
    }


def end_tokens(model: Any, processor: Any) -> list[int]:
    """The tokens that end an answer: the model's and the tokenizer's own, and the one that closes a turn in
    the chat template."""
    question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
    closing = int(RowEncoder(processor).encode([question, answer], []).input_ids[-1])
    own = model.generation_config.eos_token_id
    ends = {closing, processor.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(end for end in ends if end is not None)


def reference(tokenizer: Any, example: EncodedExample) -> str:
    """The last answer of a row, as its tokens say it."""
    prompt = len(example.prompt().input_ids)
    return _text(tokenizer, example.input_ids[prompt:])


def question(tokenizer: Any, example: EncodedExample) -> str:
    """The user's words before the last answer of a row, as their tokens say it."""
    prompt = example.prompt()
    kinds = np.concatenate([[TEMPLATE], prompt.kinds, [TEMPLATE]])
    starts, ends = (
        np.flatnonzero((kinds[1:] == TEXT) & (kinds[:-1] != TEXT)),
        np.flatnonzero((kinds[:-1] == TEXT) & (kinds[1:] != TEXT)),
    )
    texts: list[str] = []
    last = 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if (
            prompt.kinds[last:start] != IMAGE
        ).any():  # the template, or an earlier answer: another turn begins
            texts.clear()
        texts.append(_text(tokenizer, prompt.input_ids[start:end]))
        last = end
    return " ".join(text for text in texts if text)


def _text(tokenizer: Any, ids: Any) -> str:
    return str(
        tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ).strip()


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """The tokens before the first that ends an answer; behind it there is only padding."""
    return next((ids[:place] for place, token in enumerate(ids) if token in ends), ids)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
