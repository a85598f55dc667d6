"""How fast is a training step, and in how much memory, against the plain stack on the same GPU?

    python benchmarks/train_step.py FOLDER CASE [CASE ...] [--steps 12] [--json FILE]

FOLDER holds a model of true size (`benchmarks/full_size.py`). Each case runs TRL's SFTTrainer as people run
it, and then vlmtune's training loop, on the same rows, each in a process of its own. It prints the median of
the steps after the fourth.

The plain script is transformers + bitsandbytes + PEFT + TRL: adapters on the language model only (r=16,
dropout 0.05, q, k, v, o), bf16. TRL casts the adapters to bf16, and the script leaves that in. Both sides run
the vision tower's forward pass in every step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from versions import check_versions

WARM_UP = 4
LABELLED = 40  # tokens a row
LEARNING_RATE = 1e-5

# Each case: rows a step, tokens a row, whether a row has an image, and the options of both sides.
NF4, INT8 = {"bits": 4, "checkpointing": True}, {"bits": 8, "checkpointing": True}
SMALL = {
    "quantization": "nf4",
    "base_in_memory": "quantized",
    "gradient_checkpointing": True,
    "activation_offloading": True,
}
CASES: dict[str, dict[str, Any]] = {
    "llava-b8": {"batch": 8, "tokens": 640, "image": True, "plain": NF4, "ours": {"quantization": "nf4"}},
    "llava-b8-fp8": {"batch": 8, "tokens": 640, "image": True, "plain": NF4, "ours": {"quantization": "fp8"}},
    "llava-b8-small": {"batch": 8, "tokens": 640, "image": True, "plain": NF4, "ours": SMALL},
    "llava-b1": {"batch": 1, "tokens": 640, "image": True, "plain": NF4, "ours": {"quantization": "nf4"}},
    "mllama-text": {
        "batch": 2,
        "tokens": 512,
        "image": False,
        "plain": INT8,
        "ours": {"quantization": "int8"},
    },
    "mllama-image": {
        "batch": 2,
        "tokens": 512,
        "image": True,
        "plain": NF4 | {"checkpointing": False},
        "ours": {"quantization": "int8"},
    },
}


def example_batch(folder: str, case: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """One batch of rows of equal length: an image of 1120x1120 random pixels, if any, and random words."""
    from PIL import Image

    from vlmtune.model_ref import ModelRef

    processor: Any = ModelRef(folder).processor()
    random = np.random.RandomState(seed)
    batch, tokens = case["batch"], case["tokens"]
    if case["image"]:
        image = Image.fromarray(random.randint(0, 255, (1120, 1120, 3), dtype=np.uint8))
        row = dict(processor(text=[f"{processor.image_token}what"], images=[image], return_tensors="np"))
    else:
        row = dict(processor(text=["what"], return_tensors="np"))
    ids = row.pop("input_ids")
    row.pop("attention_mask")
    words = np.repeat(ids[:, -1:], batch, 0).repeat(tokens - ids.shape[1], 1) + random.randint(
        0, 50, (batch, tokens - ids.shape[1])
    )
    out = {"input_ids": np.concatenate([np.repeat(ids, batch, 0), words], 1).astype(np.int64)}
    out["attention_mask"] = np.ones_like(out["input_ids"])
    out["labels"] = np.where(np.arange(tokens) < tokens - LABELLED, -100, out["input_ids"])
    if "cross_attention_mask" in row:
        mask = row.pop("cross_attention_mask")
        row["cross_attention_mask"] = np.concatenate(
            [mask, mask[:, -1:].repeat(tokens - mask.shape[1], 1)], 1
        )
    return out | {name: np.repeat(value, batch, 0) for name, value in row.items()}


def batches(folder: str, case: dict[str, Any]) -> Callable[[int], dict[str, torch.Tensor]]:
    """The batch of a step by its number: always the same one, unless the case is `varied`."""

    @cache
    def batch_of_seed(seed: int) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(value) for name, value in example_batch(folder, case, seed).items()}

    return lambda step: dict(batch_of_seed(step if case.get("varied") else 0))


def plain(folder: str, case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train with TRL as its examples use it.

    The options of the case's plain side may include `same_start`, for float32 adapters with the initial
    values of vlmtune's, and another `dtype` to compute in.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PrinterCallback, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from vlmtune.model.lora import attach, keep_adapter_in_fp32

    dtype = getattr(torch, case["plain"].get("dtype", "bfloat16"))
    quantization = {
        4: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        8: BitsAndBytesConfig(load_in_8bit=True),
        None: None,
    }[case["plain"]["bits"]]
    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder,
        quantization_config=quantization,
        dtype=dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        attn_implementation=case["plain"].get("attention"),
    )
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=case.get("dropout", 0.05),
        task_type="CAUSAL_LM",
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)",
    )
    keep: Any = nullcontext
    if case["plain"].get("same_start"):
        model, keep = attach(model, lora, seed=42), keep_adapter_in_fp32
    batch_of = batches(folder, case)
    step = count()

    def collate(_: Any) -> dict[str, torch.Tensor]:
        batch = batch_of(next(step))
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(dtype)
        return batch

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            _synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        args = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=case["batch"],
            max_steps=steps,
            bf16=dtype == torch.bfloat16,
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=case["plain"]["checkpointing"],
            remove_unused_columns=False,
            disable_tqdm=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            learning_rate=LEARNING_RATE,
            logging_steps=1,
            use_cpu=not torch.cuda.is_available(),
        )
        with keep(model):
            trainer = SFTTrainer(
                model,
                args=args,
                train_dataset=Dataset.from_dict({"row": list(range(case["batch"] * steps))}),
                data_collator=collate,
                peft_config=None if case["plain"].get("same_start") else lora,
            )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock())
        trainer.train()
    return {**_result(times), "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log]}


def ours(folder: str, case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train with vlmtune's training loop, one worker, on rows that are in memory."""
    from types import SimpleNamespace

    from vlmtune.config.settings import Settings
    from vlmtune.data.input_format import InputFormat
    from vlmtune.model_ref import ModelRef
    from vlmtune.training.loop import train

    batch_of = batches(folder, case)
    rows = case["batch"] * steps
    processor: Any = ModelRef(folder).processor()
    meta = SimpleNamespace(
        input_format=InputFormat(),
        encoded=True,
        video_frames=None,
        pad_token_id=processor.tokenizer.pad_token_id or 0,
    )
    images = int((batch_of(0)["input_ids"][0] == processor.image_token_id).sum())
    counts = {"required": 0, "tokens": case["tokens"], "answer_tokens": LABELLED, "image_tokens": images}
    store: Any = SimpleNamespace(
        folder=f"{folder}/rows",
        meta=meta,
        rows_of=lambda split: np.arange(rows if split == "train" else case["batch"]),
        column=lambda name: np.full(rows, counts[name]),
        read=lambda numbers: [_example(batch_of(0)) for _ in numbers],
    )
    times: list[float] = []

    notes: list[str] = []
    losses: list[float] = []

    def progress(numbers: dict[str, Any]) -> None:
        if "note" in numbers:
            notes.append(numbers["note"])
        if "loss" in numbers and "eval_loss" not in numbers:
            losses.append(numbers["loss"])
        if "loss" in numbers:  # Python is done with the step; waiting for the device would leave it idle
            times.append(time.perf_counter())

    settings = Settings.from_flags(
        {
            "model_name_or_path": folder,
            "data_path": "none",
            "per_device_train_batch_size": case["batch"],
            "max_steps": steps,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": case.get("dropout", 0.05),
            "max_length": None,
            "learning_rate": LEARNING_RATE,
            "eval_strategy": "no",
            "per_device_eval_batch_size": case["batch"],
            **case["ours"],
        }
    )
    with tempfile.TemporaryDirectory() as out:
        train(
            settings,
            store,
            read_batches=lambda split, wanted, max_length: (batch_of(step) for step in range(len(wanted))),
            report=lambda *_: None,
            work_dir=out,
            progress=progress,
        )
    return {**_result(times), "notes": notes, "losses": losses}


def _example(batch: dict[str, torch.Tensor]) -> Any:
    """The first row of a batch, as a store holds it."""
    from vlmtune.data.encoded_example import ANSWER, IGNORED, TEXT, EncodedExample

    given = ("input_ids", "attention_mask", "labels")
    tensors = {name: tensor[:1].numpy() for name, tensor in batch.items() if name not in given}
    kinds = np.where(batch["labels"][0].numpy() == IGNORED, TEXT, ANSWER).astype(np.uint8)
    return EncodedExample(batch["input_ids"][0].numpy(), kinds, tensors)


def _result(times: list[float]) -> dict[str, Any]:
    from vlmtune.training.meter import peak_memory

    seconds = np.diff(times)[WARM_UP - 1 : -1]  # the last step is logged sooner than others
    return {
        "ms": statistics.median(seconds) * 1e3,
        "low": min(seconds) * 1e3,
        "high": max(seconds) * 1e3,
        "peak_gb": peak_memory(),
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(side: str, folder: str, case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run one side in a process of its own; returns its result, or the last line of its error."""
    command = [sys.executable, __file__, "--side", side, folder, json.dumps(case), "--steps", str(steps)]
    started = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        print(process.stderr[-3000:], file=sys.stderr, flush=True)
        return {"error": process.stderr.strip().splitlines()[-1][:200]}
    return {**json.loads(process.stdout.splitlines()[-1]), "total_s": time.perf_counter() - started}


def print_result(
    name: str, label: str, result: dict[str, Any], rows: int, against: dict[str, Any] | None = None
) -> None:
    if "ms" not in result:
        print(f"{name:16} {label:6} {result['error']}", flush=True)
        return
    ratio = f"  {against['ms'] / result['ms']:.2f}x" if against and "ms" in against else ""
    spread = f"({result['low'] / rows:.1f} to {result['high'] / rows:.1f})"
    print(
        f"{name:16} {label:6} {result['ms'] / rows:7.1f} ms a row {spread}"
        f"  peak {result['peak_gb']:5.1f} GB  whole run {result['total_s']:.0f} s{ratio}",
        flush=True,
    )
    for note in result.get("notes", []):
        print(f"    {note}", flush=True)


def main() -> None:
    check_versions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("plain", "ours"))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OPTION=VALUE", help="further options of vlmtune's side"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.side:
        print(
            json.dumps(
                {"plain": plain, "ours": ours}[args.side](args.folder, json.loads(args.cases[0]), args.steps)
            )
        )
        return
    results: dict[str, Any] = {}
    plain_runs: dict[str, Any] = {}
    for name in args.cases:
        case = CASES[name]
        case["ours"] |= dict(option.split("=", 1) for option in args.set)
        same = json.dumps({**case, "ours": None})  # cases that differ in `ours` alone share the plain run
        if args.only != "ours" and same not in plain_runs:
            plain_runs[same] = measure("plain", args.folder, case, args.steps)
            print_result(name, "plain", plain_runs[same], case["batch"])
        results[name] = {"plain": plain_runs.get(same)}
        if args.only != "plain":
            results[name]["ours"] = measure("ours", args.folder, case, args.steps)
            print_result(name, "ours", results[name]["ours"], case["batch"], plain_runs.get(same))
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
