"""The console script: its commands, and what it does with anything else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune import __version__
from vlmtune.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
ONLY_INSTALLED = {"chat", "ui", "demo"}  # commands of the installed program alone
SCRIPTS = {"inspect": "inspect_data"}


def test_without_a_command_it_lists_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: vlmtune COMMAND [--option value ...]"
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"vlmtune {__version__}\n"


def test_an_unknown_command_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["tunes"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: tunes: there is no such command; did you mean tune?\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_under_both_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert f"vlmtune {name} " in shown and "ray_jobs" not in shown
    if name in ONLY_INSTALLED:
        return
    script = f"ray_jobs/{SCRIPTS.get(name, name)}.py"
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python {script} --" in done.stdout
    assert f'"""{COMMANDS[name][1].partition(chr(10))[0]}\n' in (ROOT / script).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--nope", "1"], "error: --nope: there is no such option"),
        (["train", "--lora_r", "8.5"], "error: --lora_r: "),
        (["eval"], "error: --adapter is missing"),
        (["predict", "--adapter", "a", "--output_dir", "o"], "error: --data_path is missing"),
        (["export", "--adapter", "a", "--output_dir", "o"], "error: nothing to export"),
        (["tune", "--lr", "1"], "error: --lr: this option is called --learning_rate"),
        (
            ["train", "--data_path", "no/such/rows.jsonl", "--model_name_or_path", "a/b"],
            "error: no/such/rows",
        ),
        (["eval", "--adapter", "nowhere", "--output_dir", "o"], "error: nowhere is not an adapter"),
        (["predict", "--adapter", "a", "--prompt", "?"], "error: --prompt: this option is called --question"),
        (
            ["tune", "--data_path", "tests", "--model_name_or_path", "a/b", "--metric", "eval_los"],
            "error: --metric eval_los",
        ),
        (
            ["tune", "--data_path", "tests", "--model_name_or_path", "a/b", "--output_dir", "docs"],
            "error: --output_dir ",
        ),
        (["inspect", "--nope"], "error: --nope: there is no such option"),
    ],
)
def test_arguments_are_checked_before_a_heavy_library_is_imported(arguments: list[str], message: str) -> None:
    code = f"""
import sys
from vlmtune.cli import main
try:
    main({arguments})
finally:
    print([name for name in ("ray", "torch", "transformers", "trl", "peft") if name in sys.modules])
"""
    before = os.times().children_user + os.times().children_system
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = os.times().children_user + os.times().children_system - before
    assert seconds < 1.5, "a plain mistake costs under a second of CPU; half a second is for a busy machine"
    assert done.returncode == 2
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1
    assert done.stdout == "[]\n"
