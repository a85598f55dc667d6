"""Write a model folder of true size with random weights, for machines without access to the hub.

    python benchmarks/full_size.py NAME FOLDER

NAME is one of llava-1.5-7b, llama-3.2-11b-vision, qwen2.5-vl-7b, qwen3-vl-8b, qwen3.5-4b, gemma-3-4b and
internvl3.5-8b. The shapes are those of the published checkpoints. The tokenizer is a small one with the
family's special tokens; of the newer families it comes, with the processor, from the tests' tiny models.
Weights are made on the GPU if there is one. A folder takes 8 to 22 GB.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from vlmtune.demo.models import write_model
from vlmtune.model_ref import ModelRef

TESTS = Path(__file__).resolve().parent.parent / "tests"
VIT_L: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
QWEN_TEXT = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}


def llava(processor: Any) -> tf.PreTrainedConfig:
    """LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels, 576 image tokens, Llama 7B."""
    processor.image_processor = tf.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    tokenizer = processor.tokenizer
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            **VIT_L,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=tf.LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=processor.image_token_id,
        image_seq_length=576,
    )


def mllama(processor: Any) -> tf.PreTrainedConfig:
    """Llama-3.2-11B-Vision: up to four tiles of 560 pixels; 8 of its 40 layers are cross-attention."""
    processor.image_processor = tf.MllamaImageProcessorPil(
        size={"height": 560, "width": 560}, max_image_tiles=4
    )
    tokenizer = processor.tokenizer
    return tf.MllamaConfig(
        vision_config=tf.MllamaVisionConfig(image_size=560),
        text_config=tf.MllamaTextConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=processor.image_token_id,
    )


def qwen2_5_vl(processor: Any) -> tf.PreTrainedConfig:
    """Qwen2.5-VL-7B: a tower of 32 layers, 28 of them within windows; a token for 28x28 pixels."""
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return _enlarged(processor, text | QWEN_TEXT, vision)


QWEN3_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
}
QWEN3_ROPE = {
    "rope_type": "default",
    "rope_theta": 5e6,
    "mrope_section": [24, 20, 20],
    "mrope_interleaved": True,
}
QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}


def qwen3_vl(processor: Any) -> tf.PreTrainedConfig:
    """Qwen3-VL-8B: three inner layers of its tower go into the decoder; a token for 32x32 pixels."""
    processor.image_processor.size = {"shortest_edge": 65536, "longest_edge": 32 * 32 * 1280}
    vision = {**QWEN3_VISION, "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]}
    return _enlarged(processor, {**QWEN3_8B, **QWEN_TEXT, "rope_parameters": QWEN3_ROPE}, vision)


def qwen3_5(processor: Any) -> tf.PreTrainedConfig:
    """Qwen3.5-4B: three of four decoder layers are recurrent (gated delta rule)."""
    processor.image_processor.size = {"shortest_edge": 65536, "longest_edge": 32 * 32 * 1280}
    layers = 32
    text = {
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 152064,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
        "rope_parameters": {
            **QWEN3_ROPE,
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
        },
    }
    vision = {**QWEN3_VISION, "depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
    return _enlarged(processor, text | QWEN_TEXT, {**vision, "out_hidden_size": 2560})


def gemma3(processor: Any) -> tf.PreTrainedConfig:
    """Gemma-3-4B: an image of 896x896 pixels is 256 tokens, which attend both ways."""
    processor.image_processor.size = {"height": 896, "width": 896}
    processor.image_seq_length = 256
    processor.full_image_sequence = processor.full_image_sequence.replace(
        processor.image_token * 4, processor.image_token * 256
    )
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "vocab_size": 262208,
        "sliding_window": 1024,
        "max_position_embeddings": 32768,
        "layer_types": [
            "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(34)
        ],
    }
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
    }
    return _enlarged(processor, text, vision, mm_tokens_per_image=256)


def internvl(processor: Any) -> tf.PreTrainedConfig:
    """InternVL3.5-8B on Qwen3-8B: an image of 448x448 pixels, uncropped, is 256 tokens."""
    processor.image_processor.size = {"height": 448, "width": 448}
    processor.image_processor.crop_to_patches = False
    processor.image_seq_length = 256
    vision = {**VIT_L, "image_size": [448, 448]}
    return _enlarged(processor, QWEN3_8B | QWEN_TEXT, vision, image_seq_length=256)


def _enlarged(
    processor: Any, text: dict[str, Any], vision: dict[str, Any], **changes: Any
) -> tf.PreTrainedConfig:
    """The config of the tiny model that the processor is of, with other sizes and `changes` beside them."""
    config = ModelRef(processor.name_or_path).config()
    values = {**config.to_dict(), **changes}
    for part, sizes in (("text_config", text), ("vision_config", vision)):
        derived = {"layer_types"} - sizes.keys()  # follows from the number of layers
        old = {name: value for name, value in values[part].items() if name not in derived}
        values[part] = {**old, "initializer_range": 0.02, **sizes}
    enlarged: tf.PreTrainedConfig = type(config).from_dict(values)
    return enlarged


FAMILIES = {
    "llava-1.5-7b": ("llava", llava),
    "llama-3.2-11b-vision": ("mllama", mllama),
    "qwen2.5-vl-7b": ("qwen2_5_vl", qwen2_5_vl),
    "qwen3-vl-8b": ("qwen3_vl", qwen3_vl),
    "qwen3.5-4b": ("qwen3_5", qwen3_5),
    "gemma-3-4b": ("gemma3", gemma3),
    "internvl3.5-8b": ("internvl", internvl),
}


def _write_tiny(family: str, folder: str) -> None:
    """The tiny model of a family: one of the demo's, or else of the tests'."""
    if family in ("llava", "mllama"):
        write_model(family, folder)
        return
    sys.path.insert(0, str(TESTS))
    from families.builders import build

    build(family, Path(folder))


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in FAMILIES:
        sys.exit(__doc__)
    family, make = FAMILIES[sys.argv[1]]
    folder = Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as tiny:
        _write_tiny(family, tiny)
        processor: Any = ModelRef(tiny).processor()
        processor.name_or_path = tiny
        config = make(processor)
        del processor.name_or_path
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = tf.AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate", "gate_attn", "gate_ffn")):
            torch.nn.init.constant_(parameter, 0.5)  # closed gates would hide the image
        # A layer of a trained model adds little to its input. Without this scale the layers would amplify
        # every rounding.
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):
            parameter.data *= (2 * config.get_text_config().num_hidden_layers) ** -0.5
        if name.endswith("embed_tokens.weight") and family in ("llava", "mllama"):
            parameter.data /= config.text_config.initializer_range
    model.save_pretrained(folder, max_shard_size="4GB")
    processor.save_pretrained(folder)
    print(
        f"{folder}: {sum(parameter.numel() for parameter in model.parameters()) / 1e9:.2f} billion parameters"
    )


if __name__ == "__main__":
    main()
