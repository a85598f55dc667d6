"""Command lines of eval, predict and export become typed options."""

import pytest

from vlmtune.cli.adapter_options import parse_evaluate, parse_export, parse_predict
from vlmtune.errors import ConfigError
from vlmtune.evaluation.metrics import METRICS
from vlmtune.evaluation.options import EvaluateOptions, ExportOptions, PredictOptions


def test_eval_has_its_own_options_and_settings_of_training() -> None:
    line = "--adapter a --output_dir o --metrics mae,rmse --compare-base --split eval --max_new_tokens 8"
    line += " --data_path d --use_cpu --quantization none --cache_size_gb 1.5 --seed 3 --overwrite false"
    assert parse_evaluate(line.split(), "", "eval") == EvaluateOptions(
        adapter="a",
        output_dir="o",
        data_path="d",
        split="eval",
        metrics=("mae", "rmse"),
        compare_base=True,
        max_new_tokens=8,
        overrides={
            "use_cpu": True,
            "quantization": "none",
            "cache_size_gb": 1.5,
            "seed": 3,
            "overwrite": False,
        },
    )
    assert parse_evaluate(["--adapter", "a", "--output_dir", "o"], "", "eval").metrics == tuple(METRICS)


def test_predict_and_export() -> None:
    line = "--adapter a --data_path d --output_dir o --question How? --base_only --format parquet"
    assert parse_predict(line.split(), "", "predict") == PredictOptions(
        "a", "d", "o", question="How?", base_only=True, format="parquet"
    )
    line = "--adapter a --data_path d --output_dir o --max-pixels 200704"
    assert parse_predict(line.split(), "", "predict").overrides == {"max_pixels": 200704}
    line = "--adapter a --output_dir o --state-dict --merge --dtype bfloat16"
    assert parse_export(line.split(), "", "export") == ExportOptions(
        "a", "o", merge=True, state_dict=True, overrides={"dtype": "bfloat16"}
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--output_dir o", "--adapter is missing: give the folder of a trained adapter"),
        ("--adapter a", "--output_dir is missing: give a folder for the results"),
        ("--adapter a --output_dir o --lora_rank 8", "--lora_rank: this command has no such option"),
        ("--adapter a --output_dir o --base-onli", r"--base-onli: .*; did you mean base_only\?"),
        ("--adapter a --output_dir o --split tset", "--split: invalid choice: 'tset'"),
        ("--adapter a --output_dir o --use_cpu maybe", "--use_cpu: 'maybe' is not true or false"),
        ("--adapter a --output_dir o --max_new_tokens 1.5", "--max_new_tokens: '1.5' is not a whole number"),
        ("--adapter a --output_dir o --base_only --compare_base", "--compare_base: not allowed with"),
    ],
)
def test_a_wrong_command_line_is_named(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_evaluate(line.split(), "", "eval")
    assert "\n" not in str(caught.value)
