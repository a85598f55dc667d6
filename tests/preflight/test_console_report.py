"""The preflight as text: one screen, in which everything is found."""

import pytest
from faulty_rows import BAD, GOOD

from vlmtune.data.split import EVAL, TEST, TRAIN
from vlmtune.preflight.console_report import WIDTH, console_report
from vlmtune.preflight.summary import Summary

pytestmark = pytest.mark.timeout(180)


def test_the_screen_is_one_screen(summary: Summary) -> None:
    text = console_report(summary, colour=False)
    train, held_out, test = (summary.split[name] for name in (TRAIN, EVAL, TEST))
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines())) <= WIDTH
    for line in (
        f"Bad rows  {BAD} of {GOOD + BAD}",
        "            data.jsonl:25, data.jsonl:26, data.jsonl:27, data.jsonl:28, data.jsonl:29, … 1 more",
        "          data.jsonl:4 = data.jsonl:21",
        "          data.jsonl:5 ≠ data.jsonl:22",
        f"Split     train {train}, eval {held_out}, test {test} rows",
    ):
        assert line in text.splitlines()
    assert "        6 image " in text
    assert "; and 5 more of this kind" in " ".join(text.split())
    coloured = console_report(summary, colour=True)
    assert "\x1b[" in coloured
    assert "[[" not in coloured
    assert "\x1b" not in text
