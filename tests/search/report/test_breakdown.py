"""Test answers in groups, and confusions."""

from vlmtune.search.comparison import BASE, BEST, ComparedRow, compare_answers
from vlmtune.search.report.breakdown import breakdown_section, confusion_section, data_section

QUESTIONS = ("How many people?", "몇 명입니까?")


def rows(count: int = 40) -> list[ComparedRow]:
    return [
        ComparedRow(
            number,
            QUESTIONS[number % 2],
            ("yes", "no")[number % 4 // 2],
            {BASE: "no", BEST: "yes" if number % 2 else "maybe"},
            group=f"camera {number % 3}",
        )
        for number in range(count)
    ]


def test_results_by_question_language_and_group() -> None:
    found = compare_answers(rows(), [str(number) for number in range(40)], 40, 0)
    text = breakdown_section(found, group_by="camera<")
    assert text.count("<table>") == 3 and "<th>camera&lt;</th>" in text
    assert '<td class="text">Korean</td><td>20</td><td>50.0 %</td><td>50.0 %</td>' in text
    assert '<td class="text">Latin script</td><td>20</td><td>50.0 %</td><td>0.0 %</td>' in text
    assert "camera" not in breakdown_section(found, group_by=None)


def test_confusions_of_short_answers() -> None:
    found = compare_answers(rows(), [str(number) for number in range(40)], 40, 0)
    text = confusion_section(found)
    assert "<th>yes</th><th>no</th><th>other</th>" in text
    line = '<td>yes</td><td class="won">10</td><td class="soft"></td><td class="wrong">10</td>'
    assert line in text
    long = [ComparedRow(n, "?", f"a sentence {n}", {BASE: "", BEST: ""}) for n in range(9)]
    assert confusion_section(compare_answers(long, list("abcdefghi"), 9, 0)) == ""


def test_the_most_common_answers_are_told() -> None:
    found = compare_answers(rows(), [str(number) for number in range(40)], 40, 0)
    text = data_section(found, {"train": 1000, "eval": 20, "test": 40})
    assert "1,000 train, 20 eval, 40 test rows" in text
    assert '<td class="text">yes</td><td>20</td><td>50 %</td>' in text
