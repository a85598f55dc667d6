"""Images that perceptual_hash nearly alike."""

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


def test_an_image_encoded_again_and_a_neighbouring_frame_are_near() -> None:
    image = drawn(1)
    brighter = Image.eval(image, lambda value: min(255, value + 6))
    near = [image, encoded_again(image, 40), image.resize((160, 120)), brighter]
    others = [drawn(seed) for seed in range(2, 40)]
    groups = near_duplicate_groups([perceptual_hash(one) for one in [*near, *others]])
    assert groups[:4] == [0] * 4
    assert groups[4:] == list(range(4, 42))


def test_plain_surfaces_have_no_look() -> None:
    perceptual_hashes = [
        perceptual_hash(Image.new("RGB", (64, 64), colour)) for colour in ("white", "grey", "black")
    ]
    assert perceptual_hashes == ["", "", ""]
    assert near_duplicate_groups(perceptual_hashes) == [0, 1, 2]


def test_rows_with_near_images_get_a_key_and_a_note() -> None:
    perceptual_hashes = [
        perceptual_hash(drawn(1)),
        perceptual_hash(encoded_again(drawn(1), 40)),
        perceptual_hash(drawn(2)),
        perceptual_hash(drawn(2)),
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
