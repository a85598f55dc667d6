"""How much faster does `ray_jobs/train.py` go through the same rows on several GPUs than on one?

    python benchmarks/workers.py FOLDER --workers 1 2 [--rows 1600] [--set trial_runner=packed
    torch_compile=true] [--json FILE]

FOLDER holds LLaVA-1.5-7B (`benchmarks/full_size.py`). Every number of workers trains the same steps: 8 rows
at a time on each GPU, and so
many such parts a step that all steps have the rows of the largest number. Rows have a 640x480 JPEG and text,
and are cut to 640 tokens.
Printed are the median time of a step, by its row, with the fastest and slowest, the whole command's seconds,
and the first number's time
over each: the speed-up. How far the adapters are apart says something where dropout is 0 or the runner is
packed. `--work` keeps rows and
runs in a folder, where the next call finds the rows.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from data import write_rows
from jobs import event_times, run_job
from train_step import LEARNING_RATE
from versions import check_versions

WARM_UP = 8  # steps: CUDA graphs are recorded in them
BATCH = 8  # rows at a time on each GPU


def train(
    folder: str, work: Path, data: Path, workers: int, rows: int, given: dict[str, str]
) -> dict[str, Any]:
    """One run of the command with steps of `rows` rows, unless `given` says how many parts a step has."""
    out = work / f"out{workers}"
    batch = int(given.get("per_device_train_batch_size", BATCH))
    parts = int(given.get("gradient_accumulation_steps", rows // (batch * workers)))
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
        **given,
    }
    took = run_job("train.py", options)
    seconds = (
        np.diff(event_times(out / "runs", "train/loss"))[WARM_UP:-1] / rows * 1e3
    )  # the last step is logged sooner than others
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return {
        "workers": workers,
        "set": given,
        "rows_a_step": rows,
        "ms_a_row": statistics.median(seconds),
        "low": float(seconds.min()),
        "high": float(seconds.max()),
        "total_s": took,
        **metrics,
    }


def distance(one: Path, other: Path) -> float:
    """Relative norm of the difference of two runs' B halves, which training alone has made: they begin at
    zero."""
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
    given = dict(option.split("=", 1) for option in args.set)
    rows = int(given.get("per_device_train_batch_size", BATCH)) * max(args.workers)
    first: dict[str, Any] | None = None
    with nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as work:
        work = Path(work).absolute()
        work.mkdir(parents=True, exist_ok=True)
        data = work / f"rows{args.rows}" / "rows.jsonl"
        if not data.exists():
            with tempfile.TemporaryDirectory(dir=work) as made:  # another call may be writing the same
                write_rows(Path(made) / "rows", args.rows, words=900)
                if not data.exists():
                    (Path(made) / "rows").rename(data.parent)
        for workers in args.workers:
            found = train(args.folder, work, data, workers, rows, given)
            first = first or found
            apart = distance(work / f"out{workers}", work / f"out{first['workers']}")
            print(
                f"{workers} worker{'s' if workers > 1 else ' '}  {found['ms_a_row']:.2f} ms a row ({found['low']:.2f} to "
                f"{found['high']:.2f})  {first['ms_a_row'] / found['ms_a_row']:.2f}x  {found['step']} steps, waiting for data "
                f"{found['data_wait_fraction']:.2%}, peak {found['peak_memory']:.1f} GB a GPU, eval_loss {found['eval_loss']:.4f}, "
                f"adapters {apart:.1e} apart, whole command {found['total_s']:.0f} s",
                flush=True,
            )
            if args.json:
                with Path(args.json).open("a") as file:
                    file.write(json.dumps({**found, "apart": apart}) + "\n")


if __name__ == "__main__":
    main()
