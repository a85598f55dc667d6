"""Rows with a video become what each family's own processor makes of its frames."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families.builders import build
from transformers.utils.import_utils import is_torchvision_available
from video_kit import write_video

from vlmtune.data.examples import encode_row
from vlmtune.data.find_input_format import find_input_format
from vlmtune.data.find_video_format import find_video_format
from vlmtune.data.formats import read_fragment
from vlmtune.data.input_format import FLOAT_VIDEOS, NO_VIDEOS, UINT8_VIDEOS
from vlmtune.data.scan import scan
from vlmtune.data.tokenize import RowEncoder
from vlmtune.data.video_frames import load_video
from vlmtune.evaluation.generate import BatchBuilder, likelihoods, question, reference
from vlmtune.model_ref import ModelRef

pytestmark = [
    pytest.mark.skipif(not is_torchvision_available(), reason="these families' processors need torchvision"),
    pytest.mark.filterwarnings("ignore"),  # of transformers', about sizes of tiny models
]
FRAMES = 4
FAMILIES = {
    "qwen2_vl": UINT8_VIDEOS,
    "qwen2_5_vl": UINT8_VIDEOS,
    "qwen3_vl": UINT8_VIDEOS,
    "qwen3_5": UINT8_VIDEOS,
    "internvl": UINT8_VIDEOS,
    "llava_onevision": FLOAT_VIDEOS,
}


def write_rows(folder: Path) -> Path:
    """A row with a rising video, one with a falling one, and one with an image."""
    from formats_kit import png, write_lines

    ramp = [10 + 12 * number for number in range(20)]
    write_video(folder / "up.mp4", ramp)
    write_video(folder / "down.mp4", ramp[::-1])
    png(folder / "a.png")
    rows = [
        {"query": "<video>Does it get brighter?", "response": answer, "videos": [f"{name}.mp4"]}
        for name, answer in (("up", "yes"), ("down", "no"))
    ]
    still = {"query": "<image>Is it bright?", "response": "no", "images": ["a.png"]}
    return write_lines(folder / "rows.jsonl", *rows, still)


def encoded(family: str, folder: Path, frames: int | None = FRAMES) -> tuple[Any, list[Any], Any]:
    """(encoder, examples, loaded model class's folder) of the rows."""
    build(family, folder / family)
    model = ModelRef(str(folder / family))
    processor = model.processor()
    encoder = RowEncoder(
        processor, find_video_format(processor, find_input_format(processor)), video_frames=frames
    )
    (fragment,) = scan(str(write_rows(folder)))
    pairs = [encode_row(encoder, row) for row in read_fragment(fragment)]
    return encoder, pairs, model


@pytest.mark.parametrize("family", FAMILIES)
def test_videos_go_through_the_family_s_own_way(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    encoder, pairs, ref = encoded(family, tmp_path)
    assert encoder.input_format.videos == FAMILIES[family]
    assert [line["error"] for line, _ in pairs] == [None] * 3
    examples = [example for _, example in pairs]
    words = [(question(encoder.tokenizer, one), reference(encoder.tokenizer, one)) for one in examples]
    assert words == [
        ("Does it get brighter?", "yes"),
        ("Does it get brighter?", "no"),
        ("Is it bright?", "no"),
    ]

    # The processor's own batch of the first row, from the text that its template writes.
    video = load_video(str(tmp_path / "up.mp4"), FRAMES)
    content = [{"type": "video"}, {"type": "text", "text": "Does it get brighter?"}]
    text = encoder.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        **encoder.template.agreement()[1],
    )
    own = encoder.processor(
        text=[text],
        videos=[video.frames],
        video_metadata=[video.metadata],
        videos_kwargs={"do_sample_frames": False},
        return_tensors="pt",
    )
    prompt = examples[0].prompt().input_ids.tolist()
    assert prompt[: len(own["input_ids"][0])] == own["input_ids"][0].tolist()
    builder = BatchBuilder(encoder.input_format, 0)
    base = AutoModelForImageTextToText.from_pretrained(ref.name).eval()
    ours = builder.batch(base, examples[:1])
    for name in own.keys() - {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}:
        assert torch.allclose(ours[name].double(), own[name].double(), atol=1e-5), name

    # A batch of videos and an image gives each row its own loss, and the frames matter.
    alone = [likelihoods(base, builder, [example])[0][0] for example in examples]
    together = [loss for loss, _ in likelihoods(base, builder, examples)]
    assert np.allclose(alone, together, rtol=1e-3)
    swapped = examples[0]
    swapped.tensors = examples[1].tensors
    assert abs(likelihoods(base, builder, [swapped])[0][0] - alone[0]) > 1e-4


def test_no_frames_are_read_unless_their_number_is_given(tmp_path: Path) -> None:
    _, pairs, _ = encoded("qwen3_vl", tmp_path, frames=None)
    assert (
        "videos are not read unless you say how many frames of each: --video_frames 8" in pairs[0][0]["error"]
    )
    assert pairs[2][0]["error"] is None


@pytest.mark.parametrize("family", ["llava", "idefics2", "glm4v", "smolvlm2"])
def test_a_family_without_videos_refuses_in_one_line(family: str, tmp_path: Path) -> None:
    encoder, pairs, _ = encoded(family, tmp_path)
    assert encoder.input_format.videos == NO_VIDEOS
    assert "save its frames as images" in pairs[0][0]["error"]
    assert "\n" not in pairs[0][0]["error"]
    assert pairs[2][0]["error"] is None
