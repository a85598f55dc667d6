"""The six commands of `ray_jobs/*.py`, which the console script `vlmtune` has too.

Each command parses its arguments before any heavy library is imported, calls one function and prints the
result. Exit codes: 0 done, 1 a fault, 2 a mistake in arguments or data, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import vlmtune
from vlmtune import output
from vlmtune.cli.adapter_options import parse_evaluate, parse_export, parse_predict
from vlmtune.cli.early_checks import check_output, check_paths
from vlmtune.config.parse import parse
from vlmtune.config.settings import Settings
from vlmtune.console import StepPrinter, configure_console, console_line, say
from vlmtune.errors import USER_ERROR, plain_user_errors

if TYPE_CHECKING:
    from vlmtune.evaluation.evaluate import EvaluateResult
    from vlmtune.evaluation.export import ExportResult
    from vlmtune.evaluation.predict import PredictResult
    from vlmtune.search.salvage import Salvaged
    from vlmtune.single_run import TrainResult

LOADING = "Loading …"  # importing the libraries takes ten seconds and more
TUNE_HELP = """Search for the best LoRA adapter.

{prog} --config configs/demo.yaml [--any_flag value]
{prog} --resume OUTPUT_DIR [--num_samples MORE]
"""
TRAIN_HELP = """Train one LoRA adapter.

{prog} --config configs/llava-1.5-7b.yaml [--any_flag value]
{prog} --resume OUTPUT_DIR
"""
EVALUATE_HELP = """Evaluate an adapter: answer held-out rows, and compute metrics of the answers.

{prog} --adapter out/demo/best --output_dir out/demo/eval [--compare_base | --base_only]
{prog} --adapter DIR --data_path DATA --output_dir DIR [--split test]

Without --data_path, the test rows of the data that the adapter was trained with are answered. No training and
no search has seen them. Writes metrics.json, with intervals, and predictions.parquet.
"""
PREDICT_HELP = """Answer a question about every image of a folder, or the rows of a data file.

{prog} --adapter out/demo/best --data_path FOLDER --question "How many people are there?" --output_dir DIR
{prog} --adapter DIR --data_path rows.jsonl --output_dir DIR [--format parquet]

An interrupted run resumes when you rerun the same command. Exits with 2 if a row could not be answered.
"""
EXPORT_HELP = """Export an adapter: merged into its base, or as one file; and how vLLM serves it.

{prog} --adapter out/demo/best --merge --output_dir out/demo/merged
{prog} --adapter out/demo/best --merge --quantization nf4 --output_dir out/demo/merged-nf4
{prog} --adapter out/demo/best --state_dict --output_dir out/demo/export
"""
INSPECT_HELP = """Look at the data before training: what is in it, what is wrong with it, how long rows are.

{prog} --config configs/demo.yaml [--output_dir DIR]
{prog} --data_path data.jsonl --model_name_or_path llava-hf/llava-1.5-7b-hf

Needs the model's processor and tokenizer, no weights and no GPU. The prepared rows are kept for training.
Exits with 2 if training cannot work. --output_dir is where preflight.json and preflight.html go, by default
OUTPUT_DIR-preflight.
"""


def tune(argv: Sequence[str] | None = None, prog: str = "python ray_jobs/tune.py") -> None:
    """`tune`: search for the best adapter.

    Args:
        argv: the arguments; those of this process by default.
        prog: the program as its user calls it, for the help.
    """
    configure_console()
    with plain_user_errors():
        settings = parse(argv, description=TUNE_HELP.format(prog=prog), prog=prog, search=True, preset=False)
        if settings.run.salvage:
            from vlmtune.search.salvage import salvage

            for line in salvage_lines(salvage(settings)):
                say(line)
            return
        if settings.run.resume is None:
            check_new_run(settings)
            check_search_settings(settings)
        say(LOADING)
        result = vlmtune.search(settings)
        from vlmtune.search.summary import search_summary

        say(search_summary(result))


def salvage_lines(result: "Salvaged") -> Iterator[str]:
    """Lines on what was copied from a damaged search."""
    if result.adapter is not None and result.trial is not None:
        yield console_line("Adapter", f"{result.adapter} (the best whole one of the finished trials)")
    else:
        yield console_line("Adapter", "none: no trial has a whole checkpoint of its end")
    yield console_line("Table", f"{result.table_file}: {result.trials} trials")


def train(argv: Sequence[str] | None = None, prog: str = "python ray_jobs/train.py") -> None:
    """`train`: train one adapter. Arguments as in `tune`."""
    configure_console()
    with plain_user_errors():
        settings = parse(argv, description=TRAIN_HELP.format(prog=prog), prog=prog)
        if settings.run.resume is None:
            check_new_run(settings)
        say(LOADING)
        result = vlmtune.train(settings, progress=StepPrinter())
        for line in training_lines(result, prog):
            say(line)


def training_lines(result: "TrainResult", prog: str) -> Iterator[str]:
    """Lines on what was trained, where it is, and the command that evaluates it."""
    share = 100 * result.trainable_parameters / max(result.parameters, 1)
    numbers = f"{result.trainable_parameters:,} of {result.parameters:,} parameters ({share:.2g} %)"
    yield console_line("Trained", f"{numbers}, on the {result.device}")
    yield console_line("Adapter", result.folder)
    yield console_line("Curves", f"tensorboard --logdir {result.curves_dir}")
    command = command_like(prog, "eval")
    yield console_line(
        "Next", f"{command} --adapter {result.folder} --compare_base --output_dir {result.folder}-eval"
    )


def command_like(prog: str, name: str) -> str:
    """How to call the command `name` in the way that `prog` was called: as `vlmtune NAME` or as a script."""
    return f"vlmtune {name}" if prog.startswith("vlmtune ") else f"python ray_jobs/{name}.py"


def check_new_run(settings: Settings) -> None:
    """Raises a UserError for a mistake in the paths of a new run."""
    check_paths(settings)
    if settings.run.storage_path is None:
        check_output(settings.run.output_dir, overwrite=settings.run.overwrite)


def check_search_settings(settings: Settings) -> None:
    """Raises ConfigError for a mistake in the objective or the search space."""
    from vlmtune.search.objectives import check_objectives
    from vlmtune.search.space import Space

    check_objectives(settings)
    if settings.search.search_space is not None:
        Space.parse(settings.search.search_space, settings)


def check_adapter(folder: str) -> None:
    """Raises ModelError for a local folder without a LoRA adapter."""
    from vlmtune.model.lora import check_adapter_folder

    if "://" not in folder:
        check_adapter_folder(Path(folder))


def evaluate(argv: Sequence[str] | None = None, prog: str = "python ray_jobs/eval.py") -> None:
    """`eval`: evaluate an adapter. Arguments as in `tune`."""
    configure_console()
    with plain_user_errors():
        options = parse_evaluate(argv, EVALUATE_HELP.format(prog=prog), prog)
        check_adapter(options.adapter)
        check_output(
            options.output_dir,
            overwrite=bool(options.overrides.get("overwrite")),
            kind=output.EVALUATION,
        )
        say(LOADING)
        from vlmtune.evaluation.evaluate import evaluate_adapter

        for line in evaluation_lines(evaluate_adapter(options)):
            say(line)


def evaluation_lines(result: "EvaluateResult") -> Iterator[str]:
    """Lines with the metrics of an evaluation and the files that hold them."""
    from vlmtune.evaluation.metrics_table import DIFFERENCE, metrics_table
    from vlmtune.evaluation.verdict import few_rows_warning, verdict_text

    yield from metrics_table(
        {**result.metrics, **({DIFFERENCE: result.difference} if result.difference else {})}
    )
    metric, rows = next(iter(next(iter(result.metrics.values())))), result.rows
    if result.difference and metric in result.difference:
        text = verdict_text(metric, result.difference[metric], rows)
        yield console_line("Verdict", f"{metric.replace('_', ' ')} against the base: {text}")
    if warning := few_rows_warning(rows, "row"):
        yield console_line("Note", warning)
    yield console_line("Metrics", result.metrics_file)
    yield console_line("Answers", result.predictions_file)


def predict(argv: Sequence[str] | None = None, prog: str = "python ray_jobs/predict.py") -> None:
    """`predict`: answer images or rows. Arguments as in `tune`."""
    configure_console()
    with plain_user_errors("To resume: rerun the same command."):
        options = parse_predict(argv, PREDICT_HELP.format(prog=prog), prog)
        check_adapter(options.adapter)
        say(LOADING)
        from vlmtune.evaluation.predict import predict_rows

        result = predict_rows(options)
        if result.rows == 1 and not result.errors:
            say(console_line("Answer", str(result.predictions()["answer"].iloc[0])))
        say(prediction_line(result))
    if result.errors:
        sys.exit(USER_ERROR)


def prediction_line(result: "PredictResult") -> str:
    """The line that says where the answers are, and how many there are."""
    errors = f"; {result.errors} could not be answered, see their error" if result.errors else ""
    return console_line("Answers", f"{result.predictions_file}: {result.rows} rows{errors}")


def export(argv: Sequence[str] | None = None, prog: str = "python ray_jobs/export.py") -> None:
    """`export`: export an adapter. Arguments as in `tune`."""
    configure_console()
    with plain_user_errors():
        options = parse_export(argv, EXPORT_HELP.format(prog=prog), prog)
        check_adapter(options.adapter)
        check_output(
            options.output_dir, overwrite=bool(options.overrides.get("overwrite")), kind=output.EXPORT
        )
        say(LOADING)
        from vlmtune.evaluation.export import export_adapter

        for line in export_lines(export_adapter(options)):
            say(line)


def export_lines(result: "ExportResult") -> Iterator[str]:
    """Lines on what was exported, and how to serve it."""
    if result.merge_check is not None:
        yield console_line("Merged", result.folder)
        yield console_line("Checked", result.merge_check.text())
    if result.quantized_loss is not None:
        yield console_line("Loss", result.quantized_loss.text())
    if result.state_dict_file is not None:
        yield console_line("Adapter", result.state_dict_file)
    if result.merge_check is not None:
        if result.merged_command is None:
            yield from (
                console_line("vLLM", f"would not take the adapter as it is: {reason}")
                for reason in result.vllm_refusals
            )
        yield console_line("Serve", result.merged_command or f"transformers loads {result.folder}")
        yield console_line("Upload", f"hf upload OWNER/NAME {result.folder}")
        return
    for reason in result.vllm_refusals:
        yield console_line("vLLM", f"would not take the adapter as it is: {reason}")
    if result.vllm_command is not None:
        yield console_line("vLLM", result.vllm_command)


def inspect(argv: Sequence[str] | None = None, prog: str = "python ray_jobs/inspect_data.py") -> None:
    """`inspect`: look at the data before training. Arguments as in `tune`."""
    configure_console()
    # Here --output_dir is the folder of the report. The setting output_dir, of training, keeps its value.
    own_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own_parser.add_argument("--output_dir", "--output-dir")
    own, others = own_parser.parse_known_args(argv)
    with plain_user_errors():
        settings = parse(others, description=INSPECT_HELP.format(prog=prog), prog=prog, preset=False)
        check_paths(settings)
        say(LOADING)
        result = vlmtune.inspect(settings, output_dir=own.output_dir)
        from vlmtune.preflight.console_report import console_report

        print(console_report(result.summary, colour=sys.stdout.isatty()), flush=True)
        say(console_line("Report", f"{result.html_file} and preflight.json"))
    sys.exit(0 if result.summary.ready else 2)
