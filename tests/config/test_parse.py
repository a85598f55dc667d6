import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmtune.config.flag_table import ALIASES, flags
from vlmtune.config.limits import UNSUPPORTED
from vlmtune.config.parse import PRESET, parse
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError

ROOT = Path(__file__).parents[2]
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
        "--data_path data.jsonl --output_dir out --per_device_train_batch_size 2 "
        "--gradient_accumulation_steps 2 "
        "--max_seq_length 512 --num_train_epochs 3"
    )
    found = parse(command.split())
    assert found.model.model_name_or_path == "meta-llama/Llama-3.2-11B-Vision-Instruct"
    assert found.model.base_quantization == "int8"
    assert (found.lora.r, found.lora.alpha, found.lora.dropout) == (8, 32, 0.05)
    assert found.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert found.training.max_length == 512
    assert found.training.per_device_train_batch_size == found.training.gradient_accumulation_steps == 2
    assert found.run.output_dir == "out"


def test_flags_override_the_older_defaults_and_a_named_model_has_none_of_them() -> None:
    older = ["--data_path", "d", "--output_dir", "o"]
    assert parse([*older, "--lora_r", "4"]).lora.r == 4
    assert parse([*older, "--load_in_4bit"]).model.base_quantization == "nf4"
    assert parse(BASE).lora.r == 16 != PRESET["lora_r"]
    assert parse(BASE).model.base_quantization == "none"


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "data_path: d\nmodel_name_or_path: m\nlora_r: 4\nmax_length: 512\n")
    for config in (["--config", path], [f"--config={path}"]):
        found = parse([*config, "--lora_r=32", "--max_seq_length", "64"])
        assert (found.lora.r, found.training.max_length, found.data.data_path) == (32, 64, "d")


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
        got = found.value(real)
        assert (got, type(got)) == (value, type(value))
        assert found.value(name) == value


def test_quoted_numbers_and_lists_in_yaml(tmp_path: Path) -> None:
    found = from_yaml(
        tmp_path, 'lora_r: "8"\nlora_target_modules: [q_proj, v_proj]\ngroup_by: "null hypothesis"\n'
    )
    assert (found.lora.r, found.lora.target_modules, found.data.group_by) == (
        8,
        ["q_proj", "v_proj"],
        "null hypothesis",
    )
    assert parse([*BASE, "--target_modules", "q_proj", "v_proj"]).lora.target_modules == [
        "q_proj",
        "v_proj",
    ]


def test_switches_on_the_command_line() -> None:
    found = parse([*BASE, "--overwrite", "--bf16", "--no_gradient_checkpointing"])
    assert (found.run.overwrite, found.training.bf16, found.training.gradient_checkpointing) == (
        True,
        True,
        False,
    )
    assert parse([*BASE, "--lora-r", "4"]).lora.r == 4


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
    ("report_to", "wandbb", ("none, tensorboard, wandb, mlflow, trackio", "did you mean wandb?")),
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
    ("max_len", "8", ("this option is called --max_length",)),
    ("max_lenght", "8", ("no such option", "did you mean max_length?")),
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
        (["rows.jsonl"], "rows.jsonl: unexpected argument; an option is written --name value"),
        (["--lora_r"], "--lora_r: expected one argument"),
        (["--lora_r", "--overwrite"], "--lora_r: expected one argument"),
        (["--config"], "--config: expected one argument"),
        (
            ["--config", "a.yaml", "--config", "b.yaml"],
            "--config: given 2 times (a.yaml, b.yaml); one file is read",
        ),
        (
            ["--lora_rank", "4", "--lora_r", "8"],
            "--lora_r: is another name of lora_rank, which is given too; keep one",
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
    with pytest.raises(ConfigError, match=r"^--model_name_or_path: no model is given; name the model"):
        parse(["--data_path", "d"])
    with pytest.raises(ConfigError, match=r"^--model_name_or_path: no model is given"):
        parse(["--data_path", "d", "--output_dir", "o"], preset=False)
    with pytest.raises(ConfigError, match=r"run\.yaml: model_name_or_path is missing"):
        parse(["--config", write(tmp_path, "data_path: d\n")])
    assert parse(["--resume", "out"]).to_flags() == {"resume": "out"}
    config = str(tmp_path / "c.yaml")
    Path(config).write_text("lora_r: 4\n")
    requested = parse(["--resume", "out", "--num_samples", "16", "--config", config])
    assert requested.given_with_resume == ("lora_r", "num_samples"), (
        "the session compares them with the run's own"
    )
    with pytest.raises(ConfigError, match=r"^--overwrite: would delete what --resume continues"):
        parse(["--resume", "out", "--overwrite"])


def shown_help(capsys: pytest.CaptureFixture[str], flag: str, *, search: bool) -> str:
    with pytest.raises(SystemExit) as left:
        parse([flag], description="Trains an adapter.", search=search)
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help_all_prints_every_option_but_the_refused_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown_help(capsys, "--help_all", search=True)
    assert "Trains an adapter." in text
    names = re.findall(r"^  --(\w+) ", text, flags=re.MULTILINE)
    assert sorted(names) == sorted([*(name for name in flags() if name not in UNSUPPORTED), "config"])


def test_help_is_short_and_shows_a_search_where_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    search, train = (shown_help(capsys, "--help", search=one) for one in (True, False))
    assert "--num_samples INT" in search and "--num_samples" not in train
    assert "--trial_runner" in train and "--adam_beta1" not in search
    assert len(search.splitlines()) < 120 and max(map(len, search.splitlines())) <= 100
    assert re.search(r"--lora_r INT +Rank of the adapter\. \(16\)", train)
    assert "(auto: bfloat16 where the device" in train


def test_arguments_are_checked_without_the_libraries() -> None:
    """A mistyped flag must not cost the seconds that importing transformers and TRL takes."""
    code = (
        "import sys; from vlmtune.config.parse import parse; "
        "print(*({'torch', 'transformers', 'trl', 'ray', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_columns_are_pairs(tmp_path: Path) -> None:
    expected = {"image": "photo of it", "answer": "count"}
    on_the_line = parse([*BASE, "--columns", "image=photo of it", "answer=count"])
    in_a_file = from_yaml(tmp_path, "columns: {image: photo of it, answer: count}\n")
    assert on_the_line.data.columns == in_a_file.data.columns == expected
    assert Settings.from_flags(on_the_line.to_flags()) == on_the_line
    for words, reason in (
        (["image"], '\\["image"\\] is not names with their values, as in image=photo'),
        (["image="], "is not names with their values"),
        (["image=a", "image=b"], "image is given twice"),
    ):
        with pytest.raises(ConfigError, match=f"--columns: .*{reason}|--columns: {reason}"):
            parse([*BASE, "--columns", *words])


def test_several_sources_and_their_weights(tmp_path: Path) -> None:
    model = ["--model_name_or_path", "m"]
    found = parse(["--data_path", "a.jsonl", "b, c/", *model, "--data_weights", "0.7", "0.3"])
    assert (found.data.data_path, found.data.data_weights) == (["a.jsonl", "b, c/"], [0.7, 0.3])
    assert (found.data.paths, found.data.shown_path) == (["a.jsonl", "b, c/"], "a.jsonl, b, c/")
    assert Settings.from_flags(found.to_flags()) == found
    config = write(tmp_path, "data_path: [a.jsonl, b]\nmodel_name_or_path: m\ndata_weights: [1, 2]\n")
    assert parse(["--config", config]).data.data_weights == [1.0, 2.0]
    for words, reason in (
        (["0.7", "0.3"], "data_weights: 2 for 1 data_path; give one for each"),
        (["0.7", "0"], "--data_weights: .* is not a list of numbers above 0"),
        (["x"], "--data_weights: .* is not a list of numbers above 0"),
    ):
        with pytest.raises(ConfigError, match=reason):
            parse([*BASE, "--data_weights", *words])
