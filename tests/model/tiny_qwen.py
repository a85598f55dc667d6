"""Qwen2.5-VL and Qwen3-VL with random weights, a few thousand parameters, and inputs for them.

Models alone, without processors.
"""

from typing import Any

import torch
import transformers as tf

IMAGE, START, END = 290, 291, 292
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 293,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def qwen2_5_vl() -> Any:
    """Its tower attends within windows, but in its last layer."""
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    windows = {"window_size": 56, "fullatt_block_indexes": [1], "patch_size": 14}
    config = tf.Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision | windows, **IDS)
    torch.manual_seed(0)
    return tf.Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3_vl() -> Any:
    """Its decoder adds features of two of the tower's layers."""
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    deepstack = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64, "patch_size": 14}
    text = TEXT | {"head_dim": 16}
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision | deepstack, **IDS)
    torch.manual_seed(0)
    return tf.Qwen3VLForConditionalGeneration(config).eval()


def batch_of_two() -> dict[str, torch.Tensor]:
    """Two rows with an image each, of 4x12 and 8x4 patches."""
    generator = torch.Generator().manual_seed(1)
    grid = torch.tensor([[1, 4, 12], [1, 8, 4]])
    ids = torch.randint(0, 250, (2, 24), generator=generator)
    for row, (_, height, width) in enumerate(grid.tolist()):
        tokens = height * width // 4
        ids[row, 2], ids[row, 3 : 3 + tokens], ids[row, 3 + tokens] = START, IMAGE, END
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": grid,
    }


def rows_alone(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The rows of `batch_of_two`, each in a batch of its own."""
    patches = batch["pixel_values"].split(batch["image_grid_thw"].prod(-1).tolist())
    others = [name for name in batch if name != "pixel_values"]
    return [
        {**{name: batch[name][[row]] for name in others}, "pixel_values": part}
        for row, part in enumerate(patches)
    ]
