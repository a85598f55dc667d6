"""Options of evaluate, predict and export: wrong ones are named before anything is loaded."""

from typing import Any

import pytest

from vlmtune.errors import ConfigError
from vlmtune.evaluation.options import EvaluateOptions, ExportOptions, PredictOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "tset"}, "--split: 'tset' is not one of test, eval, train, all"),
        ({"metrics": ["exact_mach"]}, "--metrics exact_mach: there is no such metric; .* mean exact_match"),
        ({"base_only": True, "compare_base": True}, "--base_only and --compare_base: only one of them"),
        ({"max_new_tokens": 0}, "--max_new_tokens: '0' is not a whole number of at least 1"),
        (
            {"overrides": {"use_cqu": True}},
            r"--use_cqu: there is no such option here; did you mean use_cpu\?",
        ),
        ({"overrides": {"lora_r": 8}}, "--lora_r: there is no such option here"),
        ({"overrides": {"quantization": "nf5"}}, "--quantization: 'nf5' is not one of"),
        ({"overrides": {"test_fraction": 1}}, "--test_fraction: 1 must be at least 0 and below 1"),
    ],
)
def test_wrong_options_of_evaluate(changes: dict[str, Any], message: str) -> None:
    EvaluateOptions("adapter", "out")
    with pytest.raises(ConfigError, match=message):
        EvaluateOptions("adapter", "out", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "csv"}, "--format: 'csv' is not one of jsonl, parquet"),
        ({"max_new_tokens": 0}, "--max_new_tokens: '0'"),
        ({"overrides": {"group_by": "camera"}}, "--group_by: there is no such option here"),
    ],
)
def test_wrong_options_of_predict(changes: dict[str, Any], message: str) -> None:
    PredictOptions("adapter", "data", "out")
    with pytest.raises(ConfigError, match=message):
        PredictOptions("adapter", "data", "out", **changes)


def test_wrong_options_of_export() -> None:
    ExportOptions("adapter", "out", merge=True, overrides={"quantization": "none"})
    with pytest.raises(ConfigError, match="nothing to export: give --merge, --state_dict, or both"):
        ExportOptions("adapter", "out")
    ExportOptions("adapter", "out", merge=True, overrides={"quantization": "nf4"})
    with pytest.raises(ConfigError, match="--quantization fp8: merged weights are stored in full precision"):
        ExportOptions("adapter", "out", merge=True, overrides={"quantization": "fp8"})
    with pytest.raises(ConfigError, match="--quantization nf4: is how merged weights are stored; add"):
        ExportOptions("adapter", "out", state_dict=True, overrides={"quantization": "nf4"})
