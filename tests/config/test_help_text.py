"""Descriptions and defaults of the help."""

import pytest

from vlmtune.config.flag_table import flags
from vlmtune.config.help_text import COMMON, SEARCH_OPTIONS_OF_TRAIN, TITLES, default_text, first_sentence


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Rank of the adapter.", "Rank of the adapter."),
        ("One thing. And another.", "One thing."),
        ("Stored so. load_in_4bit means nf4.", "Stored so."),
        ("About 0.25 of it, e.g. half; more", "About 0.25 of it, e.g. half."),
        ("", ""),
    ],
)
def test_a_description_ends_at_its_first_sentence(text: str, first: str) -> None:
    assert first_sentence(text) == first


@pytest.mark.parametrize(
    ("name", "automatic", "text"),
    [
        ("lora_r", "", "16"),
        ("learning_rate", "", "2e-05"),
        ("overwrite", "", "off"),
        ("gradient_checkpointing", "only where memory is short", "auto: only where memory is short"),
        ("resume", "", ""),
    ],
)
def test_defaults_are_real(name: str, automatic: str, text: str) -> None:
    assert default_text(flags()[name], automatic) == text


def test_the_common_options_exist() -> None:
    planned = {"question", "confirm"}  # of other commands, where they are
    assert COMMON - planned <= flags().keys() and SEARCH_OPTIONS_OF_TRAIN <= COMMON
    assert set(TITLES) == {option.group for option in flags().values()} - {"unsupported"}
