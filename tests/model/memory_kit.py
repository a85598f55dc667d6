"""The shapes and the step that tests of memory share: LLaVA-1.5-7B as it is trained on a GPU."""

from functools import cache

import transformers as tf

from vlmtune.model.lora_targets import target_modules
from vlmtune.model.memory import StepLoad
from vlmtune.model.shapes import ModelShapes, model_shapes
from vlmtune.model_ref import model_on_meta

STEP = StepLoad(
    quantization="nf4",
    batch=8,
    length=640,
    labelled_tokens=40,
    cross_attention_tokens=0,
    lora_rank=16,
    vision_tokens=576,
)


@cache
def llava_7b() -> ModelShapes:
    config = tf.LlavaConfig(
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
        ),
        image_token_index=32000,
    )
    model = model_on_meta(config)
    return model_shapes(model, target_modules(model, None, lora_vision=False))
