"""How fast is fine-tuning of a current model, against the plain stack and Unsloth on the same rows and GPU?

    python benchmarks/models.py FOLDER CASE [CASE ...] [--steps 36] [--set OPTION=VALUE] [--json FILE]

FOLDER holds a model of true size (`benchmarks/full_size.py`). A case is SIDE:BATCH, with the sides

- `ours`: `ray_jobs/train.py`, once through all rows and then again. "first epoch" is with the vision tower,
  the median of the others with its cached features where they are cached.
- `plain`, `plain-checkpointing`: TRL's SFTTrainer with its own vision collator, four loader workers.
- `unsloth`, `unsloth-checkpointing`: FastVisionModel with its own collator. It needs transformers <= 5.17,
  trl <= 1.15 and datasets < 5, an environment of its own.
- `packed`, whose BATCH is TRIALSxBATCH: an engine of a search (`benchmarks/search.py`).

All sides: NF4, bfloat16, LoRA r=16 on q, k, v, o of the language model, one 640x480 JPEG and 110 words a row,
a log line a step. Each case runs in a process of its own. The share of the bf16 limit counts 4 FLOP a decoder
weight and token, against a large matrix product on this GPU.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import event_times
from versions import check_versions

SKIPPED = 4  # steps of the plain side before the median
WORDS, ANSWER_WORDS = 110, 15
LEARNING_RATE = 1e-5
ROOT = Path(__file__).parents[1]


def write_rows(folder: Path, count: int) -> None:
    """Write `count` rows with a random 640x480 JPEG each."""
    from PIL import Image

    random = np.random.RandomState(0)
    words = ["steel", "beam", "column", "slab", "of", "the", "wall", "and", "a", "floor", "in", "concrete"]
    lines = []
    for row in range(count):
        pixels = random.randint(0, 255, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.jpg", quality=80)
        prompt, answer = (" ".join(random.choice(words, number)) for number in (WORDS, ANSWER_WORDS))
        lines.append(json.dumps({"instruction": prompt, "output": answer, "image": f"{row}.jpg"}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


def ours(folder: str, rows: Path, args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """`ray_jobs/train.py` on the rows."""
    flags = {
        "model_name_or_path": folder,
        "data_path": str(rows / "rows.jsonl"),
        "output_dir": str(rows / "out"),
        "cache_dir": str(rows / "cache"),
        "overwrite": "true",
        "quantization": "nf4",
        "per_device_train_batch_size": str(batch),
        "max_steps": str(args.steps),
        "max_length": "1024",
        "eval_strategy": "no",
        "eval_fraction": "0.02",
        "test_fraction": "0.02",
        "lora_r": "16",
        "lora_alpha": "32",
        "lora_dropout": "0.05",
        "learning_rate": str(LEARNING_RATE),
        "logging_steps": "1",
        "num_workers": "0",
        "torch_compile": "true",
        **dict(option.split("=", 1) for option in args.set),
    }
    command = [sys.executable, "ray_jobs/train.py", *(p for n, v in flags.items() for p in (f"--{n}", v))]
    output = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:  # at once: a time limit may end this process first
            output += line
            print(line, end="", file=sys.stderr, flush=True)
    if process.returncode:
        return {"error": output.strip().splitlines()[-1][:300]}
    seconds = np.diff(event_times(rows / "out" / "runs", "train/loss"))
    trained = round(args.rows * 0.96)
    epoch = -(-trained // batch)
    later = seconds[min(epoch, len(seconds) - 2) : -1]
    first = seconds[min(8, epoch // 2) : epoch - 1]
    metrics = json.loads((rows / "out" / "metrics.json").read_text())
    estimate = re.search(r"Memory\s+about ([\d.]+) GB", output)
    return {
        "ms_a_row": statistics.median(later) / batch * 1e3,
        "low": float(min(later)) / batch * 1e3,
        "high": float(max(later)) / batch * 1e3,
        "first_epoch": statistics.median(first) / batch * 1e3 if len(first) else None,
        "peak_gb": metrics.get("peak_memory"),
        "estimate_gb": float(estimate[1]) if estimate else None,
        "plan": next((line for line in output.splitlines() if "about" in line and "GB" in line), ""),
        "tokens": tokens_a_row(rows / "cache"),
    }


def tokens_a_row(cache: Path) -> float | None:
    """The mean number of tokens of the prepared rows."""
    from vlmtune.data.store import Store

    for meta in cache.rglob("meta.json"):
        return float(np.mean(Store(str(meta.parent)).column("tokens")))
    return None


def plain(
    folder: str, rows: Path, args: argparse.Namespace, batch: int, checkpointing: bool
) -> dict[str, Any]:
    """TRL's SFTTrainer as its own example for vision models runs it."""
    from datasets import Dataset, Image, List
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    steps = args.plain_steps
    data = [_conversation(line) for line in _lines(rows, batch * steps)]
    images = [[str(rows / line["image"])] for line in _lines(rows, batch * steps)]
    dataset = Dataset.from_dict({"messages": data, "images": images}).cast_column("images", List(Image()))
    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        dtype=torch.bfloat16,
        device_map={"": 0},
    )
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)",
    )
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                output_dir=out,
                per_device_train_batch_size=batch,
                max_steps=steps,
                bf16=True,
                report_to="none",
                save_strategy="no",
                gradient_checkpointing=checkpointing,
                disable_tqdm=True,
                max_length=None,
                learning_rate=LEARNING_RATE,
                logging_steps=1,
                dataloader_num_workers=4,
            ),
            train_dataset=dataset,
            peft_config=lora,
            processing_class=AutoProcessor.from_pretrained(folder),
        )
        trainer.remove_callback(PrinterCallback)
        return _timed(trainer, batch)


def unsloth(
    folder: str, rows: Path, args: argparse.Namespace, batch: int, checkpointing: bool
) -> dict[str, Any]:
    """Unsloth's recipe for vision models. Its collator takes opened images."""
    from unsloth import FastVisionModel  # it changes transformers, so before the others
    from unsloth.trainer import UnslothVisionDataCollator  # isort: skip
    from PIL import Image
    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    steps, mode = args.plain_steps, "unsloth" if checkpointing else False
    data = []
    for line in _lines(rows, batch * steps):
        image = Image.open(rows / line["image"]).convert("RGB")
        prompt = [{"type": "text", "text": line["instruction"]}, {"type": "image", "image": image}]
        answer = [{"type": "text", "text": line["output"]}]
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        data.append({"messages": turns})
    model, processor = FastVisionModel.from_pretrained(
        folder, load_in_4bit=True, use_gradient_checkpointing=mode, max_seq_length=1024
    )
    model = FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers=False,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=False,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=mode,
    )
    FastVisionModel.for_training(model)
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=out,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=1,  # its own default is 2
                max_steps=steps,
                bf16=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                max_length=1024,
                learning_rate=LEARNING_RATE,
                logging_steps=1,
                remove_unused_columns=False,
                dataset_text_field="",
                dataset_kwargs={"skip_prepare_dataset": True},
                optim="adamw_torch",
                dataloader_num_workers=4,
            ),
            train_dataset=data,
            processing_class=processor,
            data_collator=UnslothVisionDataCollator(model, processor),
        )
        trainer.remove_callback(PrinterCallback)
        return _timed(trainer, batch)


def packed(folder: str, args: argparse.Namespace, case: str) -> dict[str, Any]:
    """Rounds of an engine, by `benchmarks/search.py`."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "benchmarks/search.py", folder, "packed", "--cases", case]
        command += ["--words", str(WORDS), "--tokens", "1024", "--rounds", "12", "--json", file.name]
        command += ["--set", "torch_compile=true", *args.set]
        if subprocess.run(command, stdout=subprocess.DEVNULL, cwd=ROOT).returncode:
            return {"error": "see above"}
        result: dict[str, Any] = json.loads(Path(file.name).read_text().splitlines()[-1])
        estimate = re.search(r"about ([\d.]+) GB", " ".join(result["notes"]))
        return {**result, "estimate_gb": float(estimate[1]) if estimate else None}


def run_case(folder: str, rows: Path, args: argparse.Namespace, case: str) -> dict[str, Any]:
    side, _, batch = case.partition(":")
    if side == "packed":
        return packed(folder, args, batch)
    if side == "ours":
        return ours(folder, rows, args, int(batch))
    run = {"plain": plain, "unsloth": unsloth}[side.removesuffix("-checkpointing")]
    return run(folder, rows, args, int(batch), side.endswith("-checkpointing"))


def _lines(rows: Path, count: int) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in (rows / "rows.jsonl").read_text().splitlines()]
    return (lines * -(-count // len(lines)))[:count]


def _conversation(line: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": line["instruction"]},
        {"role": "assistant", "content": line["output"]},
    ]


def _timed(trainer: Any, batch: int) -> dict[str, Any]:
    """Train, with the time of each step."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    seconds = np.diff(times)[SKIPPED:]
    return {
        "ms_a_row": statistics.median(seconds) / batch * 1e3,
        "low": float(min(seconds)) / batch * 1e3,
        "high": float(max(seconds)) / batch * 1e3,
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30,
    }


def limit(folder: str, tokens: float) -> float:
    """Milliseconds a row that the decoder's products take at this GPU's rate of large ones."""
    from search import matmul_rate

    from vlmtune.model_ref import ModelRef

    decoder = ModelRef(folder).meta_model().get_decoder()
    weights = sum(
        module.weight.numel() for module in decoder.modules() if isinstance(module, torch.nn.Linear)
    )
    return 4 * weights * tokens / matmul_rate() * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("cases", nargs="+", metavar="SIDE:BATCH")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--steps", type=int, default=36, help="of `ours`")
    parser.add_argument("--plain_steps", type=int, default=14, help="of `plain` and `unsloth`")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OPTION=VALUE", help="for `ours` and `packed`"
    )
    parser.add_argument("--rows_folder", help=argparse.SUPPRESS)  # a process of one case
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.rows_folder:
        print(json.dumps(run_case(args.folder, Path(args.rows_folder), args, args.cases[0])))
        return
    check_versions()
    tokens = 0.0
    with tempfile.TemporaryDirectory() as rows:
        write_rows(Path(rows), args.rows)
        for case in args.cases:
            started = time.perf_counter()
            command = [sys.executable, __file__, args.folder, case, "--rows_folder", rows]
            command += ["--rows", str(args.rows), "--steps", str(args.steps)]
            command += ["--plain_steps", str(args.plain_steps), "--set", *args.set]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            result: dict[str, Any] = (
                json.loads(process.stdout.splitlines()[-1])
                if not process.returncode
                else {"error": "see above"}
            )
            tokens = result.get("tokens") or tokens
            if tokens and "ms_a_row" in result and torch.cuda.is_available():
                result["share_of_limit"] = limit(args.folder, tokens) / result["ms_a_row"]
            line = {"case": case, "set": args.set, "total_s": time.perf_counter() - started, **result}
            print(json.dumps(line), flush=True)
            if args.json:
                with Path(args.json).open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
