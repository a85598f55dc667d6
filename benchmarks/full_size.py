"""Write a model folder of true size with random weights, for machines without access to the hub.

    python benchmarks/full_size.py llava-1.5-7b FOLDER
    python benchmarks/full_size.py llama-3.2-11b-vision FOLDER

The shapes are those of llava-hf/llava-1.5-7b-hf and meta-llama/Llama-3.2-11B-Vision-Instruct; the tokenizer
is the demo's small one, with the family's special tokens. Weights are made on the GPU if there is one. The
folders take 14 and 22 GB.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from vlmtune.demo.models import write_model
from vlmtune.model_ref import ModelRef


def llava(processor: Any) -> tf.PreTrainedConfig:
    """LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels, 576 image tokens, Llama 7B."""
    processor.image_processor = tf.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    tokenizer = processor.tokenizer
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
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


FAMILIES = {"llava-1.5-7b": ("llava", llava), "llama-3.2-11b-vision": ("mllama", mllama)}


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in FAMILIES:
        sys.exit(__doc__)
    family, make = FAMILIES[sys.argv[1]]
    folder = Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as tiny:
        write_model(family, tiny)
        processor = ModelRef(tiny).processor()
    config = make(processor)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = tf.AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate", "gate_attn", "gate_ffn")):
            torch.nn.init.constant_(parameter, 0.5)  # closed gates would hide the image
        # A layer of a trained model adds little to its input. Without this scale the layers would amplify
        # every rounding.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data *= (2 * config.text_config.num_hidden_layers) ** -0.5
        if name.endswith("embed_tokens.weight"):
            parameter.data /= config.text_config.initializer_range
    model.save_pretrained(folder, max_shard_size="4GB")
    processor.save_pretrained(folder)
    print(
        f"{folder}: {sum(parameter.numel() for parameter in model.parameters()) / 1e9:.2f} billion parameters"
    )


if __name__ == "__main__":
    main()
