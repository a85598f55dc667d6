"""python -m vlmtune.demo.pretrain --output_dir DIR [--pictures 393216] [--steps 10000] [--batch 512] [--seed
0]

Make the demo's base model: a small LLaVA that sees, names and counts drawn toys, and answers in English and
Korean. It is trained from
scratch on `lessons`; about five minutes on one H200 with 16 cores. What came out is in `vlmtune/demo/base`,
how is in `docs/LOG.md`.

Beside the loss on answers, the image tokens that the language model gets must tell, by one linear layer that
is thrown away afterwards,
what stands in their patch: so the vision tower learns in minutes what answers alone would take much longer
to teach it. In the second half
every linear layer computes with its weights rounded to NF4, so that little is lost when the demo loads them
so.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from vlmtune.demo.kinds import COLOURS, NAMES
from vlmtune.demo.lessons import GRID, IGNORED, MOST, Lessons, make_lessons
from vlmtune.demo.models import byte_level_tokenizer, token_ids, with_generation
from vlmtune.demo.quiz import vocabulary
from vlmtune.demo.scenes import sample_texts

PIXELS = 112  # a side of what the vision tower sees: pictures are stretched to it, none is cut
WIDTH = 128
LAYERS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
}
MEAN, SPREAD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # CLIP's, as its image processor has them
HELD_BACK = 2048  # pictures that are not trained on

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF4_BLOCK = 64  # weights that share a scale


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


def new_base() -> tuple[Any, Any]:
    """The model, with random weights, and its processor."""
    tokenizer = byte_level_tokenizer(
        [*vocabulary(), *sample_texts()],
        ["<unk>", "<s>", "</s>"],
        ["<image>", "<pad>"],
        add_bos=True,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )
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
        # LLaVA-1.5 leaves CLIP's last layer out; here it would be trained for nothing
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
    """What the language model gets of pictures `[B, 3, 112, 112]`: `[B, 64, WIDTH]`."""
    return model.model.multi_modal_projector(model.model.vision_tower(pixels).last_hidden_state[:, 1:])  # type: ignore[no-any-return]


def answer_logits(
    model: Any, images: Tensor, opening: Tensor, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of the labelled tokens, and those tokens: of rows `opening` (the tokens before the image),
    image, `ids`."""
    embed = model.get_input_embeddings()
    before = embed(opening).expand(len(ids), -1, -1)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([before, images, embed(ids)], 1), use_cache=False
    ).last_hidden_state
    told_by = hidden[
        :, len(opening) + images.shape[1] - 1 : -1
    ]  # each token is told by the position before it
    asked = labels != IGNORED
    return model.lm_head(told_by[asked]), labels[asked]


class Pupil(nn.Module):
    """The model with the layer that tells what is in each patch, and the three losses."""

    def __init__(self, model: Any, opening: Tensor) -> None:
        super().__init__()
        self.model, self.tell = model, nn.Linear(WIDTH, MOST + 1 + len(NAMES) + 1 + len(COLOURS))
        self.register_buffer("opening", opening, persistent=False)

    def forward(self, pixels: Tensor, row: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The loss to train on, the part of it that answers have, and the share of answers' tokens that are
        right."""
        images = image_tokens(self.model, pixels)
        logits, labels = answer_logits(
            self.model, images, self.get_buffer("opening"), row["ids"], row["labels"]
        )
        answers = functional.cross_entropy(logits.float(), labels)
        number, kind, colour = (
            self.tell(images).float().flatten(0, 1).split((MOST + 1, len(NAMES) + 1, len(COLOURS)), 1)
        )
        seen = 3.0 * functional.cross_entropy(
            number, row["number"].flatten()
        )  # small, for most patches are empty
        seen = seen + 0.2 * functional.cross_entropy(kind, row["kind"].flatten(), ignore_index=IGNORED)
        seen = seen + 0.1 * functional.cross_entropy(colour, row["colour"].flatten(), ignore_index=IGNORED)
        return answers + 0.5 * seen, answers.detach(), (logits.argmax(1) == labels).float().mean()


class Sampler:
    """Batches of random pictures with one of their conversations, on the device, in random light and
    noise."""

    def __init__(self, lessons: Lessons, device: torch.device, seed: int) -> None:
        self.data = {name: torch.from_numpy(array).to(device) for name, array in lessons.arrays().items()}
        self.device, self.random = device, torch.Generator(device).manual_seed(seed)

    def batch(self, chosen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        variant = torch.randint(
            self.data["ids"].shape[1], (len(chosen),), generator=self.random, device=self.device
        )
        rows = {name: self.data[name][chosen, variant].long() for name in ("ids", "labels")}
        rows |= {name: self.data[name][chosen].long() for name in ("number", "kind", "colour")}
        return self.pixels(self.data["pictures"][chosen]), rows

    def draw(self, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        trained_on = len(self.data["ids"]) - HELD_BACK
        return self.batch(torch.randint(trained_on, (size,), generator=self.random, device=self.device))

    def held_back(self, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        last = len(self.data["ids"])
        return self.batch(torch.arange(last - size, last, device=self.device))

    def pixels(self, pictures: Tensor) -> Tensor:
        """uint8 `[B, 84, 112, 3]` → what the processor makes of them, with random brightness, tint and grey
        noise."""
        values = pictures.permute(0, 3, 1, 2).float() / 255
        light = (
            1
            + 0.2 * (self._uniform(len(values), 1, 1, 1) - 0.5)
            + 0.1 * (self._uniform(len(values), 3, 1, 1) - 0.5)
        )
        share = 0.1 * self._uniform(len(values), 1, 1, 1)
        noise = self._uniform(len(values), 1, *values.shape[2:])
        values = (values * light * (1 - share) + noise * share).clamp(0, 1)
        return prepared(values)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random, device=self.device)


def prepared(values: Tensor) -> Tensor:
    """Pictures in 0 to 1 `[B, 3, H, W]`, stretched and normalised as the image processor does."""
    stretched = functional.interpolate(values, (PIXELS, PIXELS), mode="bicubic", antialias=True).clamp(0, 1)
    mean, spread = (
        torch.tensor(numbers, device=values.device).view(1, 3, 1, 1) for numbers in (MEAN, SPREAD)
    )
    return (stretched - mean) / spread


def linears(model: nn.Module) -> list[nn.Linear]:
    """The layers that NF4 rounds: all linear ones but the output head."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    ]


def train(
    model: Any,
    tokenizer: Any,
    lessons: Lessons,
    folder: Path,
    *,
    steps: int,
    batch: int,
    seed: int,
    device: torch.device,
) -> None:
    """Train `model` in place; `folder`/log.jsonl has a line for every hundred steps."""
    sampler = Sampler(lessons, device, seed)
    opening = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode("USER: ", add_special_tokens=False)])
    pupil = Pupil(model, opening).to(device).train()
    rounding = [RoundedToNF4().to(device) for _ in linears(model)]
    for layer, rounded in zip(linears(model), rounding, strict=True):
        parametrize.register_parametrization(layer, "weight", rounded)
    decayed = [parameter for parameter in pupil.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in pupil.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98), fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps))
    started = time.monotonic()
    for step in range(steps):
        for rounded in rounding:
            rounded.on = step >= steps // 2
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, answers, _ = pupil(*sampler.draw(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                _, held_back, right = pupil(*sampler.held_back(min(batch, HELD_BACK)))
            line = {
                "step": step + 1,
                "loss": loss.item(),
                "answers": answers.item(),
                "held_back": held_back.item(),
                "right": right.item(),
            }
            _log(folder, {**line, "seconds": time.monotonic() - started})
        if step % 2000 == 1999:
            torch.save(model.state_dict(), folder / "unfinished.pt")
    for layer in linears(model):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def pace(step: int, steps: int) -> float:
    """The learning rate's factor: up over the first 3 %, then down along a cosine to nothing."""
    warmup = max(1, steps * 3 // 100)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def _log(folder: Path, line: dict[str, float]) -> None:
    rounded = {name: round(value, 4) for name, value in line.items()}
    print(rounded, flush=True)
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(rounded) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vlmtune.demo.pretrain", description="Make the demo's base model.", allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=393_216)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=512, help="conversations in a step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    folder: Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model, processor = new_base()
    started = time.monotonic()
    lessons = make_lessons(
        options.pictures + HELD_BACK, processor.tokenizer, seed=options.seed
    )  # before CUDA starts: it forks
    print(f"{len(lessons.ids)} pictures drawn in {time.monotonic() - started:.0f} s", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    train(
        model,
        processor.tokenizer,
        lessons,
        folder,
        steps=options.steps,
        batch=options.batch,
        seed=options.seed,
        device=device,
    )
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "unfinished.pt").unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
