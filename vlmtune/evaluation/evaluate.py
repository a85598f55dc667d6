"""What `ray_jobs/eval.py` calls: answers to held-out rows, what they are worth, and both written down."""

import argparse
import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune import output, storage
from vlmtune.cluster import Cluster, connect, in_ray_job
from vlmtune.config import yaml12
from vlmtune.config.settings import Settings
from vlmtune.console import labelled
from vlmtune.data.cache import find_or_make_store
from vlmtune.data.examples import read_examples
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, DataError
from vlmtune.evaluation.actors import ADAPTER, BASE, Job, run
from vlmtune.evaluation.adapter import adapter_files, adapter_settings, check_fit, other_data
from vlmtune.evaluation.generate import Layout
from vlmtune.evaluation.metrics import METRICS, Estimate, Row, check_metrics, estimates
from vlmtune.evaluation.options import BASE as BASE_OPTIONS
from vlmtune.evaluation.options import DATA, NEW_TOKENS, RUN, at_least_1, read
from vlmtune.storage import filesystem

logger = logging.getLogger(__name__)

SPLITS = ("test", "eval", "train", "all")
OWN = ("eval_fraction", "test_fraction", "seed")
NO_ANSWER = (
    "the user's: end with an assistant turn",
    "row without 'output'",
    "row without 'completion'",
)  # reasons of bad rows


def evaluate(argv: Sequence[str], description: str) -> list[str]:
    """Run the command line; returns what to print.

    Raises:
        UserError: for whatever is wrong with the options, the adapter, its base, the data or the machine,
        before anything is written.
    """
    options, given = read(argv, description, (*BASE_OPTIONS, *DATA, *OWN, *RUN), _add_options)
    names = _metrics(options.metrics)
    settings = adapter_settings(options.adapter, given)
    other = other_data(options.adapter, given)
    split = options.split or ("all" if other else "test")
    if other and split == "all":
        settings = settings.replace(
            eval_fraction=0, test_fraction=0
        )  # nothing is held out, so the data may be small
    folder = output.place(settings.run.output_dir, in_job=in_ray_job())
    output.check_free(folder, overwrite=settings.run.overwrite, kind=output.EVALUATION)
    settings = output.located(settings)
    check_fit(settings, options.adapter)
    cluster = connect()
    store = _prepared(settings)
    rows = np.arange(store.meta.rows) if split == "all" else store.rows_of(split)
    if not len(rows):
        raise DataError(f"--split {split}: the data has no such rows; --split all takes every row")
    for line in _about(options, settings, store, split, rows):
        logger.info(line)
    models = (ADAPTER, BASE) if options.compare_base else (BASE,) if options.base_only else (ADAPTER,)
    job = Job(
        settings.to_flags(),
        {} if options.base_only else {ADAPTER: adapter_files(options.adapter)},
        models,
        Layout.of(store),
        options.max_new_tokens,
        likely=True,
    )
    results = answered(job, store, rows, cluster)
    output.claim(folder, overwrite=settings.run.overwrite, kind=output.EVALUATION)
    storage.write_text(
        f"{folder}/eval.yaml", yaml12.dump({**vars(options), "split": split, "settings": settings.to_flags()})
    )
    write_predictions(f"{folder}/predictions.parquet", store, rows, results, models)
    found = estimates(
        [[_row(result, model) for result in results] for model in models],
        [str(group) for group in store.column("group")[rows]],
        names,
        seed=settings.training.seed,
    )
    storage.write_json(f"{folder}/metrics.json", _facts(options, settings, store, split, rows, models, found))
    return [
        *table(models, found),
        labelled("Metrics", f"{folder}/metrics.json"),
        labelled("Answers", f"{folder}/predictions.parquet"),
    ]


def _add_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--base_only",
        "--base-only",
        action="store_true",
        help="Evaluate the base model alone, without the adapter.",
    )
    which.add_argument(
        "--compare_base",
        "--compare-base",
        action="store_true",
        help="Evaluate the base model too, on the same rows.",
    )
    rows = "Rows to evaluate. By default test, those of the adapter's data that no search saw, or all rows of other data."
    parser.add_argument("--split", choices=SPLITS, help=rows)
    parser.add_argument(
        "--metrics",
        metavar="NAMES",
        help=f"Metrics with commas between them, of {', '.join(METRICS)}. By default all.",
    )
    parser.add_argument(
        "--max_new_tokens",
        "--max-new-tokens",
        type=at_least_1,
        default=NEW_TOKENS,
        help="Longest answer in tokens.",
    )


def _metrics(text: str | None) -> list[str]:
    names = list(METRICS) if text is None else [name.strip() for name in text.split(",")]
    try:
        check_metrics(names)
    except ConfigError as error:
        raise ConfigError(f"--metrics {error}") from None
    return names


def _prepared(settings: Settings) -> Store:
    """The prepared rows of the settings' data, whose answers are the references.

    Raises:
        DataError: they cannot be used; among others, because they have no answers.
    """
    if settings.data.data_path is None:
        raise ConfigError(
            "--data_path is missing: this adapter's folder names no data; give rows with reference answers"
        )
    store = find_or_make_store(
        DataSource.from_settings(settings), output.cache_folder(settings), size_gb=settings.data.cache_size_gb
    )
    if not store.meta.rows and all(
        any(reason in row["reason"] for reason in NO_ANSWER) for row in store.bad_rows()
    ):
        first = next(store.bad_rows())
        raise DataError(
            f"{settings.data.data_path}: no row has a reference answer to compare with ({first['source']}: {first['reason']}); "
            "ray_jobs/predict.py answers rows without"
        )
    if (refusal := store.unusable_reason(settings.data.on_bad_row)) is not None:
        raise DataError(refusal)
    return store


def _about(
    options: argparse.Namespace, settings: Settings, store: Store, split: str, rows: np.ndarray
) -> Iterator[str]:
    """What is evaluated, and a warning where the rows may not be unseen."""
    adapter = "" if options.base_only else f" + {options.adapter}"
    yield labelled("Model", f"{settings.model.base_model} ({settings.model.base_quantization}){adapter}")
    skipped = f"; {store.meta.bad_rows} bad rows skipped" if store.meta.bad_rows else ""
    yield labelled("Data", f"{settings.data.data_path}: {len(rows)} rows ({split}){skipped}")
    metrics = f"{options.adapter}/metrics.json"
    if split in ("test", "eval") and storage.exists(metrics):
        known = yaml12.load_value(storage.read_text(metrics)).get("data")
        if known not in (None, store.meta.key):
            yield labelled(
                "",
                "other data, or another split of it, than the adapter was trained with: "
                "it may have seen some of these rows",
            )


def answered(
    job: Job, store: Store, rows: Sequence[int] | np.ndarray, cluster: Cluster
) -> list[dict[str, Any]]:
    """The results of these rows of a store, in their order: see `actors.Answerer`."""
    size = Settings.from_flags(job.values).training.per_device_eval_batch_size

    def load(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        numbers = [int(row) for row in item["rows"]]
        for row, example in zip(numbers, read_examples(store, numbers), strict=True):
            yield {"row": pickle.dumps(row), "example": pickle.dumps(example)}

    items = [
        {"rows": [int(row) for row in rows[start : start + size]]} for start in range(0, len(rows), size)
    ]
    found = dict(run(job, items, load, cluster, rows=len(rows)))
    return [found[int(row)] for row in rows]


def write_predictions(
    path: str, store: Store, rows: np.ndarray, results: Sequence[dict[str, Any]], models: Sequence[str]
) -> None:
    """A row each: `row` in the prepared store, source, question, reference, answer, and base_answer where
    both were run."""
    columns: dict[str, list[Any]] = {
        "row": [int(row) for row in rows],
        "source": [str(source) for source in store.column("source")[rows]],
    }
    columns |= {name: [result[name] for result in results] for name in ("question", "reference")}
    for prefix, model in zip(("", "base_"), models, strict=False):
        columns |= {
            f"{prefix}{name}": [result[model][name] for result in results] for name in ("answer", "nll")
        }
    columns["tokens"] = [result[models[0]]["tokens"] for result in results]
    fs, inner = filesystem(path)
    pq.write_table(pa.table(columns), inner, filesystem=fs)


def _row(result: dict[str, Any], model: str) -> Row:
    return Row(reference=result["reference"], **result[model])


def _facts(
    options: argparse.Namespace,
    settings: Settings,
    store: Store,
    split: str,
    rows: np.ndarray,
    models: Sequence[str],
    found: Sequence[dict[str, Estimate]],
) -> dict[str, Any]:
    """What metrics.json holds."""
    entries = dict(zip([*models, "difference"], found, strict=False))
    return {
        **{
            name: {metric: asdict(estimate) for metric, estimate in entry.items()}
            for name, entry in entries.items()
        },
        "split": split,
        "rows": len(rows),
        "groups": len(set(store.column("group")[rows])),
        "data_path": settings.data.data_path,
        "data": store.meta.key,
        "base_model": settings.model.base_model,
        "quantization": settings.model.base_quantization,
        "adapter_path": None if options.base_only else options.adapter,
        "max_new_tokens": options.max_new_tokens,
    }


def table(models: Sequence[str], found: Sequence[dict[str, Estimate]]) -> list[str]:
    """The metrics as lines of text: a column for each model and, of two, their difference; intervals at 95 %
    in brackets."""
    head = [*models, "difference"][: len(found)]
    lines = [["", *head]]
    for name in found[0]:
        lines.append(
            [
                name,
                *(
                    _shown(name, entry[name], signed=column == "difference")
                    for column, entry in zip(head, found, strict=True)
                ),
            ]
        )
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return [
        "",
        *(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ),
        "",
    ]


def _shown(name: str, estimate: Estimate, *, signed: bool) -> str:
    """A share in per cent, other numbers with four digits."""
    share = METRICS[name].share

    def text(value: float) -> str:
        sign = "+" if signed and value > 0 else ""
        return f"{sign}{100 * value:.1f}" if share else f"{sign}{value:.4g}"

    interval = (
        ""
        if estimate.low is None or estimate.high is None
        else f"  [{text(estimate.low)}, {text(estimate.high)}]"
    )
    return f"{text(estimate.value)}{' %' if share else ''}{interval}"
