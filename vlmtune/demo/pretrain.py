"""python -m vlmtune.demo.pretrain --output_dir DIR [--images 393216] [--steps 10000] [--batch 512] [--seed 0]

Make the demo's base model: a small LLaVA that sees, names and counts drawn toys, and answers in English and
Korean. It is trained from scratch on `pretraining_data`, in about five minutes on one H200 with 16 cores. The
result is in `vlmtune/demo/base`, and how it was made in `docs/LOG.md`.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from vlmtune.demo.pretraining_data import PretrainingData, make_pretraining_data
from vlmtune.demo.pretraining_model import (
    PIXELS,
    PretrainingModel,
    RoundedToNF4,
    new_base,
    quantized_layers,
)

# CLIP's, as its image processor has them.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HELD_BACK = 2048  # images that are not trained on
LOG_STEPS, SAVE_STEPS = 100, 2000
PEAK_LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05


class BatchSampler:
    """Random images, each with one of its conversations, on the device; in random light and with noise."""

    def __init__(self, data: PretrainingData, device: torch.device, seed: int) -> None:
        self.data = {name: torch.from_numpy(array).to(device) for name, array in data.arrays().items()}
        self.device, self.random = device, torch.Generator(device).manual_seed(seed)

    def draw(self, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels `[B, 3, PIXELS, PIXELS]` and labels of random images that are trained on."""
        trained_on = len(self.data["ids"]) - HELD_BACK
        return self._batch(torch.randint(trained_on, (size,), generator=self.random, device=self.device))

    def held_back(self, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of the last images, which are not trained on."""
        last = len(self.data["ids"])
        return self._batch(torch.arange(last - size, last, device=self.device))

    def _batch(self, numbers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        variant = torch.randint(
            self.data["ids"].shape[1], (len(numbers),), generator=self.random, device=self.device
        )
        rows = {name: self.data[name][numbers, variant].long() for name in ("ids", "labels")}
        rows |= {name: self.data[name][numbers].long() for name in ("number", "kind", "colour")}
        return self.pixels(self.data["images"][numbers]), rows

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 `[B, 84, 112, 3]` → the processor's pixels, with random brightness, tint and grey noise."""
        values = images.permute(0, 3, 1, 2).float() / 255
        light = (
            1
            + 0.2 * (self._uniform(len(values), 1, 1, 1) - 0.5)
            + 0.1 * (self._uniform(len(values), 3, 1, 1) - 0.5)
        )
        share = 0.1 * self._uniform(len(values), 1, 1, 1)
        noise = self._uniform(len(values), 1, *values.shape[2:])
        return preprocess((values * light * (1 - share) + noise * share).clamp(0, 1))

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random, device=self.device)


def preprocess(images: Tensor) -> Tensor:
    """Images in 0 to 1 `[B, 3, H, W]`, stretched and normalized as the image processor does."""
    stretched = functional.interpolate(images, (PIXELS, PIXELS), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(numbers, device=images.device).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    return (stretched - mean) / std


def train(
    model: Any,
    tokenizer: Any,
    data: PretrainingData,
    folder: Path,
    *,
    steps: int,
    batch: int,
    seed: int,
    device: torch.device,
) -> None:
    """Train `model` in place; `folder`/log.jsonl gets a line every LOG_STEPS steps.

    In the second half every quantized layer computes with its weights rounded to NF4, so that little is lost
    when the demo loads them so.
    """
    sampler = BatchSampler(data, device, seed)
    opening = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode("USER: ", add_special_tokens=False)])
    trained = PretrainingModel(model, opening).to(device).train()
    layers = quantized_layers(model)
    rounding = [RoundedToNF4().to(device) for _ in layers]
    for layer, rounded in zip(layers, rounding, strict=True):
        parametrize.register_parametrization(layer, "weight", rounded)
    optimizer = _optimizer(trained, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    started = time.monotonic()
    for step in range(steps):
        for rounded in rounding:
            rounded.on = step >= steps // 2
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, answer_loss, _ = trained(*sampler.draw(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % LOG_STEPS == LOG_STEPS - 1 or step == steps - 1:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                _, held_back_loss, right = trained(*sampler.held_back(min(batch, HELD_BACK)))
            line = {
                "step": step + 1,
                "loss": loss.item(),
                "answers": answer_loss.item(),
                "held_back": held_back_loss.item(),
                "right": right.item(),
            }
            _log(folder, {**line, "seconds": time.monotonic() - started})
        if step % SAVE_STEPS == SAVE_STEPS - 1:
            torch.save(model.state_dict(), folder / "unfinished.pt")
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def _optimizer(model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=fused)


def learning_rate_factor(step: int, steps: int) -> float:
    """Up over the first 3 % of the steps, then down along a cosine to 0."""
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
    parser.add_argument("--images", "--pictures", type=int, default=393_216)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=512, help="conversations in a step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    folder: Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model, processor = new_base()
    started = time.monotonic()
    # Before CUDA starts, because it forks.
    data = make_pretraining_data(options.images + HELD_BACK, processor.tokenizer, seed=options.seed)
    print(f"{len(data.ids)} images drawn in {time.monotonic() - started:.0f} s", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    train(
        model,
        processor.tokenizer,
        data,
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
