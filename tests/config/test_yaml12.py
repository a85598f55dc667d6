"""YAML 1.2's plain values, keys that are given once, and a dump that is read back."""

import math
import time
from itertools import pairwise
from typing import Any

import pytest

from vlmtune.config.yaml12 import YamlError, dump, load_options, load_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("2:8", "2:8"),  # YAML 1.1: 128
        ("no", "no"),  # YAML 1.1: false
        ("010", 10),  # YAML 1.1: 8
        ("2026-11-27", "2026-11-27"),  # YAML 1.1: a date
        ("true", True),
        ("~", None),
        ("-.inf", -math.inf),
        ('{"a": [1, 2.5]}', {"a": [1, 2.5]}),
    ],
)
def test_plain_values(text: str, value: Any) -> None:
    assert load_value(text) == value


def test_options_stay_as_written_and_lists_are_read() -> None:
    text = "lora_r: 8.5\nbf16: true\nresume:\nlora_target_modules: [q_proj, k_proj]\n"
    assert load_options(text) == {
        "lora_r": "8.5",
        "bf16": "true",
        "resume": None,
        "lora_target_modules": ["q_proj", "k_proj"],
    }
    assert load_options("- lora_r") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_r: 8\nseed: 1\nlora_r: 16", "line 3: lora_r is given a second time; the first is in line 1"),
        ("a:\n  b: 1\n  b: 2", "line 3: b is given a second time; the first is in line 2"),
        ("? [a]\n: 1", "line 1: a key must be a name"),
        ("a: [1", "line 1: "),
        ("[" * 5000, "is nested too deeply"),
    ],
)
def test_a_wrong_text_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(YamlError) as caught:
        load_options(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["2:8", "no", "1e-5", "사람", "a\u2028b", " x ", "", "a: b", "#c"])
def test_a_dumped_text_is_read_back(value: str) -> None:
    assert load_value(dump({"name": value})) == {"name": value}
    assert load_options(dump({"name": value})) == {"name": value}


BOMBS = {
    "an alias": "a: &a [1]\nb: *a\n",
    "aliases that double": "a: &a [x, x]\n"
    + "".join(f"{c}: &{c} [*{b}, *{b}]\n" for b, c in pairwise("abcdefgh")),
    "an alias of itself": "a: &a [*a]\n",
    "merges that double": "a0: &a0 {k: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 30)}], k{n}: 1}}\n" for n in range(1, 12)),
    "many values": "a: [" + "1, " * 20_000 + "1]",
    "a whole number of a million digits": "a: [" + "1" * 100_000 + "]",
    "a tag on a text": "a: [!!int abc]",
    "a float tag on a text": "a: [!!float abc]",
    "a binary that is none": "a: [!!binary '\u00e9']",
    "a python object": "a: !!python/object/apply:os.system [id]",
    "a long text": "a: " + "b" * 1_000_000,
    "nested": "a: " + "[" * 2_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_text_that_stands_for_a_large_one_is_refused_at_once(name: str) -> None:
    start = time.monotonic()
    for read in (load_value, load_options):
        with pytest.raises(YamlError) as refusal:
            read(BOMBS[name])
        assert len(str(refusal.value)) < 200 and "\n" not in str(refusal.value)
    assert time.monotonic() - start < 10


def test_merges_are_read() -> None:
    text = "a: &a {x: 1}\nb: &b {y: 2}\nc: {<<: *a, z: 3}\nd: {<<: [*a, *b]}\n"
    assert load_value(text)["c"] == {"x": 1, "z": 3}
    assert load_value(text)["d"] == {"x": 1, "y": 2}
