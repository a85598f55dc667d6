"""Generate greedy answers to prepared rows, and score their references, with a loaded model in this process.

A row's prompt is everything before its last answer. The prompts of a batch are padded on the left, so that
all answers start at the same position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlmtune.data.collate import collate, split_batch
from vlmtune.data.encoded_example import IMAGE, TEMPLATE, TEXT, EncodedExample
from vlmtune.data.input_format import InputFormat
from vlmtune.data.store import Store
from vlmtune.data.tokenize import RowEncoder
from vlmtune.evaluation.independence import independent_parts
from vlmtune.library_errors import plain_library_errors
from vlmtune.model.capture import remove_capturing

ReadExamples = Callable[[Store, Sequence[int]], list[EncodedExample]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class BatchBuilder:
    """Makes the model's inputs from examples. `StoreMeta` has the values of both fields."""

    input_format: InputFormat
    pad_token_id: int

    @classmethod
    def of(cls, store: Store) -> BatchBuilder:
        return cls(store.meta.input_format, store.meta.pad_token_id)

    def batch(self, model: Any, examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """A batch on the model's device, padded on the right; `labels` are -100 outside the answers."""
        arrays = collate(examples, pad_token_id=self.pad_token_id, input_format=self.input_format)
        tensors = {name: torch.from_numpy(array).to(model.device) for name, array in arrays.items()}
        return self.input_format.normalize(next(split_batch(tensors, len(examples))), model.dtype)


def answers(
    model: Any,
    processor: Any,
    store: Store,
    rows: Sequence[int],
    *,
    max_new_tokens: int,
    batch_size: int,
    read: ReadExamples = Store.read,
    may_free_graphs: bool = True,
) -> list[str]:
    """Generate the model's answers to rows of a store, in their order. The model keeps its mode.

    Args:
        model: a transformers model on any device, perhaps with active PEFT adapters.
        read: reads the examples of rows; `data.examples.read_examples` if the store may hold raw rows.
        may_free_graphs: see `in_memory`.
    """
    builder, ends = BatchBuilder.of(store), end_tokens(model, processor)
    texts: list[str] = []
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            examples = read(store, rows[start : start + batch_size])
            texts += generate(
                model,
                processor.tokenizer,
                builder,
                examples,
                max_new_tokens=max_new_tokens,
                ends=ends,
                may_free_graphs=may_free_graphs,
            )
    return texts


def generate(
    model: Any,
    tokenizer: Any,
    builder: BatchBuilder,
    examples: Sequence[EncodedExample],
    *,
    max_new_tokens: int,
    ends: list[int],
    may_free_graphs: bool = True,
) -> list[str]:
    """Generate the answers to one batch, without special tokens and surrounding white space.

    A batch that does not fit in memory is split in halves.

    Args:
        ends: ids of the tokens that end an answer, see `end_tokens`.
        may_free_graphs: see `in_memory`.
    """
    from transformers import GenerationConfig

    # All options are set here, so that the model's own generation config cannot change them.
    untyped_config: Any = GenerationConfig
    config = untyped_config(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=builder.pad_token_id,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
    )

    def run(part: Sequence[EncodedExample]) -> list[str]:
        prompts = [example.prompt() for example in part]
        axes = {name: axis for prompt in prompts for name, axis in prompt.token_axes.items()}
        batch = padded_left(builder.batch(model, prompts), axes)
        batch.pop("labels")
        with plain_library_errors(model.config.name_or_path, "generating answers with its class"):
            generated = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
        return [
            tokenizer.decode(_until(ids, ends), skip_special_tokens=True).strip()
            for ids in generated.tolist()
        ]

    parts = independent_parts(model, builder, examples)
    return [
        answer for part in parts for answer in in_memory(run, part, model, may_free_graphs=may_free_graphs)
    ]


def likelihoods(
    model: Any, builder: BatchBuilder, examples: Sequence[EncodedExample]
) -> list[tuple[float, int]]:
    """(summed negative log-likelihood, number) of each row's labelled tokens, the terms of `eval_loss`.

    All answers of a row count, at full length.
    """

    def run(part: Sequence[EncodedExample]) -> list[tuple[float, int]]:
        batch = builder.batch(model, part)
        labels = batch.pop("labels")[:, 1:]
        labelled = labels >= 0
        with plain_library_errors(model.config.name_or_path, "its class on a row of its own processor's"):
            logits = model(**batch, use_cache=False).logits[:, :-1][labelled].float()
        losses = torch.nn.functional.cross_entropy(logits, labels[labelled], reduction="none").double()
        counts = labelled.sum(dim=1)
        return [(float(row.sum()), len(row)) for row in losses.cpu().split(counts.tolist())]

    parts = independent_parts(model, builder, examples)
    with torch.no_grad():
        return [result for part in parts for result in in_memory(run, part, model)]


def in_memory(
    run: Callable[[Sequence[EncodedExample]], list[Result]],
    examples: Sequence[EncodedExample],
    model: Any,
    *,
    may_free_graphs: bool = True,
) -> list[Result]:
    """Call `run` on all examples together, or in halves if they do not fit in the GPU's memory.

    If one example does not fit alone, the CUDA graphs that `model` captured in training are freed first,
    unless `may_free_graphs` is False.

    Raises:
        OutOfMemoryError: one example does not fit.
    """
    try:
        return run(examples)
    except torch.OutOfMemoryError:
        if len(examples) == 1 and not (may_free_graphs and remove_capturing(model)):
            raise
    torch.cuda.empty_cache()
    middle = len(examples) // 2
    return [
        result
        for half in (examples[:middle], examples[middle:])
        if half
        for result in in_memory(run, half, model, may_free_graphs=may_free_graphs)
    ]


def padded_left(batch: dict[str, Tensor], token_axes: dict[str, int]) -> dict[str, Tensor]:
    """Move a batch's padding from the right to the left, in every tensor with a token dimension.

    Args:
        token_axes: the axis that runs along the tokens, by name, for tensors beside ids, mask and labels.
    """
    gaps = (batch["attention_mask"] == 0).sum(dim=1).tolist()
    axes = {"input_ids": 1, "attention_mask": 1, "labels": 1, **token_axes}
    out = dict(batch)
    for name in axes.keys() & batch.keys():
        rows = batch[name].unbind(axes[name] - 1)
        rolled = [row.roll(gap, dims=axes[name] - 1) for row, gap in zip(rows, gaps, strict=True)]
        out[name] = torch.stack(rolled, dim=axes[name] - 1)
    return out


def end_tokens(model: Any, processor: Any) -> list[int]:
    """Ids of the tokens that end an answer.

    They are the end tokens of the model and of the tokenizer, and the token that ends a turn in the chat
    template.
    """
    closing = RowEncoder(processor).end_token_id()
    of_model = model.generation_config.eos_token_id
    ends = {
        closing,
        processor.tokenizer.eos_token_id,
        *(of_model if isinstance(of_model, list) else [of_model]),
    }
    return sorted(end for end in ends if end is not None)


def reference(tokenizer: Any, example: EncodedExample) -> str:
    """The text of a row's last answer, decoded from its tokens."""
    prompt = len(example.prompt().input_ids)
    return _decode(tokenizer, example.input_ids[prompt:])


def question(tokenizer: Any, example: EncodedExample) -> str:
    """The user's text in the last turn of a row, decoded from its tokens."""
    prompt = example.prompt()
    kinds = np.concatenate([[TEMPLATE], prompt.kinds, [TEMPLATE]])
    starts = np.flatnonzero((kinds[1:] == TEXT) & (kinds[:-1] != TEXT))
    ends = np.flatnonzero((kinds[:-1] == TEXT) & (kinds[1:] != TEXT))
    texts: list[str] = []
    last = 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if (prompt.kinds[last:start] != IMAGE).any():  # template or an earlier answer: a new turn starts
            texts.clear()
        texts.append(_decode(tokenizer, prompt.input_ids[start:end]))
        last = end
    return " ".join(text for text in texts if text)


def _decode(tokenizer: Any, ids: Any) -> str:
    return str(
        tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ).strip()


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """The tokens before the first end token; only padding follows it."""
    return next((ids[:place] for place, token in enumerate(ids) if token in ends), ids)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put the model in evaluation mode inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
