"""Images that look nearly alike."""

import io

import numpy as np
from PIL import Image

from vlmtune.data.near_duplicates import near_duplicate_groups, perceptual_hash
from vlmtune.data.prepare_splits import NEAR_DUPLICATE_NOTE, keys_with_near_duplicates


def drawn(seed: int) -> Image.Image:
    """An image with large shapes, as photographs have them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC)


def encoded_again(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def hashed(image: Image.Image) -> str:
    return perceptual_hash(np.asarray(image))


def with_pillow(image: Image.Image) -> str:
    """The same hash, its pixels chosen by Pillow and its cells as means."""
    chosen = np.asarray(image.resize((68, 64), Image.Resampling.NEAREST))[:, :, 1]
    means = chosen.reshape(16, 4, 17, 4).mean((1, 3))
    return np.packbits(means[:, 1:] > means[:, :-1] + 1).tobytes().hex()


def test_a_hash_is_that_of_pillows_nearest_pixels_at_any_size() -> None:
    random = np.random.default_rng(5)
    for number in range(300):
        height, width = random.integers(4, 900, 2).tolist()
        edges = random.integers(0, 256, (height, 1, 3)) ^ random.integers(0, 256, (1, width, 3))
        image = Image.fromarray(edges.astype(np.uint8))
        assert hashed(image) == with_pillow(image), f"image {number}, {width}x{height}"


def test_an_image_encoded_again_and_a_neighbouring_frame_are_near() -> None:
    image = drawn(1)
    brighter = Image.eval(image, lambda value: min(255, value + 6))
    near = [image, encoded_again(image, 40), image.resize((160, 120)), brighter]
    others = [drawn(seed) for seed in range(2, 40)]
    groups = near_duplicate_groups([hashed(one) for one in [*near, *others]])
    assert groups[:4] == [0] * 4
    assert groups[4:] == list(range(4, 42))


def test_plain_surfaces_have_no_look() -> None:
    perceptual_hashes = [hashed(Image.new("RGB", (64, 64), colour)) for colour in ("white", "grey", "black")]
    assert perceptual_hashes == ["", "", ""]
    assert near_duplicate_groups(perceptual_hashes) == [0, 1, 2]


def test_rows_with_near_images_get_a_key_and_a_note() -> None:
    perceptual_hashes = [
        hashed(drawn(1)),
        hashed(encoded_again(drawn(1), 40)),
        hashed(drawn(2)),
        hashed(drawn(2)),
    ]
    lines = [
        {"perceptual_hashes": [text], "image_hashes": [name], "group_keys": [name], "reading_notes": []}
        for text, name in zip(perceptual_hashes, ("a", "b", "c", "c"), strict=True)
    ]
    assert keys_with_near_duplicates(lines) == [["a", "near 0"], ["b", "near 0"], ["c"], ["c"]], (
        "equal images are no news"
    )
    assert [line["reading_notes"] for line in lines] == [[NEAR_DUPLICATE_NOTE], [NEAR_DUPLICATE_NOTE], [], []]
    assert keys_with_near_duplicates(lines[2:]) is None
