"""How fast are rows prepared, and does memory grow with their number?

    python benchmarks/data.py speed   [--rows 10000] [--pairs 3]
    python benchmarks/data.py row     [--rows 256] [--pairs 8]
    python benchmarks/data.py memory  [--rows 2000 20000]
    python benchmarks/data.py inspect [--rows 4000] [--pairs 3]
    python benchmarks/data.py rows FOLDER [--rows 90] [--text 90]

`speed` compares preparing with bare decoding, resizing, tokenizing and writing on the same cores, in seconds
of the clock and in seconds of CPU of all processes. `row` compares the CPU of one row in one process, without
Ray, which can be told on a machine that others use as well. `memory` measures the peak memory of all
processes with an object store of 500 MB. `inspect` compares `inspect_data.py` with preparing, as whole
commands. `rows` only writes rows, some of them without an image.

Rows have one 640x480 JPEG, a question and an answer; the processor is LLaVA-1.5's at full size (336 pixels).
No weights are needed.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from vlmtune.model_ref import ModelRef

SECONDS_BETWEEN_SAMPLES = 0.5
OBJECT_STORE_BYTES = 500 * 10**6


def write_model(folder: Path) -> None:
    """A model folder without weights: LLaVA-1.5's processor at full size and a config."""
    from full_size import llava

    from vlmtune.demo.models import write_model as write_tiny
    from vlmtune.model_ref import ModelRef

    write_tiny("llava", folder)
    processor = ModelRef(str(folder)).processor()
    config = llava(processor)
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    (folder / "model.safetensors").unlink()


def write_rows(folder: Path, rows: int, words: int = 0, text: int = 0) -> Path:
    """Write JPEGs and a JSONL of rows with one of them each; returns the JSONL's path.

    The images are like photographs: smooth colours, edges, some noise, about 60 kB each, all different.

    Args:
        words: words to add to every question, the same ones; its answer then gets 40 more.
        text: number of further rows, of 200 words and no image.
    """
    (folder / "images").mkdir(parents=True)
    with multiprocessing.get_context("spawn").Pool() as pool:
        pool.map(partial(write_image, folder / "images"), range(rows), chunksize=64)
    path = folder / "rows.jsonl"
    with path.open("w") as lines:
        for number in range(rows):
            question = "<image>\nHow many people are there?" + " and where" * (words // 2)
            answer = f"{number % 10} people" + " here" * (40 if words else 0)
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            lines.write(json.dumps({"image": f"images/{number:06d}.jpg", "conversations": turns}) + "\n")
        for number in range(text):
            question = " ".join(f"word{number * place % 97}" for place in range(200))
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"{number % 7} of them"}]
            lines.write(json.dumps({"conversations": turns}) + "\n")
    return path


def write_image(folder: Path, number: int) -> None:
    random = np.random.RandomState(number)
    y, x = np.mgrid[0:480, 0:640]
    a, b, c = random.rand(3) * 0.05
    waves = np.stack([np.sin(x * a + y * b), np.cos(y * b), np.sin(x * c)], axis=-1)
    noise = random.randint(0, 24, (480, 640, 3), dtype=np.int16)
    pixels = np.clip(waves * 100 + 110 + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{number:06d}.jpg", quality=88)


def bare(folder: str, model: str, out: str, floats: bool, numbers: list[int]) -> None:
    """The least work that some rows need: decode, resize, tokenize, write.

    Args:
        floats: write the processor's float32 pixels instead of uint8.
    """
    from vlmtune.data.encoded_example import EncodedExample
    from vlmtune.data.store_writer import write_shard

    processor = _processor(model)
    options = {} if floats else {"do_rescale": False, "do_normalize": False}
    examples = []
    for number in numbers:
        image = Image.open(f"{folder}/images/{number:06d}.jpg").convert("RGB")
        text = f"USER: <image>\nHow many people are there? ASSISTANT: {number % 10} people</s>"
        features = processor(text=[text], images=[image], **options)
        ids = np.asarray(features["input_ids"][0], dtype=np.int32)
        pixels = np.asarray(features["pixel_values"])
        examples.append(
            EncodedExample(
                ids,
                np.zeros(len(ids), np.uint8),
                {"pixel_values": pixels if floats else pixels.astype(np.uint8)},
            )
        )
    write_shard(f"{out}/{numbers[0]:06d}.parquet", examples)


def one_thread() -> None:
    """Let this process compute with one thread, as Ray lets its tasks of one CPU."""
    import torch

    torch.set_num_threads(1)


_PROCESSORS: dict[str, Any] = {}


def _processor(model: str) -> Any:
    from vlmtune.model_ref import ModelRef

    if model not in _PROCESSORS:
        _PROCESSORS[model] = ModelRef(model).processor()
    return _PROCESSORS[model]


def timed_bare(pool: Any, folder: Path, model: Path, rows: int, *, floats: bool) -> float:
    """Seconds that the pool takes for all rows."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        parts = [list(range(start, min(start + 64, rows))) for start in range(0, rows, 64)]
        started = time.perf_counter()
        pool.map(partial(bare, str(folder), str(model), out, floats), parts, chunksize=1)
        return time.perf_counter() - started


def timed_prepare(data: Path, model: Path, cache: Path) -> float:
    """Seconds of `prepare` into `cache`."""
    from vlmtune.data.cache import prepare_store
    from vlmtune.data.source import DataSource

    started = time.perf_counter()
    prepare_store(DataSource(data_path=str(data), model=ModelRef(str(model))), str(cache))
    return time.perf_counter() - started


def speed(rows: int, pairs: int) -> None:
    """Time bare work and `prepare` in turn, so that a machine whose speed drifts slows both."""
    from vlmtune.cluster import connect

    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        write_model(top / "model")
        data = write_rows(top / "data", rows)
        connect()
        ratios: list[float] = []
        cpu_ratios: list[float] = []
        labels = ("bare uint8", "prepare", "from the cache", "bare float32")
        seconds: dict[str, list[float]] = {label: [] for label in labels}
        with multiprocessing.get_context("spawn").Pool(os.cpu_count(), one_thread) as pool:
            timed_bare(pool, data.parent, top / "model", 256, floats=False)  # imports and caches
            few = write_rows(top / "few", 256)
            timed_prepare(few, top / "model", top / "warm")
            for pair in range(pairs):
                started = cpu_seconds()
                seconds["bare uint8"].append(timed_bare(pool, data.parent, top / "model", rows, floats=False))
                between = cpu_seconds()
                seconds["prepare"].append(timed_prepare(data, top / "model", top / f"cache{pair}"))
                cpu_ratios.append((between - started) / (cpu_seconds() - between))
                seconds["from the cache"].append(timed_prepare(data, top / "model", top / f"cache{pair}"))
                ratios.append(seconds["bare uint8"][-1] / seconds["prepare"][-1])
                shutil.rmtree(top / f"cache{pair}")
            seconds["bare float32"].append(timed_bare(pool, data.parent, top / "model", rows, floats=True))
    for label, values in seconds.items():
        each = f"{statistics.median(values) / rows * 1e3:.2f} ms a row"
        print(
            f"{label:14} {statistics.median(values):7.1f} s ({min(values):.1f} to {max(values):.1f}), {each}"
        )
    for what, values in (("clock", ratios), ("CPU", cpu_ratios)):
        spread = f"{min(values):.0%} to {max(values):.0%}"
        print(f"prepare reaches {statistics.median(values):.0%} of bare ({spread}) by the {what}", end=", ")
    print(f"on {os.cpu_count()} cores")


def row(rows: int, pairs: int) -> None:
    """Time bare work and the encoding and writing of rows in turn, in this process."""
    from vlmtune.data.examples import encode_row
    from vlmtune.data.find_input_format import find_input_format
    from vlmtune.data.formats import read_fragment
    from vlmtune.data.source import DataSource
    from vlmtune.data.store_writer import write_shard
    from vlmtune.data.tokenize import RowEncoder

    one_thread()
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        write_model(top / "model")
        path = write_rows(top / "data", rows)
        processor = _processor(str(top / "model"))
        encoder = RowEncoder(processor, find_input_format(processor))
        source = DataSource(data_path=str(path), model=ModelRef(str(top / "model")))
        read = [one for fragment in source.scan().fragments for one in read_fragment(fragment)]

        def encode(numbers: list[int]) -> None:
            examples = [encode_row(encoder, read[number])[1] for number in numbers]
            write_shard(str(top / "rows.parquet"), [example for example in examples if example is not None])

        ways: dict[str, Callable[[list[int]], None]] = {
            "bare": partial(bare, str(path.parent), str(top / "model"), str(top), False),
            "encode and write": encode,
        }
        parts = [list(range(start, min(start + 64, rows))) for start in range(0, rows, 64)]
        times: dict[str, list[float]] = {label: [] for label in ways}
        for pair in range(pairs + 1):
            for label, work in ways.items():
                started = time.process_time()
                for part in parts:
                    work(part)
                if pair:  # the first one imports
                    times[label].append((time.process_time() - started) / rows * 1e3)
    for label, values in times.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{label:17} {statistics.median(values):.2f} ms of CPU a row ({spread})")
    ratios = [one / other for one, other in zip(*times.values(), strict=True)]
    print(
        f"encoding reaches {statistics.median(ratios):.0%} of bare ({min(ratios):.0%} to {max(ratios):.0%})"
    )


def cpu_seconds() -> float:
    """CPU seconds of this process and of all that it started and that still run."""
    total = 0.0
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def peak_memory(command: list[str]) -> tuple[float, float]:
    """Run a command; returns its peak memory and its seconds.

    The memory is the summed proportional memory (PSS) of its processes, in 2**30 bytes.
    """
    started, peak, done = time.perf_counter(), 0.0, threading.Event()
    process = subprocess.Popen(command)

    def watch() -> None:
        nonlocal peak
        while not done.wait(SECONDS_BETWEEN_SAMPLES):
            total = 0
            for member in [
                psutil.Process(process.pid),
                *psutil.Process(process.pid).children(recursive=True),
            ]:
                try:
                    total += member.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            peak = max(peak, total / 2**30)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait():
        sys.exit("the measured command failed")
    done.set()
    watcher.join()
    return peak, time.perf_counter() - started


def memory(sizes: list[int]) -> None:
    """Prepare data sets of several sizes and stream one epoch of each, in a fresh process for each."""
    peaks = []
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        write_model(top / "model")
        for rows in sizes:
            data = write_rows(top / f"data{rows}", rows)
            peak, seconds = peak_memory(
                [sys.executable, __file__, "pass", str(data), str(top / "model"), str(top / f"cache{rows}")]
            )
            peaks.append(peak)
            print(f"{rows:6} rows: peak {peak:.2f} GB in all processes, {seconds:.0f} s", flush=True)
            shutil.rmtree(data.parent)
    print(f"{sizes[-1]} rows take {peaks[-1] / peaks[0]:.2f} times the memory of {sizes[0]}")


def inspect(rows: int, pairs: int) -> None:
    """Time `inspect_data.py` and `prepare` in turn, each as a command with an empty cache."""
    root = Path(__file__).parents[1]
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        write_model(top / "model")
        data = write_rows(top / "data", rows)
        prepare = [sys.executable, __file__, "prepare", str(data), str(top / "model")]
        look = [sys.executable, str(root / "ray_jobs" / "inspect_data.py"), "--data_path", str(data)]
        look += ["--model_name_or_path", str(top / "model"), "--output_dir", str(top / "report")]
        for pair in range(pairs):
            seconds = []
            for label, command in (
                ("prepare", [*prepare, str(top / f"a{pair}")]),
                ("inspect", [*look, "--cache_dir", str(top / f"b{pair}")]),
            ):
                started = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - started)
                print(f"{label} {seconds[-1]:.1f} s", flush=True)
            ratios.append(seconds[1] / seconds[0])
            shutil.rmtree(top / f"a{pair}")
            shutil.rmtree(top / f"b{pair}")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"inspect_data.py takes {statistics.median(ratios):.2f} of preparing ({spread}) for {rows} rows")


def only_prepare(data: str, model: str, cache: str) -> None:
    from vlmtune.cluster import connect

    connect()
    timed_prepare(Path(data), Path(model), Path(cache))


def one_pass(data: str, model: str, cache: str) -> None:
    """Prepare, then stream all training batches once, with a small object store."""
    from vlmtune import cluster
    from vlmtune.data.cache import prepare_store
    from vlmtune.data.order import Order
    from vlmtune.data.source import DataSource
    from vlmtune.data.stream import stream_batches

    cluster.OBJECT_STORE_BYTES = OBJECT_STORE_BYTES
    cluster.connect()
    store = prepare_store(DataSource(data_path=data, model=ModelRef(model)), cache)
    order = Order(rows=len(store.rows_of("train")), per_device=8, accumulation=1, world_size=1, seed=0)
    seen = sum(len(batch["input_ids"]) for batch in stream_batches(store, "train", order.epoch(0, 0), 1024))
    print(f"streamed {seen} rows", flush=True)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    if sys.argv[1:2] == ["pass"]:
        one_pass(*sys.argv[2:])
        return
    if sys.argv[1:2] == ["prepare"]:
        only_prepare(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for name, rows, pairs in (("speed", 10_000, 3), ("row", 256, 8), ("inspect", 4_000, 3)):
        timed = commands.add_parser(name)
        timed.add_argument("--rows", type=int, default=rows)
        timed.add_argument("--pairs", type=int, default=pairs)
    commands.add_parser("memory").add_argument("--rows", type=int, nargs="+", default=[2_000, 20_000])
    mixed = commands.add_parser("rows")
    mixed.add_argument("folder", type=Path)
    mixed.add_argument("--rows", type=int, default=90)
    mixed.add_argument("--text", type=int, default=90)
    args = parser.parse_args()
    if args.what == "rows":
        print(write_rows(args.folder, args.rows, words=40, text=args.text))
    elif args.what == "memory":
        memory(args.rows)
    else:
        {"speed": speed, "row": row, "inspect": inspect}[args.what](args.rows, args.pairs)


if __name__ == "__main__":
    main()
