"""The public API: one function for each command, with typed arguments and results.

The functions log their progress to the logger `vlmtune` (see `vlmtune.console.show_log`) and raise
exceptions. They neither print nor exit. Heavy libraries are imported when a function is called, not with this
module.

The exceptions are in `vlmtune.errors`. A `UserError` is a mistake in the arguments or the data; its message
is one line that names the file, row, field or flag at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Unpack

from vlmtune.config.settings import Settings

if TYPE_CHECKING:
    from vlmtune.evaluation.evaluate import EvaluateResult
    from vlmtune.evaluation.export import ExportResult
    from vlmtune.evaluation.options import (
        EvaluateOverrides,
        ModelOverrides,
        PredictionFormat,
        PredictOverrides,
        Split,
    )
    from vlmtune.evaluation.predict import PredictResult
    from vlmtune.preflight.inspection import InspectResult
    from vlmtune.search.search_result import SearchResult
    from vlmtune.single_run import TrainResult

FilePath = str | PathLike[str]


def search(settings: Settings) -> SearchResult:
    """Search for the best LoRA adapter, as `ray_jobs/tune.py` does.

    The output folder `settings.run.output_dir` then holds `best/` (the adapter), `trials.parquet`,
    `report.html`, `search.yaml`, `runs/` (TensorBoard) and `tune/` (Ray Tune's state).

    Args:
        settings: `settings.search.search_space` says what to search. With `settings.run.resume`, the
            interrupted search in that folder is resumed with the settings that it was started with.

    Returns:
        The best adapter (`result.best.load()` returns a PEFT model and its processor), the table of trials as
        a pandas frame, the comparison on test rows, and paths.

    Raises:
        UserError: something is wrong with the settings, the data, the model or the machine. Nothing has been
            written then.
        SearchFailedError: no trial completed. The search can be resumed.
        RunInterrupted: Ctrl-C, a KeyboardInterrupt. The search can be resumed.
    """
    from vlmtune.search.run_search import run_search

    return run_search(settings)


def train(settings: Settings, *, progress: Callable[[dict[str, Any]], None] | None = None) -> TrainResult:
    """Train one LoRA adapter, as `ray_jobs/train.py` does.

    The output folder `settings.run.output_dir` is then laid out as transformers and PEFT do: the adapter, its
    processor, `config.yaml`, `metrics.json`, a model card, `runs/` (TensorBoard) and `checkpoints/`.

    Args:
        settings: with `settings.run.resume`, the interrupted run in that folder is resumed with the settings
            that it was started with.
        progress: called with the numbers of each logged step (`step`, `max_steps`, `loss`, `learning_rate`,
            `tokens_per_second`), of each evaluation (`step`, `max_steps`, `eval_loss`), and with
            {"note": text}.

    Returns:
        The adapter (`result.adapter.load()` returns a PEFT model and its processor), its metrics, and paths.

    Raises:
        UserError: something is wrong with the settings, the data, the model or the machine. Nothing has been
            written then.
        DivergedError: the loss or gradient became NaN or infinite.
        RunInterrupted: Ctrl-C, a KeyboardInterrupt. The run can be resumed.
    """
    from vlmtune.single_run import train_adapter

    return train_adapter(settings, progress or (lambda _: None))


def evaluate(
    adapter: FilePath,
    output_dir: FilePath,
    *,
    data_path: FilePath | None = None,
    split: Split | None = None,
    metrics: Sequence[str] | None = None,
    base_only: bool = False,
    compare_base: bool = False,
    max_new_tokens: int = 64,
    **overrides: Unpack[EvaluateOverrides],
) -> EvaluateResult:
    """Evaluate an adapter on rows with reference answers, as `ray_jobs/eval.py` does.

    Args:
        adapter: folder of a trained adapter, written by `train`, `search` or plain PEFT.
        output_dir: folder for `metrics.json` and `predictions.parquet`.
        data_path: the data to evaluate on; by default the data that the adapter was trained with.
        split: which of its rows to evaluate. The default is "test", or "all" if `data_path` is given.
        metrics: names of `vlmtune.evaluation.metrics.METRICS`; by default all.
        base_only: evaluate the base model alone, without the adapter.
        compare_base: evaluate the base model too, on the same rows.
        max_new_tokens: the longest answer in tokens.
        overrides: settings by flag name that replace those of the adapter's training, such as
            `use_cpu=True` or `overwrite=True`.

    Returns:
        Each metric of each model with its 95 % interval, and the answers (`result.predictions()`).

    Raises:
        UserError: something is wrong with the adapter, its base, the data or the machine. Nothing has been
            written then.
    """
    from vlmtune.evaluation.evaluate import evaluate_adapter
    from vlmtune.evaluation.metrics import METRICS
    from vlmtune.evaluation.options import EvaluateOptions

    options = EvaluateOptions(
        adapter=fspath(adapter),
        output_dir=fspath(output_dir),
        data_path=None if data_path is None else fspath(data_path),
        split=split,
        metrics=tuple(METRICS) if metrics is None else tuple(metrics),
        base_only=base_only,
        compare_base=compare_base,
        max_new_tokens=max_new_tokens,
        overrides=overrides,
    )
    return evaluate_adapter(options)


def predict(
    adapter: FilePath,
    data_path: FilePath,
    output_dir: FilePath,
    *,
    question: str | None = None,
    base_only: bool = False,
    format: PredictionFormat = "jsonl",
    max_new_tokens: int = 64,
    **overrides: Unpack[PredictOverrides],
) -> PredictResult:
    """Answer a question about every image of a folder, or the rows of a data file.

    `ray_jobs/predict.py` does the same.

    An interrupted call is resumed by calling it again with the same arguments.

    Args:
        adapter: folder of a trained adapter, written by `train`, `search` or plain PEFT.
        data_path: images, or rows in any data format, with or without answers.
        output_dir: folder for `predictions.jsonl` or `predictions.parquet`.
        question: the question about every image; None if the rows have questions of their own.
        base_only: let the base model answer, without the adapter.
        format: format of the file with the answers.
        max_new_tokens: the longest answer in tokens.
        overrides: settings by flag name that replace those of the adapter's training.

    Returns:
        The number of rows and of errors, and the answers (`result.predictions()`).

    Raises:
        UserError: something is wrong with the adapter, its base, the data or the machine. A row that cannot
            be answered does not raise: its `error` holds the reason.
    """
    from vlmtune.evaluation.options import PredictOptions
    from vlmtune.evaluation.predict import predict_rows

    options = PredictOptions(
        adapter=fspath(adapter),
        data_path=fspath(data_path),
        output_dir=fspath(output_dir),
        question=question,
        base_only=base_only,
        format=format,
        max_new_tokens=max_new_tokens,
        overrides=overrides,
    )
    return predict_rows(options)


def export(
    adapter: FilePath,
    output_dir: FilePath,
    *,
    merge: bool = False,
    state_dict: bool = False,
    **overrides: Unpack[ModelOverrides],
) -> ExportResult:
    """Export an adapter for other programs, as `ray_jobs/export.py` does: `merge`, `state_dict`, or both.

    Args:
        adapter: folder of a trained adapter, written by `train`, `search` or plain PEFT.
        output_dir: local folder for the export.
        merge: write the base with the adapter merged into it, in full precision, and check its logits.
        state_dict: write the adapter's tensors for `torch.load`.
        overrides: settings by flag name that replace those of the adapter's training.

    Returns:
        What was written, the check of the merged model, and the command with which vLLM serves the adapter.

    Raises:
        UserError: something is wrong with the arguments, the adapter or its base. Nothing has been written
            then.
        RuntimeError: the merged model's logits differ from those of base and adapter. It is deleted.
    """
    from vlmtune.evaluation.export import export_adapter
    from vlmtune.evaluation.options import ExportOptions

    options = ExportOptions(
        adapter=fspath(adapter),
        output_dir=fspath(output_dir),
        merge=merge,
        state_dict=state_dict,
        overrides=overrides,
    )
    return export_adapter(options)


def inspect(settings: Settings, *, output_dir: FilePath | None = None) -> InspectResult:
    """Make the data report (preflight) before training, as `ray_jobs/inspect_data.py` does.

    It needs no weights and no GPU. Training then uses the rows that were prepared here.

    Args:
        settings: the settings of the planned training or search.
        output_dir: folder for the report (`preflight.json` and `preflight.html`); by default the settings'
            output folder with `-preflight` added to its name.

    Returns:
        The report: counts and lengths, problems (`result.summary.problems`), and whether training can start
        (`result.summary.ready`).

    Raises:
        UserError: the data as a whole or the processor cannot be read. Bad rows do not raise.
    """
    from vlmtune.preflight.inspection import inspect_data

    return inspect_data(settings, None if output_dir is None else fspath(output_dir))
