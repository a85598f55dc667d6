import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmtune.config.parse import PRESET, parse
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError

ROOT = Path(__file__).parents[2]
BASE = ["--data_path", "rows.jsonl", "--model_name_or_path", "some/model"]


def test_quantization_from_older_flags() -> None:
    assert parse([*BASE, "--load_in_8bit"]).model.base_quantization == "int8"
    assert parse([*BASE, "--load_in_4bit", "--quantization", "nf4"]).model.base_quantization == "nf4"
    assert parse([*BASE, "--load_in_8bit", "--llm_int8"]).model.llm_int8


@pytest.mark.parametrize(("text", "workers"), [("1", 1), ("0", 0), ("2:8", (2, 8)), ("3:3", (3, 3))])
def test_workers(text: str, workers: int | tuple[int, int]) -> None:
    assert parse([*BASE, "--num_workers", text]).run.workers == workers


def test_replace_types_and_checks_as_flags_do() -> None:
    found = parse(BASE)
    other = found.replace(lora_r=4, learning_rate=1, lora_target_modules=["q_proj"], num_workers=2)
    assert (other.lora.r, other.training.learning_rate, other.run.num_workers) == (4, 1.0, "2")
    assert (
        other.replace(
            lora_r=16, learning_rate=2e-5, lora_target_modules="q_proj,k_proj,v_proj,o_proj", num_workers="1"
        )
        == found
    )
    assert found.lora.r == 16
    for name, value, message in [
        ("lora_r", 8.0, "lora_r: 8.0 is not a whole number"),
        ("lora_r", True, "lora_r: true is not a whole number"),
        ("learning_rate", float("nan"), "learning_rate: NaN is not a number"),
        ("learning_rate", 10**400, "learning_rate: 1000"),
        ("overwrite", 1, "overwrite: 1 is not true or false"),
        ("group_by", 1.5, "group_by: 1.5 is not a text"),
        ("lora_rr", 1, "lora_rr: there is no such option; did you mean lora_r?"),
        ("llm_int8", True, "llm_int8: needs quantization int8"),
    ]:
        with pytest.raises(ConfigError) as caught:
            found.replace(**{name: value})
        assert str(caught.value).startswith(message)


def test_settings_share_no_lists() -> None:
    found = parse(BASE)
    other = found.replace(lora_r=4)
    assert isinstance(found.lora.target_modules, list)
    found.lora.target_modules.append("gate_proj")
    assert (
        other.lora.target_modules
        == parse(BASE).lora.target_modules
        == ["q_proj", "k_proj", "v_proj", "o_proj"]
    )


def test_settings_survive_dicts_files_and_pickles(tmp_path: Path) -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        found = parse(["--config", str(path)])
        assert found.search.search_space
        assert Settings.from_flags(found.to_flags()) == found
        assert pickle.loads(pickle.dumps(found)) == found
        found.save(tmp_path / "saved.yaml")
        assert (
            Settings.load(tmp_path / "saved.yaml")
            == found
            == parse(["--config", str(tmp_path / "saved.yaml")])
        )
        assert Settings.load(path) == found


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(
        st.text(min_size=1),
        st.from_regex(r"[-+]?[0-9._:eE]+", fullmatch=True),
        st.sampled_from(["no", "1e5", "2:8", "0x1", "true"]),
    ),
    rate=st.floats(min_value=1e-300, max_value=1e300),
    choice=st.lists(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.text(),
        )
    ),
)
def test_saved_values_come_back_as_they_were(
    text: str, rate: float, choice: list[Any], tmp_path: Path
) -> None:
    text = text if text.strip().lower() not in ("", "none", "null", "~") else "column"
    found = Settings.from_flags(
        {"group_by": text, "learning_rate": rate, "search_space": {"lora_r": {"choice": choice}}}
    )
    found.save(tmp_path / "saved.yaml")
    assert Settings.load(tmp_path / "saved.yaml") == found


def test_shipped_configs_hold_what_they_promise() -> None:
    llava = parse(["--config", str(ROOT / "configs/llava-1.5-7b.yaml")])
    assert (llava.model.model_name_or_path, llava.model.base_quantization) == (
        "llava-hf/llava-1.5-7b-hf",
        "nf4",
    )
    names = (
        "learning_rate",
        "per_device_train_batch_size",
        "num_train_epochs",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
    )
    assert [llava.value(name) for name in names] == [1.4e-5, 8, 1.0, 1, None]
    llama = parse(["--config", str(ROOT / "configs/llama-3.2-11b-vision.yaml")])
    older = parse(["--data_path", "data.jsonl", "--output_dir", "out"])
    for name in PRESET:
        got, wanted = llama.value(name), older.value(name)
        assert got == wanted
    batches = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_train_epochs")
    assert [llama.value(name) for name in batches] == [2, 2, 512, 3.0]
    demo = parse(["--config", str(ROOT / "configs/demo.yaml")])
    assert (demo.data.data_path, demo.model.model_name_or_path, demo.run.output_dir) == (
        "demo/mall",
        "demo/llava",
        "out/demo",
    )
