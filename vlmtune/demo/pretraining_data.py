"""What the demo's base model is trained on, as arrays: images of toys, conversations, and labels of patches.

A conversation has the form that `vlmtune.data.tokenize` gives to LLaVA-1.5's:
`<s>USER: <image>\\nQUESTION ASSISTANT: ANSWER</s> USER: …`.
"""

import mmap
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np

from vlmtune.demo.toy_kinds import COLOURS, NAMES
from vlmtune.demo.toy_questions import ask
from vlmtune.demo.toys import HEIGHT, WIDTH, Thing, draw_toys

GRID = 8  # patches along each side of an image, whatever its shape
VARIANTS = 4  # conversations about an image
TURNS = 3  # questions in a conversation
LENGTH = 64  # tokens behind the image
MOST_THINGS = 3  # in one patch that are counted
IGNORED = -100  # the label of a token or patch that is not trained on

Encode = Callable[[str], tuple[int, ...]]


@dataclass
class PretrainingData:
    """N images and their rows; V = VARIANTS, T = LENGTH, P = GRID * GRID patches, row by row.

    Attributes:
        images: uint8 `[N, 84, 112, 3]`.
        ids, labels: int16 `[N, V, T]`, the tokens behind the image, padded with 0; and those of them that are
            answers.
        number: uint8 `[N, P]`, the things whose middle is in the patch, up to MOST_THINGS.
        kind, colour: int16 `[N, P]` of the thing in front: index into NAMES (len(NAMES): it has no name) and
            COLOURS, or IGNORED.
    """

    images: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    number: np.ndarray
    kind: np.ndarray
    colour: np.ndarray

    @classmethod
    def empty(cls, number: int) -> "PretrainingData":
        """Zeros, in memory that forked processes share."""
        return cls(
            images=_shared((number, HEIGHT, WIDTH, 3), np.uint8),
            ids=_shared((number, VARIANTS, LENGTH), np.int16),
            labels=_shared((number, VARIANTS, LENGTH), np.int16),
            number=_shared((number, GRID * GRID), np.uint8),
            kind=_shared((number, GRID * GRID), np.int16),
            colour=_shared((number, GRID * GRID), np.int16),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _shared(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(1, size)), dtype=dtype, count=int(np.prod(shape))).reshape(shape)


def make_pretraining_data(
    number: int, tokenizer: Any, *, seed: int = 0, processes: int | None = None
) -> PretrainingData:
    """Draw `number` images and ask about them, on all cores.

    An image takes about 2.5 ms of one core and 29 KB of memory. The same seed gives the same data with any
    number of processes.
    """
    data = PretrainingData.empty(number)
    encode = cached_encode(tokenizer)

    def fill(first: int, step: int) -> None:
        for index in range(first, number, step):
            _fill(data, index, encode, int(tokenizer.eos_token_id), Random(f"{seed} {index}"))

    workers = processes or len(os.sched_getaffinity(0))
    if workers == 1:
        fill(0, 1)
        return data
    # Only a fork hands the shared arrays and a nested function to the children.
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=fill, args=(first, workers)) for first in range(workers)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        if child.exitcode != 0:
            raise RuntimeError(f"a process that drew images ended with {child.exitcode}")
    return data


def cached_encode(tokenizer: Any) -> Encode:
    """Text → token ids, cached: there are few different questions."""
    return lru_cache(maxsize=100_000)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))


def encode_conversation(
    turns: list[tuple[str, str]], encode: Encode, end: int
) -> tuple[list[int], list[int]]:
    """Token ids behind the image, and their labels.

    Args:
        turns: (question, answer) of each turn.
        end: the token that closes an answer.
    """
    ids: list[int] = []
    labels: list[int] = []
    for number, (question, answer) in enumerate(turns):
        question_ids = encode(f" USER: {question} ASSISTANT:" if number else f"\n{question} ASSISTANT:")
        answer_ids = (*encode(f" {answer}"), end)
        ids += [*question_ids, *answer_ids]
        labels += [*([IGNORED] * len(question_ids)), *answer_ids]
    return ids, labels


def _fill(data: PretrainingData, index: int, encode: Encode, end: int, rng: Random) -> None:
    image, things = draw_toys(rng)
    data.images[index] = np.asarray(image)
    data.number[index], data.kind[index], data.colour[index] = patches(things)
    data.labels[index] = IGNORED
    for variant in range(VARIANTS):
        ids, labels = encode_conversation([ask(things, rng) for _ in range(TURNS)], encode, end)
        data.ids[index, variant, : len(ids)] = ids[:LENGTH]
        data.labels[index, variant, : len(ids)] = labels[:LENGTH]


def patches(things: list[Thing]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each patch: the number of things with their middle in it; kind and colour of the one in front."""
    number = np.zeros(GRID * GRID, np.uint8)
    kind = np.full(GRID * GRID, IGNORED, np.int16)
    colour = np.full(GRID * GRID, IGNORED, np.int16)
    for thing in things:
        x, y = thing.middle
        column, row = (min(GRID - 1, max(0, int(GRID * part))) for part in (x / WIDTH, y / HEIGHT))
        patch = row * GRID + column
        number[patch] = min(MOST_THINGS, number[patch] + 1)
        kind[patch] = NAMES.index(thing.kind) if thing.kind else len(NAMES)
        colour[patch] = list(COLOURS).index(thing.colour) if thing.kind else IGNORED
    return number, kind, colour
