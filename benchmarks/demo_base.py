"""How well does the demo's base do its task, and what does LoRA add?

    python -m vlmtune.demo
    python benchmarks/demo_base.py [--demo demo] [--learning_rates 4e-3 …] [--ranks 16 …] [--seeds 42 …]

Trains with the values of configs/demo.yaml and then with each rank and learning rate, in this process, by the
loop that `train.py` runs, and answers the test rows greedily. An answer is right if all of it matches. A run
takes about half a minute on one CPU core.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmtune.model_ref import ModelRef

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


def settings_of(demo: Path, folder: str, flags: dict[str, float]) -> Any:
    from vlmtune.config.parse import parse

    paths = {"data_path": demo / "mall", "model_name_or_path": demo / "llava", "output_dir": folder}
    options = [str(part) for name, value in {**paths, **flags}.items() for part in (f"--{name}", value)]
    return parse(["--config", str(CONFIG), "--num_workers", "0", "--overwrite", *options])


def exact_match(model: Any, tokenizer: Any, store: Any, rows: list[int]) -> tuple[float, dict[str, float]]:
    """The fraction of rows whose answer matches the reference exactly, of all rows and by language.

    Rows of one length are answered together.
    """
    from vlmtune.data.collate import collate
    from vlmtune.data.encoded_example import ANSWER

    groups = defaultdict(list)
    for example in store.read(rows):
        groups[len(example.prompt().input_ids)].append(example)
    right: dict[str, list[bool]] = defaultdict(list)
    for examples in groups.values():
        batch = collate(
            [example.prompt() for example in examples],
            pad_token_id=store.meta.pad_token_id,
            input_format=store.meta.input_format,
        )
        inputs = {
            name: torch.from_numpy(batch[name]) for name in ("input_ids", "attention_mask", "pixel_values")
        }
        tensors = store.meta.input_format.normalize(inputs)
        prompt = tensors["input_ids"].shape[1]
        with torch.no_grad():
            answers = model.generate(**tensors, max_new_tokens=8, do_sample=False)[:, prompt:]
        for example, answer in zip(examples, answers.tolist(), strict=True):
            reference = tokenizer.decode(example.input_ids[example.kinds == ANSWER], skip_special_tokens=True)
            right["ko" if "명" in reference else "en"].append(
                tokenizer.decode(answer, skip_special_tokens=True) == reference
            )
    by_language = {name: round(float(np.mean(matches)), 3) for name, matches in sorted(right.items())}
    return float(np.mean([match for matches in right.values() for match in matches])), by_language


def base_and_adapter(settings: Any, folder: str | None) -> Any:
    from vlmtune.model.base import load_base
    from vlmtune.model.lora import load_adapter

    base = load_base(
        ModelRef(settings.model.base_model),
        quantization=settings.model.base_quantization,
        dtype=None,
        device=torch.device("cpu"),
    )
    return load_adapter(base, folder) if folder else base


def main() -> int:
    import vlmtune
    from vlmtune.session import prepare_rows

    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[4e-3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    options = parser.parse_args()
    searched = [
        {"lora_r": rank, "lora_alpha": 2 * rank, "learning_rate": rate}
        for rate, rank in itertools.product(options.learning_rates, options.ranks)
    ]
    lines: list[tuple[str, float, dict[str, float], str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (seed, flags) in enumerate(itertools.product(options.seeds, [{}, *searched])):
            settings = settings_of(options.demo, f"{folder}/{number}", {**flags, "seed": seed})
            started, used = time.monotonic(), time.process_time()
            trained = vlmtune.train(settings).folder
            spent = f"{time.monotonic() - started:.0f} s, {time.process_time() - used:.0f} s of CPU"
            store = prepare_rows(settings)
            tokenizer = ModelRef(str(options.demo / "llava")).processor().tokenizer
            rows = [int(row) for row in store.rows_of("test")]
            if not lines:
                lines.append(
                    ("base alone", *exact_match(base_and_adapter(settings, None), tokenizer, store, rows), "")
                )
            name = f"seed {seed}, {flags or 'values of the config'}"
            lines.append(
                (name, *exact_match(base_and_adapter(settings, trained), tokenizer, store, rows), spent)
            )
            for name, share, by_language, spent in lines[-2 if number == 0 else -1 :]:
                print(f"{share:6.1%}  {by_language}  {name}  {spent}  ({len(rows)} test rows)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
