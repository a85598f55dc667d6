import dataclasses
from pathlib import Path
from typing import Any

import pytest
from trl.trainer.model_config import ModelConfig
from trl.trainer.sft_config import SFTConfig

from vlmtune.config import generate_flags, trl_flags
from vlmtune.config.flag_table import flags
from vlmtune.config.parse import parse

ROOT = Path(__file__).parents[2]
BASE = ["--data_path", "rows.jsonl", "--model_name_or_path", "some/model"]


def fields_of(group: type) -> dict[str, tuple[Any, Any, Any]]:
    """The type, default and metadata of each field, by name."""
    return {
        option.name: (
            option.type,
            option.default_factory() if callable(option.default_factory) else option.default,
            {name: list(value) if name == "choices" else value for name, value in option.metadata.items()},
        )
        for option in dataclasses.fields(group)
    }


def test_the_table_is_that_of_the_installed_trl_and_transformers() -> None:
    """Where this fails after an update of TRL or transformers: `make flags`, and read what has changed."""
    written: dict[str, Any] = {"__name__": "trl_flags"}
    exec(generate_flags.text(), written)
    assert fields_of(trl_flags.TrlTraining) == fields_of(written["TrlTraining"])
    assert fields_of(trl_flags.TrlUnsupported) == fields_of(written["TrlUnsupported"])


def test_every_option_of_trl_is_a_flag() -> None:
    for group in (SFTConfig, ModelConfig):
        assert {option.name for option in dataclasses.fields(group) if option.init} <= set(flags())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_takes_the_training_values(tmp_path: Path) -> None:
    found = parse(
        [*BASE, "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--lr_scheduler_kwargs", "{}"]
    )
    names = {option.name for option in dataclasses.fields(found.training)}
    own = {"cuda_graphs", "micro_batch_size", "self_check"}
    own |= {"early_stopping_patience", "early_stopping_threshold"}
    assert own == names - {option.name for option in dataclasses.fields(SFTConfig)}
    training = {name: value for name, value in vars(found.training).items() if name not in own}
    arguments = SFTConfig(**training, output_dir=found.run.output_dir, use_cpu=found.run.use_cpu)
    assert (arguments.eval_steps, arguments.logging_steps, arguments.report_to) == (0.25, 1, [])
