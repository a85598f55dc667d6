"""The limits of images' resolution, in the processors of tiny models of many families."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families.builders import build
from transformers import AutoProcessor
from transformers.utils.import_utils import is_torchvision_available

from vlmtune.data.chat_template import ChatTemplate
from vlmtune.data.encoded_example import ANSWER, EncodedExample
from vlmtune.data.find_input_format import find_input_format, gradient_image
from vlmtune.data.serving_prompt import serving_notes
from vlmtune.data.source import DataSource, fingerprint
from vlmtune.data.tokenize import RowEncoder
from vlmtune.errors import ConfigError
from vlmtune.image_resolution import ImageResolution, cell, frames_of_an_image, tile_limit
from vlmtune.model_ref import ModelRef

pytestmark = [
    pytest.mark.skipif(not is_torchvision_available(), reason="these families' processors need torchvision"),
    pytest.mark.filterwarnings("ignore"),  # of transformers', about options of tiny models
]


def some_heavy(fast: tuple[str, ...], heavy: tuple[str, ...]) -> list[Any]:
    """Families as parameters of a test: those that say something new, and the others for the heavy tests."""
    return [*fast, *(pytest.param(name, marks=pytest.mark.heavy) for name in heavy)]


PIXELS = some_heavy(("qwen2_5_vl", "qwen3_vl", "glm4v"), ("qwen2_vl", "qwen3_5", "glm_ocr", "paddleocr_vl"))
TILES = some_heavy(("internvl", "llama4", "lfm2_vl"), ("cohere2_vision", "ovis2", "perception_lm"))
NEITHER = some_heavy(("llava", "got_ocr2"), ("idefics3", "gemma3"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Builds the tiny model of a family once."""
    made = tmp_path_factory.mktemp("families")

    def built(name: str) -> str:
        if not (made / name).exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                build(name, made / name)
        return str(made / name)

    return built


def encode(ref: ModelRef, width: int = 896, height: int = 448) -> EncodedExample:
    """A question about one image of this size, encoded as training does."""
    processor: Any = ref.processor()
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "3 people"}]},
    ]
    return RowEncoder(processor, find_input_format(processor)).encode(
        messages, [gradient_image(width, height)]
    )


def pixels_of(ref: ModelRef, example: EncodedExample) -> int:
    """Pixels of a row's only image after resizing."""
    image_processor: Any = ref.processor().image_processor
    return int(np.prod(example.tensors["image_grid_thw"][0, 1:])) * int(image_processor.patch_size) ** 2


@pytest.mark.parametrize("name", PIXELS)
def test_an_image_has_at_most_max_pixels_and_at_least_min_pixels(name: str, folder: Callable[[str], str]):
    image_processor: Any = ModelRef(folder(name)).processor().image_processor
    token = cell(image_processor) ** 2
    for tokens in (16, 64):
        ref = ModelRef(folder(name), resolution=ImageResolution(max_pixels=tokens * token))
        example = encode(ref)
        assert 0.6 * tokens * token < pixels_of(ref, example) <= tokens * token
        assert 0.6 * tokens < example.image_tokens <= tokens + 1  # some families mark the end of an image
        assert (example.kinds == ANSWER).sum() >= 2
    limits = ImageResolution(max_pixels=200 * token, min_pixels=100 * token)
    ref = ModelRef(folder(name), resolution=limits)
    assert pixels_of(ref, encode(ref, 60, 60)) >= 100 * token


@pytest.mark.parametrize("name", TILES)
def test_an_image_is_cut_into_at_most_max_image_tiles(name: str, folder: Callable[[str], str]):
    tokens = []
    for tiles in (1, 2, 4):
        example = encode(ModelRef(folder(name), resolution=ImageResolution(max_image_tiles=tiles)), 1280, 320)
        tokens.append(example.image_tokens)
        assert (example.kinds == ANSWER).sum() >= 2
    assert tokens[0] < tokens[1] < tokens[2]


@pytest.mark.parametrize("name", NEITHER)
def test_a_processor_without_such_a_limit_is_refused_in_one_line(name: str, folder: Callable[[str], str]):
    for resolution in (ImageResolution(max_pixels=10**6), ImageResolution(max_image_tiles=4)):
        with pytest.raises(ConfigError, match=r"^--max_\w+: the processor of .* has no limit of .*leave it"):
            ModelRef(folder(name), resolution=resolution).processor()


def test_the_other_limit_is_named_where_there_is_one(folder: Callable[[str], str]):
    with pytest.raises(ConfigError, match="has no limit of pixels; give --max_image_tiles"):
        ModelRef(folder("internvl"), resolution=ImageResolution(min_pixels=1000)).processor()
    with pytest.raises(ConfigError, match="has no limit of tiles; give --max_pixels"):
        ModelRef(folder("qwen2_5_vl"), resolution=ImageResolution(max_image_tiles=2)).processor()


def test_tiles_whose_arrangement_the_model_has_learnt_stay(folder: Callable[[str], str]):
    with pytest.raises(ConfigError, match="numbers the arrangements of tiles as the model has learnt them"):
        ModelRef(folder("mllama"), resolution=ImageResolution(max_image_tiles=2)).processor()


def test_values_that_no_image_can_have(folder: Callable[[str], str]):
    name = folder("qwen2_5_vl")
    with pytest.raises(ConfigError, match=r"--max_pixels 783: one image token of .* has 784 pixels already"):
        ModelRef(name, resolution=ImageResolution(max_pixels=783)).processor()
    with pytest.raises(ConfigError, match="--min_pixels 20000: is more than the 12544 pixels"):
        ModelRef(name, resolution=ImageResolution(min_pixels=20000)).processor()


def test_a_small_max_pixels_lowers_the_processor_s_own_minimum(folder: Callable[[str], str]):
    ref = ModelRef(folder("qwen2_vl"), resolution=ImageResolution(max_pixels=784))
    assert encode(ref).image_tokens == 1


@pytest.mark.parametrize(
    ("name", "resolution"),
    [("qwen3_vl", ImageResolution(max_pixels=64 * 64)), ("internvl", ImageResolution(max_image_tiles=2))],
)
def test_a_saved_processor_has_the_resolution_and_so_has_the_key_of_the_rows(
    name: str, resolution: ImageResolution, folder: Callable[[str], str], tmp_path: Path
):
    model = folder(name)
    ref = ModelRef(model, resolution=resolution)
    processor: Any = ref.processor()
    processor.save_pretrained(tmp_path)
    loaded: Any = AutoProcessor.from_pretrained(tmp_path)
    limit = "size" if name == "qwen3_vl" else tile_limit(loaded)
    assert limit is not None
    assert dict(vars(loaded.image_processor))[limit] == getattr(processor.image_processor, limit)
    keys = {fingerprint(DataSource("rows.jsonl", one), [], one.processor()) for one in (ref, ModelRef(model))}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("name", "resolution", "words"),
    [
        ("qwen3_vl", ImageResolution(max_pixels=8192), """--mm-processor-kwargs '{"max_pixels": 8192}'"""),
        ("internvl", ImageResolution(max_image_tiles=2), """--mm-processor-kwargs '{"max_patches": 2}'"""),
    ],
)
def test_the_card_says_what_a_server_has_to_set(
    name: str, resolution: ImageResolution, words: str, folder: Callable[[str], str]
):
    processor: Any = ModelRef(folder(name), resolution=resolution).processor()
    first, *_ = serving_notes(ChatTemplate(processor), resolution)
    assert f"images have {resolution}" in first
    assert words in first


def test_no_limit_changes_nothing(folder: Callable[[str], str]):
    assert not ImageResolution()
    assert str(ImageResolution()) == "the processor's own"
    assert str(ImageResolution(max_pixels=7, max_image_tiles=2)) == "--max_pixels 7 --max_image_tiles 2"
    plain: Any = AutoProcessor.from_pretrained(folder("qwen2_vl"))
    assert ModelRef(folder("qwen2_vl")).processor().to_json_string() == plain.to_json_string()
    assert frames_of_an_image(plain.image_processor) == 1
    assert tile_limit(plain) is None
