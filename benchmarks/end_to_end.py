"""How much slower are the steps of `ray_jobs/train.py`, fed from JPEG files through Ray, than bare steps on
a batch in memory?

    python benchmarks/end_to_end.py FOLDER [--rows 2000] [--steps 30] [--set torch_compile=true] [--json FILE]

FOLDER holds LLaVA-1.5-7B (`benchmarks/full_size.py`). Rows have a 640x480 JPEG and text, and are cut to the
640 tokens of the bare step's
rows. The command's rows a second are those from its first step to its last, waiting for data and recording
graphs included, evaluation
left out; preparing the rows, loading and compiling come before and are stated beside.
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


def train(folder: str, rows: int, given: dict[str, str]) -> dict[str, Any]:
    """What train.py reports about an epoch of fresh rows."""
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
            **given,
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
    given = {"quantization": "nf4"} | dict(option.split("=", 1) for option in args.set)
    bare = measure("ours", args.folder, {**CASES["llava-b8"], "ours": given}, args.steps)
    step = bare["ms"] / 8
    print(f"bare step  {step:.1f} ms a row ({bare['low'] / 8:.1f} to {bare['high'] / 8:.1f})", flush=True)
    metrics = train(args.folder, args.rows, given)
    whole = 1e3 / metrics["rows_per_second"]
    print(
        f"train.py   {whole:.1f} ms a row over {metrics['step']} steps: {whole / step - 1:+.1%}; waiting for data "
        f"{metrics['data_wait_fraction']:.2%}; {metrics['seconds']:.0f} of {metrics['total_s']:.0f} s are training"
    )
    if args.json:
        Path(args.json).write_text(json.dumps({"bare": bare, "train": metrics}))


if __name__ == "__main__":
    main()
