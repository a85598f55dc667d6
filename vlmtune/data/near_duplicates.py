"""Finds images that look nearly alike: encoded again, or neighboring frames of a video."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np

SIDE = 16  # the hash has SIDE * SIDE bits
SAMPLES = 4  # pixels that are read of a cell in each direction
BYTES = SIDE * SIDE // 8
# Bits in which hashes of near images may differ. There are more pairs of bytes (16), so at least one is
# equal.
MAX_DIFFERENT = 12
# Least number of set bits. An image with fewer shows a plain surface, and all plain surfaces look alike.
MIN_SET = 24
MAX_COMPARED = 64  # of the images with the same pair of bytes, how many are compared with each other


def perceptual_hash(pixels: np.ndarray) -> str:
    """The difference hash of an image, 64 hex digits: whether a cell is brighter than its left neighbor.

    The brightness of a cell is the mean of a few green values in it, which takes 0.07 ms at any size. The
    hash is empty for a plain surface.

    Args:
        pixels: `[height, width, 3]` uint8.
    """
    rows = _nearest(pixels.shape[0], SIDE * SAMPLES)
    columns = _nearest(pixels.shape[1], (SIDE + 1) * SAMPLES)
    cells = pixels[rows[:, None], columns, 1].reshape(SIDE, SAMPLES, SIDE + 1, SAMPLES)
    sums = cells.sum((1, 3), dtype=np.int16)
    bits = sums[:, 1:] > sums[:, :-1] + SAMPLES * SAMPLES  # by more than 1 in the mean
    return np.packbits(bits).tobytes().hex() if bits.sum() >= MIN_SET else ""


def _nearest(length: int, places: int) -> np.ndarray:
    """The pixels that Pillow's NEAREST takes when it resizes `length` pixels to `places`."""
    steps = np.full(places, length / places)
    steps[0] /= 2
    return np.cumsum(steps).astype(np.intp)


def near_duplicate_groups(perceptual_hashes: Sequence[str]) -> list[int]:
    """The group of each image, named by the number of one image in it; near images are in one group.

    Hashes that differ in at most 12 bits share at least one of their 16 pairs of bytes, so only images with
    such a pair in common are compared.
    """
    words = {
        number: np.frombuffer(bytes.fromhex(text), np.uint8)
        for number, text in enumerate(perceptual_hashes)
        if text
    }
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for number, word in words.items():
        for place in range(0, BYTES, 2):
            buckets[place, word[place : place + 2].tobytes()].append(number)
    group = list(range(len(perceptual_hashes)))

    def root(number: int) -> int:
        while group[number] != number:
            group[number] = group[group[number]]
            number = group[number]
        return number

    for members in buckets.values():
        for one, other in combinations(members[:MAX_COMPARED], 2):
            first, second = sorted((root(one), root(other)))
            if first != second and _different(words[one], words[other]) <= MAX_DIFFERENT:
                group[second] = first
    return [root(number) for number in range(len(perceptual_hashes))]


def _different(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.unpackbits(one ^ other).sum())
