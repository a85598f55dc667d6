"""Recent families beside the large ones: Molmo2, Kimi-K2.5, PaddleOCR-VL, VideoLLaMA 3, GLM-OCR, …"""

from typing import Any

import transformers as tf

from families import glm, qwen
from families.common import TOWER, WIDTH, Built, family, text, tiny_tokenizer, token_ids, with_ends
from families.llava import PIXTRAL_TOWER
from families.qwen import MROPE, PATCH14, VISION_MARKS, QwenParts
from families.templates import chat_template, chatml

END = "<|im_end|>"


@family(END)
def molmo2() -> Built:
    """Crops with pooling indices; the processor puts a BOS ahead of the text."""
    marks = [
        *("<|image|>", "<|video|>", "<im_start>", "<im_end>", "<im_patch>", "<im_col>"),
        *("<low_res_im_start>", "<frame_start>", "<frame_end>", "<im_low>"),
    ]  # beyond the rows of the head, embedded by a table of their own
    special = ["<|endoftext|>", "<|im_start|>", END, *marks]
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    tokenizer = tiny_tokenizer(
        special, bos_token="<|endoftext|>", eos_token=END, pad_token="<|endoftext|>", named=named
    )
    ids, tokens = tokenizer.vocab, token_ids(tokenizer)
    attention = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    size = len(tokenizer) - len(marks)
    config = tf.Molmo2Config(
        text_config={
            **text(**tokens, vocab_size=size),
            "head_dim": 16,
            "additional_vocab_size": len(marks),
        },
        vision_config={**TOWER, **attention, "image_size": [56, 56], "num_position_embeddings": 16},
        adapter_config={
            **attention,
            "hidden_size": WIDTH,
            "vision_feature_layer": [-1, -2],
            "intermediate_size": 128,
            "text_hidden_size": WIDTH,
        },
        image_start_token_id=ids["<im_start>"],
        low_res_image_start_token_id=ids["<low_res_im_start>"],
        image_end_token_id=ids["<im_end>"],
        image_patch_id=ids["<im_patch>"],
        frame_start_token_id=ids["<frame_start>"],
        frame_end_token_id=ids["<frame_end>"],
    )
    square = {"height": 56, "width": 56}
    processor = tf.Molmo2Processor(
        tf.Molmo2ImageProcessor(size=square, max_crops=2, overlap_margins=[1, 1]),
        tf.Molmo2VideoProcessor(size=square),
        tokenizer,
        chat_template=chatml("<|image|>"),
    )
    return with_ends(tf.Molmo2ForConditionalGeneration(config), **tokens), processor


@family(END)
def kimi_k25() -> Built:
    """DeepSeek-V3's latent attention (q_a_proj, kv_b_proj) and experts; an empty thought in training."""
    special = [
        *("[BOS]", "[EOS]", "[PAD]", END, "<|im_user|>", "<|im_assistant|>", "<|im_system|>"),
        *("<|im_middle|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>"),
        "<|kimi_k25_video_placeholder|>",
    ]
    tokenizer = tiny_tokenizer(
        special, ordinary=("<think>", "</think>"), bos_token="[BOS]", eos_token=END, pad_token="[PAD]"
    )
    ids, tokens = tokenizer.vocab, token_ids(tokenizer)
    decoder = tf.DeepseekV3Config(
        **text(**tokens, vocab_size=len(tokenizer), num_hidden_layers=3, num_key_value_heads=4),
        moe_intermediate_size=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=64,
        q_lora_rank=64,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    config = tf.Kimi_K25Config(
        text_config=decoder.to_dict(),
        vision_config={**TOWER, "pos_emb_height": 8, "pos_emb_width": 8, "patch_size": 14},
        projection_hidden_size=WIDTH,
        image_token_id=ids["<|media_pad|>"],
        video_token_id=ids["<|kimi_k25_video_placeholder|>"],
        vision_start_token_id=ids["<|media_begin|>"],
        vision_end_token_id=ids["<|media_end|>"],
        tie_word_embeddings=False,
    )
    limits = {"size": {"max_height": 112, "max_width": 112}}
    processor = tf.Kimi_K25Processor(
        tf.Kimi_K25ImageProcessor(**limits),
        tokenizer,
        tf.Kimi_K25VideoProcessor(**limits),
        chat_template=chat_template("kimi"),
    )
    return with_ends(tf.Kimi_K25ForConditionalGeneration(config), **tokens), processor


@family(END)
def paddleocr_vl() -> Built:
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", END, "<|IMAGE_PLACEHOLDER|>", "<|video_pad|>"]
    special += ["<|IMAGE_START|>", "<|IMAGE_END|>"]
    tokenizer = tiny_tokenizer(
        special,
        bos_token="<s>",
        eos_token=END,
        pad_token="<unk>",
        named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
    )
    ids, tokens = tokenizer.vocab, token_ids(tokenizer)
    config = tf.PaddleOCRVLConfig(
        text_config={
            **text(**tokens, vocab_size=len(tokenizer)),
            "head_dim": 16,
            "rope_parameters": MROPE,
        },
        vision_config={**TOWER, "image_size": 56, "patch_size": 14},
        image_token_id=ids["<|IMAGE_PLACEHOLDER|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|IMAGE_START|>"],
        vision_end_token_id=ids["<|IMAGE_END|>"],
    )
    template = chatml("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    processor = tf.PaddleOCRVLProcessor(
        tf.PaddleOCRVLImageProcessor(size=PATCH14), tokenizer, chat_template=template
    )
    return with_ends(tf.PaddleOCRVLForConditionalGeneration(config), **tokens), processor


@family(END)
def video_llama_3() -> Built:
    """Patches merged by another factor in each row (`image_merge_sizes`)."""
    parts = QwenParts()
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = tiny_tokenizer(qwen.SPECIAL, eos_token=END, pad_token="<|endoftext|>", named=named)
    config = tf.VideoLlama3Config(
        text_config=tf.Qwen2Config(**parts.text()).to_dict(),
        vision_config={**TOWER, "patch_size": 14},
        image_token_id=parts.images["image_token_id"],
        video_token_id=parts.images["video_token_id"],
    )
    processor = tf.VideoLlama3Processor(
        tf.VideoLlama3ImageProcessor(size=PATCH14, merge_size=2),
        tokenizer,
        tf.VideoLlama3VideoProcessor(size=PATCH14),
        chat_template=chatml(*VISION_MARKS),
    )
    return with_ends(tf.VideoLlama3ForConditionalGeneration(config), **parts.ends), processor


@family("<|user|>")
def glm_ocr() -> Built:

    tokenizer = tiny_tokenizer(
        glm.SPECIAL,
        ordinary=glm.ORDINARY,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    ids = tokenizer.vocab
    tokens = {"eos_token_id": [ids["<|endoftext|>"], ids["<|user|>"]], "pad_token_id": ids["<|endoftext|>"]}
    config = tf.GlmOcrConfig(
        text_config={
            **text(**tokens, vocab_size=len(tokenizer)),
            "head_dim": 16,
            "rope_parameters": glm.ROPE,
        },
        vision_config={**glm.TOWER, "out_hidden_size": WIDTH},
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"],
        image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"],
        video_end_token_id=ids["<|end_of_video|>"],
    )
    pixels = {"shortest_edge": 28 * 28 * 2, "longest_edge": 112 * 112 * 2}
    processor = tf.Glm46VProcessor(
        tf.Glm46VImageProcessor(size=pixels),
        tokenizer,
        tf.Glm46VVideoProcessor(size=pixels),
        chat_template=chat_template("glm4v"),
    )
    return with_ends(tf.GlmOcrForConditionalGeneration(config), **tokens), processor


@family(END)
def lighton_ocr() -> Built:
    """Pixtral's tower before Qwen3; row breaks are image tokens too."""
    named = {
        "image_token": "<|image_pad|>",
        "image_break_token": "<|vision_pad|>",
        "image_end_token": "<|vision_end|>",
    }
    tokenizer = tiny_tokenizer(qwen.SPECIAL, eos_token=END, pad_token="<|endoftext|>", named=named)
    tokens = token_ids(tokenizer)
    decoder = tf.Qwen3Config(**text(**tokens, vocab_size=len(tokenizer)), head_dim=16)
    config = tf.LightOnOcrConfig(
        text_config=decoder.to_dict(),
        vision_config=dict(PIXTRAL_TOWER),
        image_token_id=tokenizer.vocab["<|image_pad|>"],
        spatial_merge_size=2,
    )
    processor = tf.LightOnOcrProcessor(
        tf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size=14),
        tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=chatml("<|image_pad|>"),
    )
    return with_ends(tf.LightOnOcrForConditionalGeneration(config), **tokens), processor


@family(END)
def aria() -> Built:
    """A mixture of experts with a projector that queries by the number of patches."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", END, "<|img|>", "<fim_prefix>", "<fim_suffix>"]
    tokenizer = tiny_tokenizer(
        special,
        bos_token="<s>",
        eos_token=END,
        pad_token="<unk>",
        named={"image_token": "<|img|>"},
    )
    tokens = token_ids(tokenizer)
    decoder: dict[str, Any] = {
        **text(**tokens, vocab_size=len(tokenizer)),
        "head_dim": 16,
        "moe_num_experts": 4,
        "moe_topk": 2,
        "moe_num_shared_experts": 1,
    }
    config = tf.AriaConfig(
        text_config=decoder,
        vision_config={**TOWER, "model_type": "idefics3_vision", "image_size": 980, "patch_size": 140},
        projector_patch_to_query_dict={"49": 8},
        image_token_index=tokenizer.vocab["<|img|>"],
    )
    processor = tf.AriaProcessor(
        tf.AriaImageProcessor(),
        tokenizer,
        chat_template=chatml("<fim_prefix><|img|><fim_suffix>"),
        size_conversion={980: 8},
    )
    return with_ends(tf.AriaForConditionalGeneration(config), **tokens), processor
