"""Marks for images in a text: `<image>`, Qwen-VL's `<img>FILE</img>`, and those of other programs."""

import re
from typing import Any

from vlmtune.data.image_paths import RowError

Part = dict[str, Any]

IMAGE_MARK = "<image>"
TAGGED_IMAGE = re.compile(r"<img>([^<>\n]+)</img>")  # with the image's path inside
# How other programs mark an image in a text. A number in a mark counts the row's images from 1.
OTHER_MARK = re.compile(
    r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>"
    r"|<(?:image|img)[ _-]?(\d+)>|<\|?image[ _-]?(\d*)\|?>"
    r"|<image_placeholder>|<ImageHere>|<IMG_CONTEXT>|\[(?:IMG|IMAGE)[ _]?(\d*)\]|<img>|<\|image_pad\|>",
    re.IGNORECASE,
)
# Marks that a text may also contain in their ordinary meaning.
ORDINARY_MARKS = {"<img>", "[img]", "[image]"}
VIDEO_MARK = re.compile(
    r"(?m)^\s*<(video|audio)>|<(video|audio)>\s*$|<\|(video|audio)[_a-z0-9]*\|>", re.IGNORECASE
)
# Tokens that end a turn in some model's chat format. Those of the model in use are refused later.
END_TOKEN = re.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|end|end_of_text|endoftext|end_of_turn|assistant|user|eos)\|>"
    r"|</s>|<eos>|<end_of_turn>|<start_of_turn>|\[/?INST\]|<\uff5cend\u2581of\u2581sentence\uff5c>"
)


def split_marks(text: str, field: str = "") -> list[Part]:
    """`text` as text and image parts, with blank texts left out.

    White space between marks and words is kept, except at the two ends of the text: templates put images
    there in their own way.

    Args:
        field: place of the text in the record, for messages about an image that the text names.
    """
    pieces = re.split(rf"{re.escape(IMAGE_MARK)}|{TAGGED_IMAGE.pattern}", text)
    texts, references = pieces[::2], pieces[1::2]
    parts: list[Part] = []
    for number, between in enumerate(texts):
        if number:
            reference = references[number - 1]
            parts.append(
                {"type": "image"}
                if reference is None
                else {"type": "image", "image": reference.strip(), "field": field}
            )
        if number and not any("text" in part for part in parts):
            between = between.lstrip()
        if number < len(texts) - 1 and not "".join(texts[number + 1 :]).strip():
            between = between.rstrip()
        parts += [{"type": "text", "text": between}] if between.strip() else []
    return parts


def read_other_marks(texts: list[str], images: int) -> tuple[list[str], str] | None:
    """(user texts with other programs' marks replaced by `<image>`, the first such mark); None without.

    Args:
        images: the number of the row's images, none of which has an `<image>` mark.

    Raises:
        RowError: there are marks, but they do not fit the images one by one.
    """
    found = [match for text in texts for match in OTHER_MARK.finditer(text) if match.group() != IMAGE_MARK]
    if not found or (not images and all(match.group().lower() in ORDINARY_MARKS for match in found)):
        return None
    first = found[0].group()
    if not images:
        raise RowError(f"the text holds {first}, a mark for an image, but the row has no image")
    numbers = [next((number for number in match.groups() if number), None) for match in found]
    in_order = [None] * len(found), [str(number + 1) for number in range(len(found))]
    if len(found) != images or numbers not in in_order:
        raise RowError(
            f"the text holds {first}, another program's mark for an image: write {IMAGE_MARK} where an "
            "image stands, once for each image, in their order"
        )
    return [OTHER_MARK.sub(IMAGE_MARK, text) for text in texts], first
