"""The demo's base model before pretraining, its weights rounded to NF4, and the losses of its pretraining."""

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional

from vlmtune.demo.models import with_generation
from vlmtune.demo.pretraining_data import GRID, IGNORED, MOST_THINGS
from vlmtune.demo.tiny_tokenizer import llava_tokenizer, sample_texts, token_ids
from vlmtune.demo.toy_kinds import COLOURS, NAMES
from vlmtune.demo.toy_questions import vocabulary

PIXELS = 112  # a side of the vision tower's input: images are stretched to it, none is cut
WIDTH = 128
LAYERS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
}
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK = 64  # weights that share a scale
# The weight of each auxiliary loss. That of the number is larger, because most patches are empty.
AUXILIARY_WEIGHT, NUMBER_WEIGHT, KIND_WEIGHT, COLOUR_WEIGHT = 0.5, 3.0, 0.2, 0.1


class RoundedToNF4(nn.Module):
    """A weight as NF4 holds it; gradients pass as if it were not rounded. Off until `on` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.register_buffer("values", torch.tensor(NF4), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.on:
            return weight
        values: Tensor = self.get_buffer("values")
        blocks = weight.detach().reshape(-1, NF4_BLOCK)
        scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
        nearest = values[torch.bucketize(blocks / scale, (values[1:] + values[:-1]) / 2)] * scale
        return weight + (nearest.reshape_as(weight) - weight).detach()


def quantized_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers that NF4 rounds: all linear ones but the output head."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    ]


def new_base() -> tuple[Any, Any]:
    """The model, with random weights, and its processor."""
    tokenizer = llava_tokenizer([*vocabulary(), *sample_texts()])
    tokens = token_ids(tokenizer)
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(
            **LAYERS,
            num_key_value_heads=4,
            vocab_size=len(tokenizer),
            rms_norm_eps=1e-5,
            max_position_embeddings=1024,
            **tokens,
        ),
        vision_config=tf.CLIPVisionConfig(
            **LAYERS, image_size=PIXELS, patch_size=PIXELS // GRID, projection_dim=WIDTH
        ),
        # LLaVA-1.5 leaves CLIP's last layer out; here it would be trained for nothing.
        vision_feature_layer=-1,
        image_token_index=tokenizer.vocab["<image>"],
        image_seq_length=GRID * GRID,
        **tokens,
    )
    images = tf.CLIPImageProcessorPil(size={"height": PIXELS, "width": PIXELS}, do_center_crop=False)
    processor = tf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=PIXELS // GRID,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return with_generation(tf.LlavaForConditionalGeneration(config), **tokens), processor


def image_tokens(model: Any, pixels: Tensor) -> Tensor:
    """The language model's image tokens `[B, 64, WIDTH]` of images `[B, 3, 112, 112]`."""
    return model.model.multi_modal_projector(model.model.vision_tower(pixels).last_hidden_state[:, 1:])  # type: ignore[no-any-return]


def answer_logits(
    model: Any, images: Tensor, opening: Tensor, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of the labelled tokens, and those tokens.

    A row is `opening` (the tokens before the image), `images` (its image tokens) and `ids`.
    """
    embed = model.get_input_embeddings()
    before = embed(opening).expand(len(ids), -1, -1)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([before, images, embed(ids)], 1), use_cache=False
    ).last_hidden_state
    predicting = hidden[:, len(opening) + images.shape[1] - 1 : -1]  # the position before each token
    labelled = labels != IGNORED
    return model.lm_head(predicting[labelled]), labels[labelled]


class PretrainingModel(nn.Module):
    """The model with an auxiliary layer that reads what is in each patch, and their losses.

    From each image token the auxiliary layer must predict the number, kind and colour of the things in its
    patch. So the vision tower learns in minutes what answers alone would teach it much more slowly. The layer
    is not part of the saved model.
    """

    def __init__(self, model: Any, opening: Tensor) -> None:
        super().__init__()
        self.model = model
        self.patch_reader = nn.Linear(WIDTH, MOST_THINGS + 1 + len(NAMES) + 1 + len(COLOURS))
        self.register_buffer("opening", opening, persistent=False)

    def forward(self, pixels: Tensor, row: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The loss to train on, the loss of the answers in it, and the share of right answer tokens."""
        images = image_tokens(self.model, pixels)
        opening = self.get_buffer("opening")
        logits, labels = answer_logits(self.model, images, opening, row["ids"], row["labels"])
        answer_loss = functional.cross_entropy(logits.float(), labels)
        loss = answer_loss + AUXILIARY_WEIGHT * self._patch_loss(images, row)
        return loss, answer_loss.detach(), (logits.argmax(1) == labels).float().mean()

    def _patch_loss(self, images: Tensor, row: dict[str, Tensor]) -> Tensor:
        read = self.patch_reader(images).float().flatten(0, 1)
        number, kind, colour = read.split((MOST_THINGS + 1, len(NAMES) + 1, len(COLOURS)), 1)
        loss = NUMBER_WEIGHT * functional.cross_entropy(number, row["number"].flatten())
        loss = loss + KIND_WEIGHT * functional.cross_entropy(
            kind, row["kind"].flatten(), ignore_index=IGNORED
        )
        return loss + COLOUR_WEIGHT * functional.cross_entropy(
            colour, row["colour"].flatten(), ignore_index=IGNORED
        )
