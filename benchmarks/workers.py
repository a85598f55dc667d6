"""How much faster does `ray_jobs/train.py` train on the same rows with several GPUs than with one?

    python benchmarks/workers.py FOLDER --workers 1 2 [--rows 1600] [--json FILE] [--work FOLDER]
        [--set trial_runner=packed torch_compile=true]

FOLDER holds LLaVA-1.5-7B (`benchmarks/full_size.py`). Every number of workers trains the same steps: 8 rows
at a time on each GPU, and as many such parts a step as give all steps the rows of the largest number of
workers. Rows have a 640x480 JPEG and text, and are cut to 640 tokens.

Prints for each number the median time of a step divided by its rows, with the fastest and slowest, the
seconds of the whole command, and the speed-up over the first number. The distance between the adapters is
only meaningful if dropout is 0 or the runner is packed. `--work` keeps rows and runs in a folder, where the
next call finds the rows.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from data import write_rows
from jobs import event_times, run_job
from train_step import LEARNING_RATE
from versions import check_versions

WARM_UP = 8  # steps: CUDA graphs are captured in them
BATCH = 8  # rows at a time on each GPU


def train(
    folder: str, work: Path, data: Path, workers: int, rows: int, flags: dict[str, str]
) -> dict[str, Any]:
    """Run the command once, in steps of `rows` rows unless `flags` sets gradient_accumulation_steps."""
    out = work / f"out{workers}"  # another number of workers is another folder: runs may share the rest
    batch = int(flags.get("per_device_train_batch_size", BATCH))
    parts = int(flags.get("gradient_accumulation_steps", rows // (batch * workers)))
    rows = parts * batch * workers
    options = {
        "model_name_or_path": folder,
        "data_path": str(data),
        "output_dir": str(out),
        "cache_dir": f"{work}/cache",
        "eval_strategy": "no",
        "num_train_epochs": "1",
        "eval_fraction": "0.02",
        "test_fraction": "0.02",
        "logging_steps": "1",
        "max_length": "640",
        "lora_r": "16",
        "lora_alpha": "32",
        "lora_dropout": "0.05",
        "learning_rate": str(LEARNING_RATE),
        "overwrite": "true",
        "quantization": "nf4",
        "num_workers": str(workers),
        "per_device_train_batch_size": str(batch),
        "gradient_accumulation_steps": str(parts),
        **flags,
    }
    took = run_job("train.py", options)
    # Without the last step, which is logged sooner than the others.
    ms_a_row = np.diff(event_times(out / "runs", "train/loss"))[WARM_UP:-1] / rows * 1e3
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return {
        "workers": workers,
        "set": flags,
        "rows_a_step": rows,
        "ms_a_row": statistics.median(ms_a_row),
        "low": float(ms_a_row.min()),
        "high": float(ms_a_row.max()),
        "total_s": took,
        **metrics,
    }


def rows_in(folder: Path, write: Callable[[Path], object]) -> Path:
    """`rows.jsonl` in `folder`, which `write` fills if it does not exist."""
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:  # another command may write the same
            rows = Path(made) / "rows"
            rows.mkdir()
            write(rows)
            if not folder.exists():
                rows.rename(folder)
    return folder / "rows.jsonl"


def distance(one: Path, other: Path) -> float:
    """Relative norm of the difference of two runs' B matrices, which begin at zero."""
    from safetensors.numpy import load_file

    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    names = [name for name in theirs if "lora_B" in name]
    apart, norm = (
        sum(np.square(part, dtype=np.float64).sum() for part in parts)
        for parts in ((mine[name] - theirs[name] for name in names), (theirs[name] for name in names))
    )
    return float(np.sqrt(apart / norm))


def main() -> None:
    check_versions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OPTION=VALUE", help="further options of train.py"
    )
    parser.add_argument("--json")
    parser.add_argument("--work", metavar="FOLDER")
    args = parser.parse_args()
    flags = dict(option.split("=", 1) for option in args.set)
    rows = int(flags.get("per_device_train_batch_size", BATCH)) * max(args.workers)
    first: dict[str, Any] | None = None
    with nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as work:
        work = Path(work).absolute()
        work.mkdir(parents=True, exist_ok=True)
        data = rows_in(work / f"rows{args.rows}", partial(write_rows, rows=args.rows, words=900))
        for workers in args.workers:
            result = train(args.folder, work, data, workers, rows, flags)
            first = first or result
            apart = distance(work / f"out{workers}", work / f"out{first['workers']}")
            print(
                f"{workers} worker{'s' if workers > 1 else ' '}  {result['ms_a_row']:.2f} ms a row "
                f"({result['low']:.2f} to {result['high']:.2f})  "
                f"{first['ms_a_row'] / result['ms_a_row']:.2f}x  {result['step']} steps, "
                f"waiting for data {result['data_wait_fraction']:.2%}, "
                f"peak {result['peak_memory']:.1f} GB a GPU, eval_loss {result['eval_loss']:.4f}, "
                f"adapters {apart:.1e} apart, whole command {result['total_s']:.0f} s",
                flush=True,
            )
            if args.json:
                with Path(args.json).open("a") as file:
                    file.write(json.dumps({**result, "apart": apart}) + "\n")


if __name__ == "__main__":
    main()
