"""Each metric on the examples of the paper or package that it is from, and intervals against what theory
says."""

import math

import numpy as np
import pytest

from vlmtune.errors import ConfigError
from vlmtune.evaluation.metrics import (
    METRICS,
    AnsweredRow,
    anls,
    check_metrics,
    estimates,
    exact_match,
    normalized_match,
    rouge_l,
    score,
    token_f1,
    with_number_rate,
)


def test_exact_and_normalized_match() -> None:
    assert exact_match(" 3명 ", "3명") == 1
    assert exact_match("3 명", "3명") == 0
    assert exact_match("3", "３") == 0
    assert normalized_match("３명입니다。", "3명입니다.") == 1
    assert normalized_match("There are 3 PEOPLE", "there are 3 people.") == 1
    assert normalized_match("세 명", "네 명") == 0
    assert normalized_match("3.5", "35") == 0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat sat", "a cat sat", 1.0),  # articles do not count: SQuAD's normalize_answer
        ("Denver Broncos", "The Denver Broncos!", 1.0),
        ("in the graduate school", "graduate school", 0.8),  # precision 2/3, recall 1
        ("cat cat dog", "cat dog dog", 2 / 3),  # each word as often as it stands in both
        ("London", "Paris", 0.0),
        ("", "", 1.0),  # SQuAD 2: both empty agree, one does not
        ("", "Paris", 0.0),
        ("사람이 세 명 있습니다", "사람이 네 명 있습니다", 0.75),
        ("三个人", "三人", 0.8),  # by character, as MLQA's mixed segmentation
    ],
)
def test_token_f1(answer: str, reference: str, expected: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1, S2 and S3
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("testing", "testing one two", 0.5),  # rouge-score's own tests
        ("two one testing", "testing one two", 1 / 3),
        ("", "testing", 0.0),
        (
            "거푸집은 임시 틀입니다",
            "거푸집은 콘크리트의 임시 틀입니다.",
            6 / 7,
        ),  # rouge-score's tokenizer finds no word here
    ],
)
def test_rouge_l(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Hello World", "hello  world", 1.0),
        ("helloworl", "helloworld", 0.9),
        ("abcd", "abxy", 0.0),  # half: 1 - NL counts below the threshold of 0.5 alone (Biten et al. 2019)
        ("abcd", "abcx", 0.75),
        ("세명", "세 명", 2 / 3),
        ("한국", "한국어", 2 / 3),  # syllables, not letters
        ("", "x", 0.0),
        ("", "", 1.0),
    ],
)
def test_anls(answer: str, reference: str, expected: float) -> None:
    assert anls(answer, reference) == pytest.approx(expected)


def test_numbers_of_answers() -> None:
    references = ["3", "세 명", "10", "a cat"]
    answers = ["4", "There are three.", "nothing to see", "5"]
    values = {name: score(answers, references, name) for name in ("mae", "rmse", "within_1", "number_rate")}
    # The last reference tells no number and has no say; the third answer counts as 0.
    assert values == {
        "mae": 11 / 3,
        "rmse": pytest.approx(math.sqrt(101 / 3)),
        "within_1": 2 / 3,
        "number_rate": 2 / 3,
    }
    assert math.isnan(score(["3"], ["a cat"], "mae"))


def test_perplexity_is_of_all_tokens_not_of_rows() -> None:
    rows = [
        AnsweredRow("", "", nll=math.log(2) * 3, tokens=3),
        AnsweredRow("", "", nll=math.log(8), tokens=1),
    ]
    (found,) = estimates([rows], ["a", "b"], ["perplexity"])
    assert found["perplexity"].value == pytest.approx(math.exp((math.log(2) * 3 + math.log(8)) / 4))


def test_an_unknown_metric_is_named_with_the_nearest() -> None:
    check_metrics(list(METRICS))
    with pytest.raises(
        ConfigError,
        match=r"exact_mach: there is no such metric; there are exact_match, .*; did you mean exact_match\?",
    ):
        check_metrics(["mae", "exact_mach"])


def answered(right: np.ndarray) -> list[AnsweredRow]:
    return [AnsweredRow("1" if one else "5", "1") for one in right]


def test_the_interval_is_that_of_a_binomial() -> None:
    right = np.arange(400) % 5 > 0  # 80 % of 400: standard error 2 %
    (found,) = estimates([answered(right)], [str(row) for row in range(400)], ["exact_match"])
    estimate = found["exact_match"]
    assert estimate.value == 0.8
    assert estimate.low == pytest.approx(0.8 - 1.96 * 0.02, abs=0.008)
    assert estimate.high == pytest.approx(0.8 + 1.96 * 0.02, abs=0.008)


def test_rows_of_one_image_do_not_count_as_independent() -> None:
    right = np.repeat(
        np.arange(100) % 5 > 0, 4
    )  # the same 400 rows, four to an image: the standard error doubles
    (alone,) = estimates([answered(right)], [str(row) for row in range(400)], ["exact_match"])
    (grouped,) = estimates([answered(right)], [str(row // 4) for row in range(400)], ["exact_match"])
    widths = [entry["exact_match"].high - entry["exact_match"].low for entry in (alone, grouped)]
    assert widths[1] / widths[0] == pytest.approx(2, rel=0.15)


def test_a_difference_is_paired() -> None:
    first = np.arange(200) % 2 == 0
    second = first & (np.arange(200) >= 10)  # worse in 5 rows, equal in all others
    adapter, base, difference = estimates(
        [answered(first), answered(second)], [str(row) for row in range(200)], ["exact_match", "mae"]
    )
    assert difference["exact_match"].value == pytest.approx(
        adapter["exact_match"].value - base["exact_match"].value
    )
    assert 0 <= difference["exact_match"].low < 0.025 < difference["exact_match"].high < 0.06
    assert difference["mae"].value == pytest.approx(-0.1)


def test_estimates_are_seeded_and_do_not_depend_on_which_metrics_are_asked_for() -> None:
    rows, groups = answered(np.arange(300) % 7 > 1), [str(row // 2) for row in range(300)]
    once, again = (estimates([rows], groups, list(METRICS))[0] for _ in range(2))
    assert once == again
    assert estimates([rows], groups, ["anls"])[0]["anls"] == once["anls"]
    assert estimates([rows], groups, ["anls"], seed=1)[0]["anls"] != once["anls"]


def test_one_group_has_no_interval_and_metrics_without_a_say_are_left_out() -> None:
    (found,) = estimates([[AnsweredRow("x", "a cat")] * 3], ["same"] * 3, ["exact_match", "mae"])
    assert list(found) == ["exact_match"]
    assert (found["exact_match"].low, found["exact_match"].high) == (None, None)


def test_the_share_of_answers_with_a_number_stands_beside_errors_of_numbers():
    assert with_number_rate(["mae", "exact_match"]) == ["mae", "exact_match", "number_rate"]
    assert with_number_rate(["number_rate", "rmse"]) == ["number_rate", "rmse"]
    assert with_number_rate(["within_1"]) == ["within_1"]
