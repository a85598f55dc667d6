"""Tiny vision-language models with random weights, as Hugging Face folders under 2 MB, to run every path.

Each has its family's real architecture, special tokens, processor and chat format; only the sizes are small.
Every width is a multiple of 64, the block size of NF4. Weights have unit gain instead of a trained model's
standard deviation: features are random, but carry the input, so that LoRA can learn from them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as tf
from transformers.utils.import_utils import is_torchvision_available

from vlmtune.demo.chat_templates import MLLAMA_TEMPLATE, QWEN_TEMPLATE, SMOLVLM_TEMPLATE
from vlmtune.demo.tiny_tokenizer import byte_level_tokenizer, llava_tokenizer, sample_texts, token_ids
from vlmtune.errors import ModelError

FAMILIES = ("llava", "mllama", "smolvlm", "qwen2_5_vl")

WIDTH = 64
GAIN = WIDTH**-0.5  # standard deviation of weights that keep the scale of their input
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": GAIN,
    "max_position_embeddings": 4096,
}
VISION: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "initializer_range": GAIN}


def write_model(family: str, folder: Path | str, *, seed: int = 0, texts: list[str] | None = None) -> None:
    """Write a tiny model of one of `FAMILIES` to `folder`. A folder that has `config.json` is complete.

    Args:
        texts: texts to train the tokenizer on; by default those of the sample files.

    Raises:
        ModelError: an unknown family; or qwen2_5_vl without torchvision, which its processor needs.
    """
    builders = {"llava": _llava, "mllama": _mllama, "smolvlm": _smolvlm, "qwen2_5_vl": _qwen2_5_vl}
    if family not in builders:
        raise ModelError(f"There is no tiny model of the family {family!r}; there are {', '.join(FAMILIES)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = builders[family](sample_texts() if texts is None else texts)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".part-") as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        for path in sorted(Path(unfinished).iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(folder / path.name)


def _llava(texts: list[str]) -> tuple[tf.PreTrainedModel, tf.ProcessorMixin]:
    """LLaVA-1.5: CLIP at 56x56 pixels in 14x14 patches gives 16 image tokens. No chat template."""
    tokenizer = llava_tokenizer(texts)
    tokens = token_ids(tokenizer)
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(
            **TEXT, num_hidden_layers=2, vocab_size=len(tokenizer), rms_norm_eps=1e-5, **tokens
        ),
        vision_config=tf.CLIPVisionConfig(
            **VISION,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            projection_dim=WIDTH,
        ),
        image_token_index=tokenizer.vocab["<image>"],
        image_seq_length=16,
        **tokens,
    )
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = tf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return with_generation(tf.LlavaForConditionalGeneration(config), **tokens), processor


def _mllama(texts: list[str]) -> tuple[tf.PreTrainedModel, tf.ProcessorMixin]:
    """Llama-3.2-Vision: up to four tiles of 28x28 pixels, read by the cross-attention of layers 1 and 3.

    As in the family, the image token's id is the first beyond the output layer, and both the template and the
    tokenizer write the BOS token: text of the template is tokenized without special tokens.
    """
    last = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|image|>",
    ]
    tokenizer = byte_level_tokenizer(
        texts,
        [],
        last,
        add_bos=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    tokens = token_ids(tokenizer)
    ends = [tokenizer.vocab[token] for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    image_token = tokenizer.vocab["<|image|>"]
    config = tf.MllamaConfig(
        text_config=tf.MllamaTextConfig(
            **TEXT,
            num_hidden_layers=4,
            cross_attention_layers=[1, 3],
            vocab_size=image_token,
            **{**tokens, "eos_token_id": ends},
        ),
        vision_config=tf.MllamaVisionConfig(
            **VISION,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=4,
            image_size=28,
            patch_size=14,
            max_num_tiles=4,
            intermediate_layers_indices=[0, 1],
            vision_output_dim=3 * WIDTH,
        ),
        image_token_index=image_token,
    )
    model = tf.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        # Gates start closed, so that no image would reach the text, and no gradient the cross-attention.
        if "gate" in name.rsplit(".", 1)[-1]:
            torch.nn.init.constant_(parameter, 0.5)
    images = tf.MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4)
    processor = tf.MllamaProcessor(images, tokenizer, chat_template=MLLAMA_TEMPLATE)
    return with_generation(model, **{**tokens, "eos_token_id": ends}), processor


def _smolvlm(texts: list[str]) -> tuple[tf.PreTrainedModel, tf.ProcessorMixin]:
    """SmolVLM (Idefics3): the image in tiles of 32x32 pixels and once whole, 4 image tokens each."""
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = byte_level_tokenizer(
        texts,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<global-img>", *grid, "<fake_token_around_image>", "<image>", "<end_of_utterance>"],
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokens = token_ids(tokenizer)
    config = tf.Idefics3Config(
        text_config=tf.LlamaConfig(
            **TEXT, num_hidden_layers=2, vocab_size=len(tokenizer), rms_norm_eps=1e-5, **tokens
        ),
        vision_config={
            **VISION,
            "model_type": "idefics3_vision",
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        image_token_id=tokenizer.vocab["<image>"],
        scale_factor=2,
    )
    images = tf.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = tf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE)
    return with_generation(tf.Idefics3ForConditionalGeneration(config), **tokens), processor


def _qwen2_5_vl(texts: list[str]) -> tuple[tf.PreTrainedModel, tf.ProcessorMixin]:
    """Qwen2.5-VL: images of 28x28 to 112x112 pixels; four patches of 14x14 pixels make an image token."""
    if not is_torchvision_available():
        raise ModelError(
            "The processor of qwen2_5_vl needs torchvision, which is not installed "
            "(on a machine with a GPU: pip install torchvision)."
        )
    last = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tokenizer = byte_level_tokenizer(texts, [], last, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = {token: tokenizer.vocab[token] for token in last}
    tokens = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    config = tf.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            **tokens,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            # The sections are half of a head's 16 dimensions.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            **VISION,
            "depth": 2,
            "num_heads": 4,
            "out_hidden_size": WIDTH,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    processor = tf.Qwen2_5_VLProcessor(
        tf.Qwen2VLImageProcessor(size=pixels),
        tokenizer,
        tf.Qwen2VLVideoProcessor(size=pixels),
        chat_template=QWEN_TEMPLATE,
    )
    ends = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}
    return with_generation(tf.Qwen2_5_VLForConditionalGeneration(config), **{**tokens, **ends}), processor


def with_generation(model: tf.PreTrainedModel, **tokens: Any) -> tf.PreTrainedModel:
    """The model with a generation config that decodes greedily and knows these token ids."""
    model.generation_config = tf.GenerationConfig(**tokens, do_sample=False)
    return model
