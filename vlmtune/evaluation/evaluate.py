"""Evaluate an adapter: answer held-out rows, compute metrics with intervals, and write both."""

import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune import output, storage
from vlmtune.cluster import Cluster, connect, in_ray_job
from vlmtune.config import yaml12
from vlmtune.config.settings import Settings
from vlmtune.console import SECONDS_BETWEEN_LINES, console_line
from vlmtune.data.cache import find_or_make_store
from vlmtune.data.examples import read_examples
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, DataError
from vlmtune.evaluation.actors import ADAPTER, BASE, AnswerJob, answer_rows
from vlmtune.evaluation.adapter import (
    adapter_settings,
    check_adapter_fits,
    read_adapter_files,
    uses_other_data,
)
from vlmtune.evaluation.generate import BatchBuilder
from vlmtune.evaluation.metrics import AnsweredRow, MetricEstimate, estimates, with_number_rate
from vlmtune.evaluation.options import EvaluateOptions
from vlmtune.progress import Estimate
from vlmtune.session import cache_folder, with_absolute_paths
from vlmtune.storage import filesystem

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

# Parts of the reasons in data/records.py that mean "this row has no answer".
NO_ANSWER_REASONS = (
    "the user's: end with an assistant turn",
    "row without 'output'",
    "row without 'completion'",
)


@dataclass(frozen=True)
class EvaluateResult:
    """What `vlmtune.evaluate` found.

    Attributes:
        folder: absolute path or URI of the output folder.
        split: the rows that were evaluated: "test", "eval", "train" or "all".
        rows: number of these rows.
        groups: number of different images, or of `group_by` groups, among these rows.
        metrics: each metric with its 95 % interval, by model: "adapter", "base" or both.
        difference: each metric of the adapter minus that of the base, with its 95 % interval; None unless
            both were evaluated.
        metrics_file: the metrics as JSON.
        predictions_file: the answers as Parquet, see `predictions`.
    """

    folder: str
    split: str
    rows: int
    groups: int
    metrics: dict[str, dict[str, MetricEstimate]]
    difference: dict[str, MetricEstimate] | None
    metrics_file: str
    predictions_file: str

    def predictions(self) -> "pd.DataFrame":
        """One row for each evaluated row.

        Columns: `row` in the prepared store, `source`, `question`, `reference`, `answer`, `nll` (summed
        negative log-likelihood of the reference), `tokens` (of the reference), and `base_answer` and
        `base_nll` if both models were evaluated.
        """
        files, inner = filesystem(self.predictions_file)
        return pq.read_table(inner, filesystem=files).to_pandas()


def evaluate_adapter(options: EvaluateOptions) -> EvaluateResult:
    """Evaluate an adapter, its base model, or both, on the same rows.

    Raises:
        UserError: something is wrong with the adapter, its base, the data or the machine. Nothing has been
            written then.
    """
    overrides: dict[str, Any] = {**options.overrides, "output_dir": options.output_dir}
    if options.data_path is not None:
        overrides["data_path"] = options.data_path
    settings = adapter_settings(options.adapter, overrides)
    other_data = uses_other_data(options.adapter, options.data_path)
    split = options.split or ("all" if other_data else "test")
    if other_data and split == "all":
        # Nothing is held out, so that a small file can be evaluated too.
        settings = settings.replace(eval_fraction=0, test_fraction=0, given_splits="merge")
    folder = output.resolve_folder(settings.run.output_dir, in_job=in_ray_job())
    output.check_free(folder, overwrite=settings.run.overwrite, kind=output.EVALUATION)
    settings = with_absolute_paths(settings)
    check_adapter_fits(settings, options.adapter)
    cluster = connect()
    store = _prepare_rows(settings)
    rows = np.arange(store.meta.rows) if split == "all" else store.rows_of(split)
    if not len(rows):
        raise DataError(f"--split {split}: the data has no such rows; --split all takes every row")
    for line in _announcement(options, settings, store, split, rows):
        logger.info(line)
    models = (ADAPTER, BASE) if options.compare_base else (BASE,) if options.base_only else (ADAPTER,)
    adapters = {} if options.base_only else {ADAPTER: read_adapter_files(options.adapter)}
    builder = BatchBuilder.of(store)
    job = AnswerJob(settings, adapters, models, builder, options.max_new_tokens, likelihoods=True)
    answers = answer_store_rows(job, store, rows, cluster)
    output.claim(folder, overwrite=settings.run.overwrite, kind=output.EVALUATION)
    result = _result(options, settings, folder, split, store, rows, models, answers)
    storage.write_text(f"{folder}/eval.yaml", output.dump_redacted(_options_record(options, settings, split)))
    write_predictions(result.predictions_file, store, rows, answers, models)
    storage.write_json(result.metrics_file, _metrics_record(result, options, settings, store))
    return result


def answer_store_rows(
    job: AnswerJob, store: Store, rows: Sequence[int] | np.ndarray, cluster: Cluster
) -> list[dict[str, Any]]:
    """Answer rows of a store. Returns a result for each row in order, see `actors.AnswerActor`."""
    size = job.settings.training.per_device_eval_batch_size

    def read(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        numbers = [int(row) for row in item["rows"]]
        for row, example in zip(numbers, read_examples(store, numbers), strict=True):
            yield {"row": pickle.dumps(row), "example": pickle.dumps(example)}

    items = [
        {"rows": [int(row) for row in rows[start : start + size]]} for start in range(0, len(rows), size)
    ]
    results: dict[int, dict[str, Any]] = {}
    estimate, last_logged = Estimate(), time.monotonic()
    for row, result in answer_rows(job, items, read, cluster, rows=len(rows)):
        results[row] = result
        left = estimate.text(len(results), len(rows))
        if left and time.monotonic() - last_logged >= SECONDS_BETWEEN_LINES:
            last_logged = time.monotonic()
            logger.info(f"{len(results):,} of {len(rows):,} rows answered, {left}")
    return [results[int(row)] for row in rows]


def write_predictions(
    path: str, store: Store, rows: np.ndarray, answers: Sequence[dict[str, Any]], models: Sequence[str]
) -> None:
    """Write the answers as Parquet, with the columns of `EvaluateResult.predictions`."""
    columns: dict[str, list[Any]] = {
        "row": [int(row) for row in rows],
        "source": [str(source) for source in store.column("source")[rows]],
    }
    columns |= {name: [answer[name] for answer in answers] for name in ("question", "reference")}
    for prefix, model in zip(("", "base_"), models, strict=False):
        columns |= {
            f"{prefix}{name}": [answer[model][name] for answer in answers] for name in ("answer", "nll")
        }
    columns["tokens"] = [answer[models[0]]["tokens"] for answer in answers]
    files, inner = filesystem(path)
    pq.write_table(pa.table(columns), inner, filesystem=files)


def _prepare_rows(settings: Settings) -> Store:
    """The prepared rows of the settings' data, whose answers are the references.

    Raises:
        DataError: the rows cannot be used, for example because they have no answers.
    """
    if settings.data.data_path is None:
        raise ConfigError(
            "--data_path is missing: this adapter's folder names no data; give rows with reference answers"
        )
    source = DataSource.from_settings(settings)
    store = find_or_make_store(source, cache_folder(settings), size_gb=settings.data.cache_size_gb)
    if not store.meta.rows and all(
        any(reason in row["reason"] for reason in NO_ANSWER_REASONS) for row in store.bad_rows()
    ):
        first = next(store.bad_rows())
        raise DataError(
            f"{settings.data.shown_path}: no row has a reference answer to compare with "
            f"({first['source']}: {first['reason']}); ray_jobs/predict.py answers rows without"
        )
    if (
        reason := store.unusable_reason(settings.data.on_bad_row, settings.data.max_bad_fraction)
    ) is not None:
        raise DataError(reason)
    return store


def _announcement(
    options: EvaluateOptions, settings: Settings, store: Store, split: str, rows: np.ndarray
) -> Iterator[str]:
    """Lines about what is evaluated, with a warning if the adapter may have been trained on some rows."""
    adapter = "" if options.base_only else f" + {options.adapter}"
    yield console_line("Model", f"{settings.model.base_model} ({settings.model.base_quantization}){adapter}")
    skipped = f"; {store.meta.bad_rows} bad rows skipped" if store.meta.bad_rows else ""
    yield console_line("Data", f"{settings.data.shown_path}: {len(rows)} rows ({split}){skipped}")
    metrics = f"{options.adapter}/metrics.json"
    if split in ("test", "eval") and storage.exists(metrics):
        trained_on = yaml12.load_value(storage.read_text(metrics)).get("data")
        if trained_on not in (None, store.meta.key):
            yield console_line(
                "",
                "other data, or another split of it, than the adapter was trained with: "
                "it may have seen some of these rows",
            )


def _result(
    options: EvaluateOptions,
    settings: Settings,
    folder: str,
    split: str,
    store: Store,
    rows: np.ndarray,
    models: Sequence[str],
    answers: Sequence[dict[str, Any]],
) -> EvaluateResult:
    groups = [str(group) for group in store.column("group")[rows]]
    by_model = [
        [AnsweredRow(reference=answer["reference"], **answer[model]) for answer in answers]
        for model in models
    ]
    estimated = estimates(by_model, groups, with_number_rate(options.metrics), seed=settings.training.seed)
    return EvaluateResult(
        folder=folder,
        split=split,
        rows=len(rows),
        groups=len(set(groups)),
        metrics=dict(zip(models, estimated, strict=False)),
        difference=estimated[2] if len(estimated) == 3 else None,
        metrics_file=f"{folder}/metrics.json",
        predictions_file=f"{folder}/predictions.parquet",
    )


def _options_record(options: EvaluateOptions, settings: Settings, split: str) -> dict[str, Any]:
    """The content of eval.yaml."""
    return {
        "adapter": options.adapter,
        "base_only": options.base_only,
        "compare_base": options.compare_base,
        "split": split,
        "metrics": ",".join(options.metrics),
        "max_new_tokens": options.max_new_tokens,
        "settings": settings.to_flags(),
    }


def _metrics_record(
    result: EvaluateResult, options: EvaluateOptions, settings: Settings, store: Store
) -> dict[str, Any]:
    """The content of metrics.json."""
    entries = {**result.metrics, **({"difference": result.difference} if result.difference else {})}
    return {
        **{
            name: {metric: asdict(estimate) for metric, estimate in entry.items()}
            for name, entry in entries.items()
        },
        "split": result.split,
        "rows": result.rows,
        "groups": result.groups,
        "data_path": settings.data.data_path,
        "data": store.meta.key,
        "base_model": settings.model.base_model,
        "quantization": settings.model.base_quantization,
        "adapter_path": None if options.base_only else options.adapter,
        "max_new_tokens": options.max_new_tokens,
    }
