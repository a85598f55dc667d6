"""How fast is a search over packed trials, compared with plain trials and with isolated trials?

    python benchmarks/search.py FOLDER packed --cases 16x1 4x8 [--set quantization=fp8] [--json FILE]
    python benchmarks/search.py FOLDER plain --batch 1
    python benchmarks/search.py FOLDER beside --batch 1 --trials 4 [--side plain]
    python benchmarks/search.py FOLDER equal --batch 1 --trials 4
    python benchmarks/search.py FOLDER whole --trials 16 --batch 1 [--early_stopping asha]
    python benchmarks/search.py table FILE [FILE ...] [--figure FILE.svg]

FOLDER holds a model of true size (`benchmarks/full_size.py`). Each mode prints the time a row without the
start-up:

- `packed` trains several trials in one engine, on random images with text, 640 tokens a row (`--text` for
  128 tokens without an image).
- `plain` is one TRL run with gradient checkpointing, as people copy it.
- `beside` runs several of vlmtune's isolated training loops at once on the same GPU, or with `--side plain`
  several of that TRL run.
- `equal` compares packed adapters with those of isolated runs, and isolated runs with one kernel with
  isolated runs with another.
- `whole` runs `ray_jobs/tune.py` on 100 rows a trial, from command to end, and says what Tune, RPC and
  checkpoints add to the engine's time.
- `table` joins the results of several calls.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figure import write_figure
from jobs import event_times, run_job
from train_step import CASES, _synchronize, measure
from versions import check_versions
from workers import rows_in

from vlmtune.model_ref import ModelRef
from vlmtune.search.saved_trials import read_trials

WARM_UP = 6  # rounds: three without a graph, one that captures it, and their neighbors
ROWS = 100


def write_rows(folder: Path, *, text: bool, words_a_row: int = 900, count: int = ROWS) -> Path:
    """Write `count` training rows and 8 others, with a random image unless `text`."""
    from PIL import Image

    random = np.random.RandomState(0)
    words = ["steel", "beam", "column", "slab", "of", "the", "wall", "and", "a", "floor", "in", "concrete"]
    lines = []
    for row in range(count + 8):
        prompt, answer = (" ".join(random.choice(words, count)) for count in (words_a_row, 40))
        line = {"instruction": prompt, "output": answer}
        if not text:
            Image.fromarray(random.randint(0, 255, (480, 640, 3), dtype=np.uint8)).save(
                folder / f"{row}.jpg", quality=80
            )
            line["image"] = f"{row}.jpg"
        lines.append(json.dumps(line))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def prepared_rows(folder: str, work: Path, *, text: bool, words_a_row: int = 900) -> Any:
    import ray

    from vlmtune.cluster import connect
    from vlmtune.data.cache import prepare_store
    from vlmtune.data.source import DataSource

    connect()
    store = prepare_store(
        DataSource(
            str(write_rows(work, text=text, words_a_row=words_a_row)),
            ModelRef(folder),
            eval_fraction=0.04,
            test_fraction=0.03,
        ),
        str(work / "cache"),
    )
    ray.shutdown()
    return store


def options(folder: str, args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    from vlmtune.config.settings import Settings

    flags = dict(option.split("=", 1) for option in args.set)
    return Settings.from_flags(
        {
            "model_name_or_path": folder,
            "data_path": "rows",
            "quantization": "nf4",
            "per_device_train_batch_size": args.batch,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "max_length": length_of(args),
            "learning_rate": 1e-4,
            "eval_strategy": "no",
            "max_steps": args.rounds,
            **flags,
            **more,
        }
    ).to_flags()


def length_of(args: argparse.Namespace) -> int:
    """The tokens that rows are cut to."""
    return 128 if args.text else int(args.tokens)


def packed(folder: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the rounds of an engine for each of the `--cases`, one after another."""
    from vlmtune.config.settings import Settings
    from vlmtune.packed.engine import Engine

    cases = [tuple(map(int, case.split("x"))) for case in args.cases] or [(args.trials, args.batch)]
    most, largest = max(trials for trials, _ in cases), max(batch for _, batch in cases)
    results = []
    with tempfile.TemporaryDirectory() as work:
        store = prepared_rows(folder, Path(work), text=args.text, words_a_row=args.words)
        tokens = np.minimum(store.column("tokens"), length_of(args)).mean()
        notes: list[str] = []
        started = time.perf_counter()

        def note(line: str) -> None:
            notes.append(line)
            print(f"{time.perf_counter() - started:.0f} s: {line}", file=sys.stderr, flush=True)

        shared = Settings.from_flags(
            options(folder, args, num_samples=most, per_device_train_batch_size=largest)
        )
        engine = Engine(shared, store, trials=most, max_lora_rank=16, deliver=lambda *_: None, note=note)
        loaded = time.perf_counter()
        for trials, batch in cases:
            max_bytes = engine.model.features.cache.max_bytes
            for limit in (max_bytes, 0) if args.pixels else (max_bytes,):
                engine.model.features.disable()
                engine.model.features.cache.max_bytes = limit
                note(f"{trials} x {batch}, {'pixels' if limit == 0 else 'cached features'}")
                results.append(
                    {
                        "trials": trials,
                        "batch": batch,
                        "pixels": limit == 0,
                        **rounds(engine, folder, args, trials, batch, float(tokens)),
                    }
                )
                results[-1] |= {
                    "load_s": loaded - started,
                    "notes": notes,
                    "features_gb": engine.model.features.cache.bytes / 2**30,
                }
    return results


def rounds(
    engine: Any, folder: str, args: argparse.Namespace, trials: int, batch: int, tokens: float
) -> dict[str, Any]:
    """Let trials join an engine, and time `--rounds` rounds."""
    from vlmtune.config.settings import Settings

    started = time.perf_counter()
    for number in range(trials):
        values = options(folder, args, learning_rate=1e-5 * (number + 1), per_device_train_batch_size=batch)
        engine.join(engine.slot_factory.make(f"t{number}", Settings.from_flags(values), folder=""))
    _synchronize()
    times = [time.perf_counter()]
    for _ in range(args.rounds - 1):  # without the last one, which would evaluate
        engine.train_round()  # without waiting for the device, as in a search
        times.append(time.perf_counter())
    histories = [slot.progress.state.log_history for slot in engine.slots.values()]
    losses = [history[-1]["loss"] for history in histories if history]
    for number in range(trials):
        engine.leave(f"t{number}")
    seconds = np.diff(times)
    rows = trials * batch
    middle = statistics.median(seconds[WARM_UP:])
    return {
        "ms_a_row": middle / rows * 1e3,
        "low": min(seconds[WARM_UP:]) / rows * 1e3,
        "high": max(seconds[WARM_UP:]) / rows * 1e3,
        "losses": losses,
        "join_s": (times[0] - started) / trials,
        "first_rounds_s": list(seconds[:WARM_UP]),
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
        "tokens": tokens,
        "share_of_matmul": rows * tokens / middle * engine.slot_factory.flops_per_token / matmul_rate()
        if torch.cuda.is_available()
        else 0.0,
    }


def matmul_rate() -> float:
    """Operations per second of a large bf16 product on this GPU."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(20):
        _synchronize()
        started = time.perf_counter()
        a @ a
        _synchronize()
        times.append(time.perf_counter() - started)
    return float(2 * 8192**3 / statistics.median(times))


def case_of(args: argparse.Namespace) -> dict[str, Any]:
    """The same rows as a case of `train_step.py`."""
    flags = {"quantization": "nf4"} | dict(option.split("=", 1) for option in args.set)
    return {
        **CASES["llava-b8"],
        "batch": args.batch,
        "image": not args.text,
        "tokens": 128 if args.text else 640,
        "ours": flags,
    }


def plain(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    result = measure("plain", folder, case_of(args), args.rounds)
    return {
        "ms_a_row": result["ms"] / args.batch,
        "low": result["low"] / args.batch,
        "high": result["high"] / args.batch,
        "peak_gb": result["peak_gb"],
    }


def beside(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run `--trials` processes at once on one GPU. The time a row is that of all their rows together."""
    case = json.dumps(case_of(args))
    script = Path(__file__).with_name("train_step.py")
    command = [sys.executable, str(script), "--side", args.side, folder, case, "--steps", str(args.rounds)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(args.trials)
    ]
    outputs = [process.communicate() for process in processes]
    results = [
        json.loads(out.splitlines()[-1])
        for (out, _), process in zip(outputs, processes, strict=True)
        if process.returncode == 0
    ]
    if len(results) < args.trials:
        return {"error": next(err.strip().splitlines()[-1][:200] for _, err in outputs if err.strip())}
    rate = sum(args.batch / one["ms"] for one in results)
    return {"ms_a_row": 1 / rate, "peak_gb": sum(one["peak_gb"] for one in results)}


def equal(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Relative distances of adapters after `--rounds` steps.

    Packed trials are compared with trials trained alone by plain kernels, and trials trained alone by
    compiled kernels with the same.
    """
    from functools import partial

    from safetensors.torch import load_file

    from vlmtune.config.settings import Settings
    from vlmtune.data.stream import read_batches
    from vlmtune.packed.engine import Engine
    from vlmtune.packed.messages import TrialReport
    from vlmtune.training.loop import train

    def flat(path: str) -> torch.Tensor:
        return torch.cat(
            [tensor.flatten() for _, tensor in sorted(load_file(f"{path}/adapter_model.safetensors").items())]
        )

    with tempfile.TemporaryDirectory() as work:
        store = prepared_rows(folder, Path(work), text=args.text)
        values = [
            options(folder, args, learning_rate=1e-4 * (n + 1), lora_dropout=0, lora_r=4 * (n + 1))
            for n in range(args.trials)
        ]
        alone: dict[tuple[int, str], torch.Tensor] = {}
        losses: dict[tuple[int, str], float] = {}
        for number, one in enumerate(values):
            for kernels in ("plain", "compiled"):
                more = (
                    {"torch_compile": False, "cuda_graphs": False}
                    if kernels == "plain"
                    else {"torch_compile": True}
                )
                reports: list[tuple[dict[str, Any], torch.Tensor]] = []
                train(
                    Settings.from_flags(one | more),
                    store,
                    read_batches=partial(read_batches, store),
                    work_dir=f"{work}/{kernels}{number}",
                    report=lambda metrics, path: reports.append((metrics, flat(path))),  # noqa: B023
                )
                losses[number, kernels], alone[number, kernels] = reports[-1][0]["eval_loss"], reports[-1][1]
        reports_by_trial: dict[str, TrialReport] = {}
        engine = Engine(
            Settings.from_flags(values[0]),
            store,
            trials=args.trials,
            max_lora_rank=4 * args.trials,
            deliver=reports_by_trial.__setitem__,
            note=print,
        )
        for number, one in enumerate(values):
            trial = Settings.from_flags(one)
            engine.join(engine.slot_factory.make(f"t{number}", trial, folder=f"{work}/t{number}"))
        while engine.train_round():
            pass
        engine.close()
        distances: dict[str, Any] = {}
        for number in range(args.trials):
            metrics = reports_by_trial[f"t{number}"].metrics
            plain_kernels, compiled = alone[number, "plain"], alone[number, "compiled"]
            distances[f"rank {4 * (number + 1)}"] = {
                "packed_against_alone": _distance(flat(metrics["checkpoint_path"]), plain_kernels),
                "alone_against_alone": _distance(compiled, plain_kernels),
                "eval_loss": [metrics["eval_loss"], losses[number, "plain"], losses[number, "compiled"]],
            }
    return distances


def whole(
    folder: str,
    args: argparse.Namespace,
    rows: int = ROWS,
    kept: Path | None = None,
    engines: int | None = None,
) -> dict[str, Any]:
    """Run a search by its command, and measure what Tune, RPC and checkpoints add to the engine's time.

    The window begins when all trials have had their first evaluation. It ends when the complete trials have
    had their last evaluation but one: the last ones wait for checkpoints that nothing hides. Rows that a
    stopped trial trained until it heard of it count as added.

    Args:
        folder: of the model.
        args: the options of this script.
        rows: that each trial is trained on.
        kept: the folder of rows and prepared rows, for the next call with the same rows.
        engines: how many engines the search has; by default one on each GPU.
    """
    with tempfile.TemporaryDirectory() as work:
        out = f"{work}/out"
        write = partial(write_rows, text=args.text, count=rows)
        data = rows_in((kept or Path(work)) / f"search{rows}", write)
        shared = {
            name: value
            for name, value in options(folder, args).items()
            if name not in ("data_path", "max_steps", "eval_strategy")
        }
        config = {
            **shared,
            "data_path": str(data),
            "image_root": str(data.parent),
            "cache_dir": str((kept or Path(work)) / "cache"),
            "eval_fraction": 0.04,
            "test_fraction": 0.03,
            "num_train_epochs": 1,
            "trial_runner": "packed",
            "num_samples": args.trials,
            "max_concurrent_trials": args.trials,
            "early_stopping": args.early_stopping,
            "report": False,
            "output_dir": out,
            "search_space": {"learning_rate": {"loguniform": [1e-6, 1e-3]}},
        }
        (Path(work) / "config.json").write_text(json.dumps(config))
        seconds = run_job("tune.py", {"config": f"{work}/config.json"})
        trials, _ = read_trials(out)
        reports = [trial.reports for trial in trials]
        # A stopped trial may have been evaluated once more before it heard of it.
        times = [
            event_times(Path(out) / "runs" / trial.trial_id, "eval_loss")[: len(trial.reports)]
            for trial in trials
        ]
    engines = engines or max(torch.cuda.device_count(), 1)
    complete = [number for number, trial in enumerate(reports) if trial[-1]["step"] == trial[-1]["max_steps"]]
    last = len(reports[complete[0]]) - 2
    window = max(trial[0] for trial in times), max(times[number][last] for number in complete)
    clock = window[1] - window[0]
    evaluating = [np.cumsum([report["eval_seconds"] for report in trial]) for trial in reports]
    spent = [
        [report["seconds"] for report in trial] + seconds
        for trial, seconds in zip(reports, evaluating, strict=True)
    ]
    engine = sum(within(window, *curve) for curve in zip(times, spent, strict=True))
    trained = args.batch * sum(
        within(window, at, [report["step"] for report in trial])
        for at, trial in zip(times, reports, strict=True)
    )
    return {
        "total_s": seconds,
        "rows": sum(trial[-1]["step"] for trial in reports) * args.batch,
        "ended": len(complete),
        "searching_s": max(max(trial) for trial in times) - min(min(trial) for trial in times),
        "clock_s": clock,
        "engine_s": engine,
        "added": clock * engines / engine - 1,
        "gpus": engines,
        "ms_a_row": clock / trained * 1e3,
    }


def within(window: tuple[float, float], at: list[float], values: Any) -> float:
    """How much a trial's number grew in the window, interpolated between its reports and constant after them.

    Args:
        window: begin and end, in seconds.
        at: times of the reports, in seconds.
        values: the number in each report.
    """
    return float(np.diff(np.interp(window, at, values))[0])


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def table(files: list[str], figure: str | None) -> None:
    """Print the results of several calls with their ratios; `figure` draws the ratios to plain trials."""
    from vlmtune.search.report.plot import Plot, Scale

    rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "ms_a_row" not in row or row["mode"] != "packed":
            continue
        same = [
            other
            for other in rows
            if "ms_a_row" in other and (other["batch"], other["text"]) == (row["batch"], row["text"])
        ]
        ratios, beside = "", {"plain side by side": "plain", "ours side by side": "ours"}
        for name in ("plain", *beside):
            mode, side = ("beside", beside[name]) if name in beside else (name, None)
            times = [
                other["ms_a_row"] for other in same if other["mode"] == mode and side in (None, other["side"])
            ]
            ratio = min(times) / row["ms_a_row"] if times else 0.0
            ratios += f"  {ratio:.2f}x {name}" if times else ""
            if times and name == "plain":
                arithmetic = "fp8 base" if "quantization=fp8" in row["set"] else "NF4's values"
                lines.setdefault(arithmetic, []).append((row["batch"] * (128 if row["text"] else 640), ratio))
        kind = "text " if row["text"] else "pixels " if row["pixels"] else ""
        what = f"{row['trials']} x {row['batch']} {kind}{' '.join(row['set'])}"
        print(
            f"{what:32} {row['ms_a_row']:6.1f} ms a row  {row['share_of_matmul']:.0%} of the matmul rate  "
            f"{row['peak_gb']:.1f} GB{ratios}"
        )
    if figure:
        points = [point for line in lines.values() for point in line]
        tokens, ratios_of = zip(*points, strict=True)
        name = "tokens of a trial's step"
        plot = Plot(
            Scale.of(tokens), Scale.of([0, *ratios_of]), name, "times as fast as plain trials one by one"
        )
        write_figure(
            figure, plot, {label: sorted(line) for label, line in lines.items()}, plot.y_name, dots=True
        )


def main() -> None:
    check_versions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("mode", nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument(
        "--cases",
        nargs="*",
        default=[],
        metavar="TRIALSxBATCH",
        help="of packed, one after another in one engine",
    )
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument(
        "--pixels", action="store_true", help="packed: each case once more without cached features"
    )
    parser.add_argument("--side", default="ours", choices=("ours", "plain"), help="of beside")
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--words", type=int, default=900, help="of packed: in a row's question")
    parser.add_argument("--tokens", type=int, default=640, help="that rows with images are cut to")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--early_stopping", default="none", choices=("none", "asha"), help="of whole")
    parser.add_argument("--json")
    parser.add_argument("--figure", metavar="FILE.svg", help="of table")
    args = parser.parse_args()
    if args.folder == "table":
        table(args.mode, args.figure)
        return
    mode = args.mode[0]
    if mode == "packed":
        results = packed(args.folder, args)
    else:
        modes = {"plain": plain, "beside": beside, "equal": equal, "whole": whole}
        results = [modes[mode](args.folder, args)]
    for one in results:
        what = {name: getattr(args, name) for name in ("batch", "trials", "text", "set", "side")}
        row = json.dumps({"mode": mode, **what, **one})
        print(row, flush=True)
        if args.json:
            with Path(args.json).open("a") as file:
                file.write(row + "\n")


if __name__ == "__main__":
    main()
