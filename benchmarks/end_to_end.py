"""How much slower are the steps of `ray_jobs/train.py`, fed from JPEG files through Ray, than bare steps?

    python benchmarks/end_to_end.py FOLDER [--rows 2000] [--steps 30] [--set torch_compile=true] [--json FILE]

FOLDER holds LLaVA-1.5-7B (`benchmarks/full_size.py`). A bare step trains on a batch in memory. Rows have a
640x480 JPEG and text, and are cut to the 640 tokens of the bare step's rows. The command's time is counted
from its first step to its last, waiting for data and graph capture included and evaluation excluded.
Preparing the rows, loading and compiling come before; their time is printed beside.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from data import write_rows
from jobs import run_job
from train_step import CASES, LEARNING_RATE, measure
from versions import check_versions


def train(folder: str, rows: int, flags: dict[str, str]) -> dict[str, Any]:
    """The metrics of train.py after an epoch of new rows."""
    with tempfile.TemporaryDirectory() as work:
        write_rows(Path(work), rows, words=900)
        options = {
            "model_name_or_path": folder,
            "data_path": f"{work}/rows.jsonl",
            "output_dir": f"{work}/out",
            "cache_dir": f"{work}/cache",
            "eval_strategy": "no",
            "num_train_epochs": "1",
            "eval_fraction": "0.02",
            "test_fraction": "0.02",
            "per_device_train_batch_size": "8",
            "max_length": "640",
            "lora_r": "16",
            "lora_alpha": "32",
            "lora_dropout": "0.05",
            "learning_rate": str(LEARNING_RATE),
            **flags,
        }
        seconds = run_job("train.py", options)
        metrics: dict[str, Any] = json.loads(Path(f"{work}/out/metrics.json").read_text())
        return metrics | {"total_s": seconds}


def main() -> None:
    check_versions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=30, help="of the bare step")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OPTION=VALUE", help="further options of both"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    flags = {"quantization": "nf4"} | dict(option.split("=", 1) for option in args.set)
    bare = measure("ours", args.folder, {**CASES["llava-b8"], "ours": flags}, args.steps)
    step = bare["ms"] / 8
    print(f"bare step  {step:.1f} ms a row ({bare['low'] / 8:.1f} to {bare['high'] / 8:.1f})", flush=True)
    metrics = train(args.folder, args.rows, flags)
    row = 1e3 / metrics["rows_per_second"]
    print(
        f"train.py   {row:.1f} ms a row over {metrics['step']} steps: {row / step - 1:+.1%}; "
        f"waiting for data {metrics['data_wait_fraction']:.2%}; "
        f"{metrics['seconds']:.0f} of {metrics['total_s']:.0f} s are training"
    )
    if args.json:
        Path(args.json).write_text(json.dumps({"bare": bare, "train": metrics}))


if __name__ == "__main__":
    main()
