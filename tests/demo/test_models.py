import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.import_utils import is_torchvision_available

from vlmtune.demo.__main__ import FAMILIES as COMMAND_FAMILIES
from vlmtune.demo.__main__ import main
from vlmtune.demo.instructions import KOREAN_TERMS
from vlmtune.demo.mall import write_mall
from vlmtune.demo.models import FAMILIES, write_model
from vlmtune.errors import ModelError

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
families = pytest.mark.parametrize(
    "family", ["llava", "mllama", "smolvlm", pytest.param("qwen2_5_vl", marks=needs_torchvision)]
)

LANGUAGE_MODEL = r".*(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj)"
SPECIAL = {
    "llava": ["<s>", "</s>", "<unk>", "<pad>", "<image>"],
    "mllama": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|finetune_right_pad_id|>",
        "<|python_tag|>",
        "<|image|>",
    ],
    "smolvlm": [
        "<|im_start|>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
        "<row_1_col_1>",
        "<row_6_col_6>",
    ],
    "qwen2_5_vl": [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ],
}
PROMPTS = {  # what the family's template makes of QUESTION and ANSWER
    "llava": "USER: <image>\nHow many? ASSISTANT: 7</s>",
    "mllama": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>How many?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n7<|eot_id|>",
    "smolvlm": "<|im_start|>User:<image>How many?<end_of_utterance>\nAssistant: 7<end_of_utterance>\n",
    "qwen2_5_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "How many?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n",
}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "7"}]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        if family != "qwen2_5_vl" or is_torchvision_available():
            write_model(family, folder / family)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("images")
    write_mall(folder, frames=2)
    return [Image.open(path).convert("RGB") for path in sorted((folder / "frames").iterdir())]


def batch(folder: Path, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """One row for each image, with labels for all text."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    text = PROMPTS[folder.name]
    inputs = processor(
        text=[text] * len(images),
        images=[[image] for image in images],
        return_tensors="pt",
        padding=True,
        add_special_tokens=not text.startswith(processor.tokenizer.bos_token or "<|"),
    )
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == image_token, -100)
    return {**inputs, "labels": labels}


def load(folder: Path, quantization: str = "none") -> Any:
    configs = {
        "none": None,
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        "int8": BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_skip_modules=["vision_model", "visual", "multi_modal_projector", "lm_head"],
        ),
    }
    return AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=configs[quantization], device_map={"": "cpu"}
    )


@families
def test_a_folder_is_small_and_whole(models: Path, family: str) -> None:
    files = {path.name: path.stat().st_size for path in (models / family).iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
    } <= set(files)
    assert sum(files.values()) < 2e6
    assert ("chat_template.jinja" in files) == (family != "llava")


def test_a_seed_always_gives_the_same_folder(models: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    write_model("llava", tmp_path / "same")
    write_model("llava", tmp_path / "other", seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    for path in (models / "llava").iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


@families
def test_special_tokens_are_the_familys_own(models: Path, family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / family)
    for token in SPECIAL[family]:
        assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.vocab[token]]
        assert tokenizer.decode([tokenizer.vocab[token]], skip_special_tokens=True) == ""


@families
def test_korean_is_words_more_than_bytes_and_comes_back(models: Path, family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / family)
    text = " ".join(KOREAN_TERMS.values()) + " How many people? 12명\n\n뷁 €"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()) / 2
    assert len(tokenizer.encode("12", add_special_tokens=False)) == 2


@families
def test_chat_template(models: Path, family: str) -> None:
    processor: Any = AutoProcessor.from_pretrained(models / family)
    if family == "llava":
        assert processor.chat_template is None and processor.tokenizer.chat_template is None
        return
    whole = processor.apply_chat_template([QUESTION, ANSWER])
    assert whole == PROMPTS[family]
    prompt = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    assert whole.startswith(prompt) and whole[len(prompt) :].strip().startswith("7")
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in plain]
    assert processor.apply_chat_template(plain) == processor.apply_chat_template(parts)
    assert "Be brief." in processor.apply_chat_template(plain)
    assert "generation %" not in processor.chat_template


@families
def test_bos_stands_once(models: Path, images: list[Image.Image], family: str) -> None:
    processor: Any = AutoProcessor.from_pretrained(models / family)
    bos = {"llava": "<s>", "mllama": "<|begin_of_text|>", "smolvlm": "<|im_start|>", "qwen2_5_vl": None}[
        family
    ]
    assert processor.tokenizer.bos_token == bos
    if family == "llava":
        ids = processor(text=PROMPTS[family], images=images[0])["input_ids"][0]
    else:
        content = [{"type": "image", "image": images[0]}, {"type": "text", "text": "How many?"}]
        ids = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True
        )["input_ids"][0]
    assert bos is None or (ids[0] == processor.tokenizer.bos_token_id and list(ids).count(ids[0]) == 1)


def test_a_text_of_its_own_gets_bos_only_where_the_family_adds_it(models: Path) -> None:
    for family, added in (("llava", True), ("mllama", True), ("smolvlm", False)):
        tokenizer = AutoTokenizer.from_pretrained(models / family)
        assert (tokenizer("people")["input_ids"][0] == tokenizer.bos_token_id) == added


@families
def test_the_image_takes_the_tokens_it_should(models: Path, images: list[Image.Image], family: str) -> None:
    inputs = batch(models / family, images)
    image_token = AutoProcessor.from_pretrained(models / family).image_token_id
    tokens = {"llava": 16, "mllama": 1, "smolvlm": 5 * 4, "qwen2_5_vl": 4 * 3}[family]
    assert (inputs["input_ids"] == image_token).sum(1).tolist() == [tokens] * 2
    if family == "mllama":
        assert inputs["aspect_ratio_mask"].sum().item() == 2 * 4  # all four tiles of each image


@families
def test_weights_start_untrained_but_alive(models: Path, images: list[Image.Image], family: str) -> None:
    model, inputs = load(models / family), batch(models / family, images)
    with torch.no_grad():
        loss, logits = model(**inputs)[:2]
    assert abs(loss.item() - math.log(model.config.text_config.vocab_size)) < 1.0
    last = logits[:, -1]
    assert (last[0] - last[1]).abs().max() > 1e-2  # the two rows differ in nothing but their image


@families
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_lora_trains_on_images(
    models: Path, images: list[Image.Image], family: str, quantization: str
) -> None:
    model, inputs = load(models / family, quantization), batch(models / family, images)
    projections = [module for name, module in model.named_modules() if re.fullmatch(LANGUAGE_MODEL, name)]
    layer = {"none": torch.nn.Linear, "nf4": Linear4bit, "int8": Linear8bitLt}[quantization]
    assert projections and all(type(module) is layer for module in projections)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE_MODEL))
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(weights) == 2 * 4 * model.config.get_text_config().num_hidden_layers
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
        gradients = {
            name: weight.grad.abs().max().item()
            for name, weight in weights.items()
            if weight.grad is not None
        }
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    assert gradients.keys() == weights.keys()
    assert all(0 < gradient < math.inf for gradient in gradients.values()), (
        gradients
    )  # Mllama's cross-attention among them


@families
def test_generation_stops_at_the_familys_end_tokens(
    models: Path, images: list[Image.Image], family: str
) -> None:
    model, inputs = load(models / family), batch(models / family, images[:1])
    tokenizer = AutoTokenizer.from_pretrained(models / family)
    ends = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id is not None
    ids = model.generate(
        **{name: value for name, value in inputs.items() if name != "labels"}, max_new_tokens=3
    )
    assert 1 <= ids.shape[1] - inputs["input_ids"].shape[1] <= 3


def test_mllamas_image_token_is_beyond_the_output_layer(models: Path) -> None:
    model = load(models / "mllama")
    assert model.config.image_token_index == model.config.text_config.vocab_size == model.lm_head.out_features
    assert (
        model.config.image_token_index == AutoTokenizer.from_pretrained(models / "mllama").vocab["<|image|>"]
    )


def test_the_tokenizer_learns_the_texts_it_is_given(tmp_path: Path) -> None:
    write_model("smolvlm", tmp_path / "smolvlm", texts=["zebra crossing", "zebra"] * 8)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smolvlm")
    assert len(tokenizer.encode("zebra", add_special_tokens=False)) == 1
    assert load(tmp_path / "smolvlm").config.text_config.vocab_size == len(tokenizer)


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'gpt'.*llava, mllama, smolvlm, qwen2_5_vl"):
        write_model("gpt", tmp_path / "gpt")
    assert not (tmp_path / "gpt").exists()


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_qwen_without_torchvision_is_refused_plainly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match="torchvision"):
        write_model("qwen2_5_vl", tmp_path / "qwen")
    assert main(["--output_dir", str(tmp_path), "--family", "qwen2_5_vl"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "torchvision" in error


def test_the_command_knows_every_family() -> None:
    assert COMMAND_FAMILIES == FAMILIES
