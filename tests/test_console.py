import contextlib
import io
import logging
import os
import subprocess
import sys

import pytest
from rich.console import Console

from vlmtune.console import StepPrinter, TrialTable, console_line, format_value, show_log

NAMES = ["lora_r", "lora_alpha", "learning_rate", "max_length"]
REASON = (
    "lora_target_modules: no linear layer is called 'no_such_proj'; "
    "there are q_proj, k_proj, v_proj, o_proj, gate_proj"
)


def played(mode: str, *, columns: int = 80, terminal: bool = False) -> tuple[TrialTable, list[str]]:
    """A table after a small search, and the lines that it printed on the way."""
    printed = io.StringIO()
    console = Console(
        width=columns, height=25, record=True, file=io.StringIO(), force_terminal=terminal, color_system=None
    )
    table = TrialTable(NAMES, "eval_loss", mode, console)
    values = {"lora_r": 8, "lora_alpha": 16, "learning_rate": 2e-4, "max_length": 128}
    with contextlib.redirect_stdout(printed):
        table.update(1, state="running", **values)
        table.update(2, state="running", **values | {"learning_rate": 2.385e-3})
        table.update(2, state="running", step=5, max_steps=19, eval_loss=1.5, seconds=26)
        table.update(1, state="complete", step=19, max_steps=19, eval_loss=6.9, seconds=36)
        table.update(2, state="pruned", step=5, max_steps=19, eval_loss=1.5, seconds=26)
        table.update(3, state="failed", error=REASON, **values)
        table.update(4, state="infeasible", **values)
        table.update(5, state="complete", step=19, max_steps=19, eval_loss=7.25, seconds=36, **values)
        table.update(6, state="complete", step=19, max_steps=19, eval_loss=float("nan"), seconds=36, **values)
    return table, printed.getvalue().splitlines()


def drawn(table: TrialTable, height: int | None = None) -> list[str]:
    table.console.print(table.table(height))
    return [line.rstrip() for line in table.console.export_text().splitlines()]


@pytest.mark.parametrize(("mode", "best"), [("min", 1), ("max", 5)])
def test_the_best_is_marked_among_the_trials_that_ended(mode: str, best: int) -> None:
    table, _ = played(mode)
    assert table.best() == best
    assert [line.split()[1] for line in drawn(table) if line.strip().startswith("*")] == [str(best)]


def test_a_line_tells_what_has_changed() -> None:
    _, lines = played("min")
    assert lines[0] == "trial   1  running     lora_r 8  lora_alpha 16  learning_rate 0.0002  max_length 128"
    assert lines[2:5] == [
        "trial   2  running     step 5/19  eval_loss 1.5",
        "trial   1  complete    step 19/19  eval_loss 6.9  best so far",
        "trial   2  pruned      step 5/19  eval_loss 1.5",
    ]
    assert lines[5].endswith(f"max_length 128  {REASON}")
    assert not any("best" in line for line in lines[5:])


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal(columns: int) -> None:
    table, _ = played("min", columns=columns)
    head, *rows = drawn(table)
    assert head.split() == ["trial", "state", *NAMES, "step", "eval_loss", "sec"]
    assert rows[0].split() == ["*", "1", "complete", "8", "16", "0.0002", "128", "19/19", "6.9", "36"]
    assert rows[1].split() == ["2", "pruned", "8", "16", "0.00238", "128", "5/19", "1.5", "26"]
    assert rows[3].split() == ["4", "infeasible", "8", "16", "0.0002", "128"]
    assert rows[6].startswith("trial 3: lora_target_modules: no linear layer is called 'no_such_proj'")
    assert " ".join(" ".join(rows[6:]).split()) == f"trial 3: {REASON}", "wrapped, never cut"
    assert all(len(line) <= columns for line in (head, *rows))


def test_a_long_search_shows_the_best_and_the_last_rows() -> None:
    table, _ = played("min")
    shown = drawn(table, 4)
    firsts = [line.replace("*", " ").split()[0] for line in shown]
    assert firsts[:5] == ["trial", "1", "5", "6", "trial"]
    assert len(drawn(table)) - len(drawn(table, 4)) == 3, "the whole table has the other three trials"


def test_a_terminal_gets_one_table_in_place_and_keeps_the_whole_of_it() -> None:
    table, printed = played("min", terminal=True)
    assert printed == []
    table.close()
    table.close()
    shown = [line.replace("*", " ").split()[0] for line in table.console.export_text().splitlines() if line]
    last = len(shown) - 1 - shown[::-1].index("6")
    assert shown[last - 6 : last + 2] == ["trial", "1", "2", "3", "4", "5", "6", "trial"]
    assert table.live is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.385e-3, "0.00238"),
        (7.2773, "7.277"),
        (123456.0, "1.23e+05"),
        (8, "8"),
        (None, "None"),
        (["q_proj", "k_proj"], "q_proj,k_proj"),
    ],
)
def test_values_are_short(value: object, text: str) -> None:
    assert format_value(value) == text


def test_steps_of_a_run_are_printed_now_and_then_and_evaluations_always(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = StepPrinter()
    for step in range(1, 5):
        printer({"step": step, "max_steps": 4, "loss": 3.0, "learning_rate": 1e-4})
    printer({"step": 4, "max_steps": 4, "eval_loss": 2.5})
    assert capsys.readouterr().out.splitlines() == [
        "step 1/4  loss 3.0000  learning_rate 0.0001",
        "step 4/4  eval_loss 2.5000",
    ]


def test_log_lines_are_printed_once_in_two_columns(capsys: pytest.CaptureFixture[str]) -> None:
    show_log()
    show_log()
    logger = logging.getLogger("vlmtune.some.module")
    logger.info(console_line("Dashboard", "http://127.0.0.1:8265"))
    logger.info(console_line("Data", "100 % of the rows"))
    logger.info(console_line("", "and more"))
    logger.debug("details")
    assert capsys.readouterr().out.splitlines() == [
        "Dashboard http://127.0.0.1:8265",
        "Data      100 % of the rows",
        "          and more",
    ]


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_terminals_and_locales_without_unicode(environment: dict[str, str]) -> None:
    """Letters that the output does not take become escapes; file names are Unicode in any locale."""
    program = (
        "from vlmtune.console import configure_console, say; import sys; configure_console(); "
        "say(f'{sys.getfilesystemencoding()} {sys.argv[1]} \\u00d7')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "사람"],
        capture_output=True,
        env={**os.environ, **environment},
        check=True,
        timeout=60,
    )
    shown = done.stdout.decode("ascii" if "PYTHONIOENCODING" in environment else "utf-8")
    assert shown.startswith("utf-8 ")
    assert "\\xd7" in shown or "×" in shown
    assert "\\uc0ac\\ub78c" in shown or "사람" in shown
