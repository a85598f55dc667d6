"""One option: how its values are read. `test_parse.py` tests the same through the command line and YAML."""

from typing import Any

import pytest

from vlmtune.config.flag_table import find_flag
from vlmtune.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("learning_rate", "1e-5", 1e-5),
        ("learning_rate", 1, 1.0),
        ("lora_r", "8", 8),
        ("bf16", "No", False),
        ("max_length", "none", None),
        ("lora_target_modules", "q_proj,k_proj", ["q_proj", "k_proj"]),
        ("quantization", "nf4", "nf4"),
        ("num_workers", "2:8", "2:8"),
    ],
)
def test_a_value_becomes_the_options_type(name: str, given: Any, value: Any) -> None:
    read = find_flag(name).read(given, name)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("lora_r", "8.5", r"^--lora_r: '8\.5' "),
        ("lora_r", "0", r"^--lora_r: '0' must be "),
        ("quantization", "nf5", r"^--quantization: 'nf5' is not one of .*; did you mean nf4\?$"),
        ("num_workers", "8:2", r"^--num_workers: '8:2' is neither "),
    ],
)
def test_a_wrong_value_is_named_with_its_option(name: str, given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_flag(name).read(given, f"--{name}")
