import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl.trainer.sft_config import SFTConfig

from vlmtune.config.arguments import ALIASES, GROUPS, PRESET
from vlmtune.config.flags import flags
from vlmtune.config.limits import LIMITS, UNSUPPORTED
from vlmtune.config.settings import Settings, TrainingArguments, parse
from vlmtune.errors import ConfigError

ROOT = Path(__file__).parents[1]
BASE = ["--data_path", "rows.jsonl", "--model_name_or_path", "some/model"]


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def from_yaml(folder: Path, text: str) -> Settings:
    return parse(
        ["--config", write(folder, f"data_path: rows.jsonl\nmodel_name_or_path: some/model\n{text}")]
    )


def test_the_older_command_has_the_older_defaults() -> None:
    command = (
        "--data_path data.jsonl --output_dir out --per_device_train_batch_size 2 --gradient_accumulation_steps 2 "
        "--max_seq_length 512 --num_train_epochs 3"
    )
    found = parse(command.split())
    assert found.model.model_name_or_path == "meta-llama/Llama-3.2-11B-Vision-Instruct"
    assert found.model.base_quantization == "int8"
    assert (found.model.lora_r, found.model.lora_alpha, found.model.lora_dropout) == (8, 32, 0.05)
    assert found.model.lora_target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert found.training["max_length"] == 512
    assert found.training["per_device_train_batch_size"] == found.training["gradient_accumulation_steps"] == 2
    assert found.training["output_dir"] == "out"


def test_flags_override_the_older_defaults_and_a_named_model_has_none_of_them() -> None:
    assert parse(["--data_path", "d", "--lora_r", "4"]).get("lora_r") == 4
    assert parse(["--data_path", "d", "--load_in_4bit"]).model.base_quantization == "nf4"
    assert parse(BASE).model.lora_r == 16 != PRESET["lora_r"]
    assert parse(BASE).model.base_quantization == "none"


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "data_path: d\nmodel_name_or_path: m\nlora_r: 4\nmax_length: 512\n")
    for config in (["--config", path], [f"--config={path}"]):
        found = parse([*config, "--lora_r=32", "--max_seq_length", "64"])
        assert (found.model.lora_r, found.training["max_length"], found.data.data_path) == (32, 64, "d")


# What is written in YAML and as a flag, and what both mean.
VALUES: list[tuple[str, str, Any]] = [
    ("learning_rate", "1e-5", 1e-5),
    ("learning_rate", "1", 1.0),
    ("num_train_epochs", ".5", 0.5),
    ("lora_r", "8", 8),
    ("lora_rank", "8", 8),
    ("max_seq_length", "256", 256),
    ("max_length", "null", None),
    ("num_workers", "2:8", "2:8"),
    ("num_workers", "0", "0"),
    ("overwrite", "true", True),
    ("overwrite", "no", False),
    ("gradient_checkpointing", "False", False),
    ("gradient_checkpointing", "auto", None),
    ("torch_compile", "auto", None),
    ("bf16", "yes", True),
    ("bf16", "null", None),
    ("lora_target_modules", "q_proj,k_proj", ["q_proj", "k_proj"]),
    ("target_modules", "q_proj", ["q_proj"]),
    ("lora_target_modules", "all-linear", "all-linear"),
    ("lora_target_modules", r".*\.layers\.(0|1)\..*q_proj", r".*\.layers\.(0|1)\..*q_proj"),
    ("quantization", "none", "none"),
    ("dtype", "bfloat16", "bfloat16"),
    ("lr_scheduler_type", "cosine", "cosine"),
    ("lr_scheduler_kwargs", "{num_cycles: 2, rate: 1e-3}", {"num_cycles": 2, "rate": 1e-3}),
    ("model_revision", "12e4567", "12e4567"),
    ("model_revision", "0042", "0042"),
    ("group_by", "on", "on"),
    ("time_budget_s", "3600", 3600.0),
    ("save_strategy", "no", "no"),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_a_value_means_the_same_in_yaml_and_as_a_flag(
    name: str, text: str, value: Any, tmp_path: Path
) -> None:
    real = ALIASES.get(name, name)
    for found in (
        parse([*BASE, f"--{name}", text]),
        parse([*BASE, f"--{name}={text}"]),
        from_yaml(tmp_path, f"{name}: {text}\n"),
    ):
        got = found.get(real)
        assert (got, type(got)) == (value, type(value))
        assert found.get(name) == value


def test_quoted_numbers_and_lists_in_yaml(tmp_path: Path) -> None:
    found = from_yaml(
        tmp_path, 'lora_r: "8"\nlora_target_modules: [q_proj, v_proj]\ngroup_by: "null hypothesis"\n'
    )
    assert (found.model.lora_r, found.model.lora_target_modules, found.data.group_by) == (
        8,
        ["q_proj", "v_proj"],
        "null hypothesis",
    )
    assert parse([*BASE, "--target_modules", "q_proj", "v_proj"]).model.lora_target_modules == [
        "q_proj",
        "v_proj",
    ]


def test_switches_on_the_command_line() -> None:
    found = parse([*BASE, "--overwrite", "--bf16", "--no_gradient_checkpointing"])
    assert (found.data.overwrite, found.training["bf16"], found.training["gradient_checkpointing"]) == (
        True,
        True,
        False,
    )
    assert parse([*BASE, "--lora-r", "4"]).model.lora_r == 4


def test_numbers_inside_the_search_space_are_numbers(tmp_path: Path) -> None:
    found = from_yaml(
        tmp_path,
        "search_space:\n  learning_rate: {loguniform: [1e-5, 5E-4]}\n  num_workers: {choice: [2:8, no]}\n",
    )
    assert found.search.search_space == {
        "learning_rate": {"loguniform": [1e-5, 5e-4]},
        "num_workers": {"choice": ["2:8", "no"]},
    }
    found = parse([*BASE, "--search_space", '{"lora_r": {"choice": [4, 8]}}'])
    assert found.search.search_space == {"lora_r": {"choice": [4, 8]}}


# A wrong value, and what its message must say besides the option's name.
WRONG: list[tuple[str, str, tuple[str, ...]]] = [
    ("lora_r", "8.5", ("8.5", "whole number")),
    ("lora_r", "true", ("true", "whole number")),
    ("lora_r", "0", ("at least 1",)),
    ("lora_r", "eight", ("eight", "whole number")),
    ("lora_r", "null", ("whole number",)),
    ("lora_rank", "-2", ("-2", "at least 1")),
    ("learning_rate", "fast", ("fast", "a number")),
    ("learning_rate", "0", ("above 0",)),
    ("learning_rate", "nan", ("a number",)),
    ("learning_rate", ".inf", ("a number",)),
    ("learning_rate", "1e999", ("a number",)),
    ("lora_dropout", "1.0", ("below 1",)),
    ("eval_fraction", "1", ("below 1",)),
    ("max_length", "4", ("at least 8",)),
    ("max_steps", "0", ("at least 1",)),
    ("per_device_train_batch_size", "0", ("at least 1",)),
    ("eval_steps", "2.5", ("whole number of steps",)),
    ("overwrite", "maybe", ("maybe", "true or false")),
    ("quantization", "nf5", ("nf5", "none, nf4, int8", "did you mean nf4?")),
    ("mode", "Max", ("min, max", "did you mean max?")),
    ("lr_scheduler_type", "cosin", ("did you mean cosine?",)),
    ("report_to", "wandb", ("tensorboard",)),
    ("num_workers", "8:2", ("8:2", "smaller first")),
    ("num_workers", "two", ("two", "2:8")),
    ("num_workers", "0:2", ("0:2",)),
    ("num_workers", "2:8:9", ("2:8:9",)),
    ("lora_target_modules", "q_proj,,k_proj", ("empty name",)),
    ("lr_scheduler_kwargs", "cycles", ("mapping",)),
    ("search_space", "lora_r", ("mapping",)),
    ("packing", "true", ("not packed",)),
    ("assistant_only_loss", "true", ("assistant",)),
    ("save_strategy", "steps", ("every evaluation",)),
    ("use_peft", "false", ("LoRA",)),
    ("deepspeed", "ds.json", ("whole one",)),
    ("resume_from_checkpoint", "out/checkpoint-3", ("resume",)),
    ("max_len", "8", ("no such option", "did you mean max_length?")),
    ("learning_rat", "8", ("did you mean learning_rate?",)),
    ("env", "x", ("no such option",)),
]


@pytest.mark.parametrize(("name", "text", "parts"), WRONG)
def test_a_wrong_value_is_named_with_its_place(
    name: str, text: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as flagged:
        parse([*BASE, f"--{name}={text}"])
    with pytest.raises(ConfigError) as written:
        from_yaml(tmp_path, f"{name}: {text}\n")
    assert str(flagged.value).startswith(f"--{name}: ")
    assert str(written.value).startswith(f"{tmp_path / 'run.yaml'}: {name}: ")
    for message in (str(flagged.value), str(written.value)):
        assert "\n" not in message
        assert [part for part in parts if part not in message] == []


def test_a_refused_token_is_not_printed() -> None:
    with pytest.raises(ConfigError, match="hub_token") as caught:
        parse([*BASE, "--hub_token", "hf_secret"])
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lora_r: 8\nlora_r: 16\n", "line 4: lora_r is given a second time; the first is in line 3"),
        ("search_space:\n  lora_r: {choice: [4, 8]}\n  lora_r: 4\n", "line 5: lora_r is given a second time"),
        ("max_length: 8\nmax_seq_length: 9\n", "max_seq_length: is another name of max_length"),
        ("lora_r: [4, 8]\n", "[4, 8] is not a whole number"),
        ("lora_target_modules: [q_proj, 3]\n", "not a name or a list of names"),
        ("lora_r: {choice: [4]}\n", "not a whole number"),
        ("lora_r: 8\n bad indent: 3\n", "line 4"),
        ("group_by: [1, 2\n", "line 4"),
        ("search_space: !!python/object:os.system {}\n", "line 3"),
        ("? [a, b]\n: 3\n", "line 3: a key must be a name"),
        ("a: " + "[" * 3000 + "\n", "nested too deeply"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(text: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        from_yaml(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "run.yaml"))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- lora_r\n", "lora_r\n"])
def test_a_file_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must hold options by name"):
        parse(["--config", write(tmp_path, text)])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml: cannot be read: No such file"):
        parse(["--config", str(tmp_path / "nope.yaml")])
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        parse(["--config", str(tmp_path)])
    (tmp_path / "bytes.yaml").write_bytes(b"lora_r: \xff\n")
    with pytest.raises(ConfigError, match=r"bytes\.yaml: is not UTF-8 text \(byte 8\)"):
        parse(["--config", str(tmp_path / "bytes.yaml")])
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfdata_path: d\r\nmodel_name_or_path: m\r\n")
    assert parse(["--config", str(tmp_path / "bom.yaml")]).data.data_path == "d"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rows.jsonl"], "rows.jsonl: this word belongs to no option"),
        (["--lora_r"], "--lora_r: expected one argument"),
        (["--lora_r", "--overwrite"], "--lora_r: expected one argument"),
        (["--config"], "--config: expected one argument"),
        (
            ["--config", "a.yaml", "--config", "b.yaml"],
            "--config: given 2 times (a.yaml, b.yaml); one file is read",
        ),
        (
            ["--lora_rank", "4", "--lora_r", "8"],
            "--lora_rank: is another name of lora_r, which is given too; keep one",
        ),
        (["--load_in_4bit", "--load_in_8bit"], "load_in_4bit and load_in_8bit: only one of them can be true"),
        (
            ["--load_in_4bit", "--quantization", "int8"],
            "load_in_4bit: means quantization nf4, but quantization is int8; keep one",
        ),
        (
            ["--load_in_8bit", "--quantization", "none"],
            "load_in_8bit: means quantization int8, but quantization is none; keep one",
        ),
        (["--llm_int8"], "llm_int8: needs quantization int8, but quantization is none"),
        (["--bf16", "--fp16"], "bf16 and fp16: only one of them can be true"),
        (["--eval_steps", "none"], "eval_steps: has no value, but eval_strategy is steps"),
        (
            ["--eval_fraction", ".5", "--test_fraction", ".5"],
            "eval_fraction and test_fraction: together 1, which leaves nothing",
        ),
    ],
)
def test_a_wrong_command_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([*BASE, *argv])
    assert str(caught.value).startswith(message)
    assert capsys.readouterr() == ("", "")


def test_data_and_model_are_needed_except_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data_path: no data is given"):
        parse([])
    with pytest.raises(ConfigError, match=r"run\.yaml: model_name_or_path is missing"):
        parse(["--config", write(tmp_path, "data_path: d\n")])
    assert parse(["--resume", "out"]).to_dict() == {"resume": "out"}
    with pytest.raises(ConfigError, match=r"^--learning_rate: a run goes on with .* give --resume alone$"):
        parse(["--resume", "out", "--learning_rate", "1"])
    config = write(tmp_path, "data_path: d\n")
    with pytest.raises(ConfigError, match=r"^--config: a run goes on"):
        parse(["--resume", "out", "--config", config])


def test_help_prints_every_option_but_the_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--help"], description="Trains an adapter.")
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert "Trains an adapter." in text
    assert all((f"--{name} " in text) != (name in UNSUPPORTED) for name in flags())
    assert all(f"--{alias} " in text for alias in ALIASES)


def test_quantization_from_older_flags() -> None:
    assert parse([*BASE, "--load_in_8bit"]).model.base_quantization == "int8"
    assert parse([*BASE, "--load_in_4bit", "--quantization", "nf4"]).model.base_quantization == "nf4"
    assert parse([*BASE, "--load_in_8bit", "--llm_int8"]).model.llm_int8


@pytest.mark.parametrize(("text", "workers"), [("1", 1), ("0", 0), ("2:8", (2, 8)), ("3:3", (3, 3))])
def test_workers(text: str, workers: int | tuple[int, int]) -> None:
    assert parse([*BASE, "--num_workers", text]).data.workers == workers


def test_replace_types_and_checks_as_flags_do() -> None:
    found = parse(BASE)
    other = found.replace(lora_r=4, learning_rate=1, lora_target_modules=["q_proj"], num_workers=2)
    assert (other.model.lora_r, other.training["learning_rate"], other.data.num_workers) == (4, 1.0, "2")
    assert (
        other.replace(
            lora_r=16, learning_rate=2e-5, lora_target_modules="q_proj,k_proj,v_proj,o_proj", num_workers="1"
        )
        == found
    )
    assert found.model.lora_r == 16
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
    assert isinstance(found.model.lora_target_modules, list)
    found.model.lora_target_modules.append("gate_proj")
    assert (
        other.model.lora_target_modules
        == parse(BASE).model.lora_target_modules
        == ["q_proj", "k_proj", "v_proj", "o_proj"]
    )


def test_settings_survive_dicts_files_and_pickles(tmp_path: Path) -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        found = parse(["--config", str(path)])
        assert found.search.search_space
        assert Settings.from_dict(found.to_dict()) == found
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
    found = Settings.from_dict(
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
    assert [llava.get(name) for name in names] == [1.4e-5, 8, 1.0, 1, None]
    llama = parse(["--config", str(ROOT / "configs/llama-3.2-11b-vision.yaml")])
    older = parse(["--data_path", "data.jsonl"])
    for name in PRESET:
        got, wanted = llama.get(name), older.get(name)
        assert got == wanted
    batches = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_train_epochs")
    assert [llama.get(name) for name in batches] == [2, 2, 512, 3.0]
    demo = parse(["--config", str(ROOT / "configs/demo.yaml")])
    assert (demo.data.data_path, demo.model.model_name_or_path, demo.training["output_dir"]) == (
        "demo/mall",
        "demo/llava",
        "out/demo",
    )


def test_tables_name_real_options_and_names_are_unique() -> None:
    names = [option.name for group in GROUPS for option in dataclasses.fields(group) if option.init]
    assert len(names) == len(set(names)) == len(flags())
    assert set(UNSUPPORTED) | set(LIMITS) | set(ALIASES.values()) | set(PRESET) <= set(names)
    assert not set(ALIASES) & set(names)
    assert {option.name for option in dataclasses.fields(SFTConfig) if option.init} <= set(names)


def test_every_default_is_accepted_as_a_value() -> None:
    plain = Settings.from_dict({})
    assert plain.replace(**{name: plain.get(name) for name in flags()}) == plain
    assert plain.to_dict() == {}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_takes_the_training_values(tmp_path: Path) -> None:
    found = parse(
        [*BASE, "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--lr_scheduler_kwargs", "{}"]
    )
    assert set(found.training) == {
        option.name for option in dataclasses.fields(TrainingArguments) if option.init
    }
    own = {"cuda_graphs", "micro_batch_size"}
    assert own == set(found.training) - {option.name for option in dataclasses.fields(SFTConfig)}
    arguments = SFTConfig(**{name: value for name, value in found.training.items() if name not in own})
    assert (
        arguments.eval_steps,
        arguments.logging_steps,
        arguments.report_to,
        arguments.remove_unused_columns,
    ) == (0.25, 1, [], False)
