"""What the demo's base model is trained on, as arrays: pictures of toys, conversations about them in token
ids, and what is in each patch.

Rows are laid out as `vlmtune.data.tokenize` lays out LLaVA-1.5's: `<s>USER: <image>\\nQUESTION ASSISTANT:
ANSWER</s> USER: …`.
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

from vlmtune.demo.kinds import COLOURS, NAMES
from vlmtune.demo.quiz import ask
from vlmtune.demo.toys import HEIGHT, WIDTH, Thing, draw_toys

GRID = 8  # patches along each side of a picture, whatever its shape
VARIANTS, TURNS, LENGTH = (
    4,
    3,
    64,
)  # conversations about a picture, questions in each, tokens behind the image
MOST = 3  # things in one patch that are told apart
IGNORED = -100  # the label of what is not trained on

Encode = Callable[[str], tuple[int, ...]]


@dataclass
class Lessons:
    """N pictures and their rows; V VARIANTS, T LENGTH, P patches (GRID * GRID, row by row).

    Attributes:
        pictures: uint8 `[N, 84, 112, 3]`.
        ids, labels: int16 `[N, V, T]`, the tokens behind the image, padded with 0, and those among them that
        are answers.
        number: uint8 `[N, P]`, things whose middle lies in the patch, up to MOST.
        kind, colour: int16 `[N, P]`, index into NAMES (len(NAMES): no name) and COLOURS of the one in front,
        or IGNORED.
    """

    pictures: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    number: np.ndarray
    kind: np.ndarray
    colour: np.ndarray

    @classmethod
    def empty(cls, number: int) -> "Lessons":
        """Zeros in memory that forked processes share."""
        return cls(
            pictures=_shared((number, HEIGHT, WIDTH, 3), np.uint8),
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


def make_lessons(number: int, tokenizer: Any, *, seed: int = 0, processes: int | None = None) -> Lessons:
    """Draw `number` pictures and ask about them, on all cores: about 2.5 ms of one core for a picture, 29 KB
    of memory.

    The same seed gives the same lessons, on however many cores.
    """
    lessons = Lessons.empty(number)
    encode = encoder(tokenizer)

    def fill(first: int, step: int) -> None:
        for at in range(first, number, step):
            _fill(lessons, at, encode, int(tokenizer.eos_token_id), Random(f"{seed} {at}"))

    workers = processes or len(os.sched_getaffinity(0))
    if workers == 1:
        fill(0, 1)
        return lessons
    context = multiprocessing.get_context(
        "fork"
    )  # the arrays, and a function within a function, reach the children only so
    children = [context.Process(target=fill, args=(first, workers)) for first in range(workers)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        if child.exitcode != 0:
            raise RuntimeError(f"a process that drew pictures ended with {child.exitcode}")
    return lessons


def encoder(tokenizer: Any) -> Encode:
    """Text → token ids, remembered: there are few different questions."""
    return lru_cache(maxsize=100_000)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))


def conversation(turns: list[tuple[str, str]], encode: Encode, end: int) -> tuple[list[int], list[int]]:
    """Token ids of what stands behind the image, and their labels. `end`: the token that closes an answer."""
    ids: list[int] = []
    labels: list[int] = []
    for at, (question, answer) in enumerate(turns):
        asked = encode(f"\n{question} ASSISTANT:" if at == 0 else f" USER: {question} ASSISTANT:")
        answered = (*encode(f" {answer}"), end)
        ids += [*asked, *answered]
        labels += [*([IGNORED] * len(asked)), *answered]
    return ids, labels


def _fill(lessons: Lessons, at: int, encode: Encode, end: int, rng: Random) -> None:
    picture, things = draw_toys(rng)
    lessons.pictures[at] = np.asarray(picture)
    lessons.number[at], lessons.kind[at], lessons.colour[at] = patches(things)
    lessons.labels[at] = IGNORED
    for variant in range(VARIANTS):
        ids, labels = conversation([ask(things, rng) for _ in range(TURNS)], encode, end)
        lessons.ids[at, variant, : len(ids)] = ids[:LENGTH]
        lessons.labels[at, variant, : len(ids)] = labels[:LENGTH]


def patches(things: list[Thing]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each patch: how many things have their middle in it, and kind and colour of the one in front."""
    number = np.zeros(GRID * GRID, np.uint8)
    kind = np.full(GRID * GRID, IGNORED, np.int16)
    colour = np.full(GRID * GRID, IGNORED, np.int16)
    for thing in things:
        x, y = thing.middle
        column, row = (min(GRID - 1, max(0, int(GRID * part))) for part in (x / WIDTH, y / HEIGHT))
        patch = row * GRID + column
        number[patch] = min(MOST, number[patch] + 1)
        kind[patch] = NAMES.index(thing.kind) if thing.kind else len(NAMES)
        colour[patch] = list(COLOURS).index(thing.colour) if thing.kind else IGNORED
    return number, kind, colour
