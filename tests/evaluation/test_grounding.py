"""Boxes and points of answers as model families write them, and their scores, computed by hand."""

import pytest

from vlmtune.evaluation.grounding import boxes_and_points, iou, point_in_box
from vlmtune.evaluation.metrics import score


@pytest.mark.parametrize(
    ("text", "boxes", "points"),
    [
        ("The dog is at [10, 20, 30, 40].", [(10, 20, 30, 40)], []),
        ("<box>[[10, 20, 30, 40]]</box> and [[50, 60]]", [(10, 20, 30, 40)], [(50, 60)]),
        ("<box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", [(1, 2, 3, 4), (5, 6, 7, 8)], []),
        ("<|box_start|>(10,20),(30,40)<|box_end|>(1,2),(3,4)", [(10, 20, 30, 40), (1, 2, 3, 4)], []),
        ('[{"bbox_2d": [0.1, 0.25, 0.5, 1], "label": "a"}]', [(0.1, 0.25, 0.5, 1)], []),
        ("click(start_box='[615, 226]')", [], [(615, 226)]),
        ("(5, 7)", [], [(5, 7)]),
        ("[40, 20, 30, 10] is reversed, [1, 2, 3] and 3, 4 are none", [], []),
    ],
)
def test_places(text: str, boxes: list[tuple[float, ...]], points: list[tuple[float, ...]]) -> None:
    assert boxes_and_points(text) == (boxes, points)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("[0, 0, 10, 10]", "[0, 0, 10, 10]", 1.0),
        ("[5, 0, 15, 10]", "[0, 0, 10, 10]", 1 / 3),  # 50 of 150
        ("[20, 20, 30, 30]", "[0, 0, 10, 10]", 0.0),
        ("I see none", "[0, 0, 10, 10]", 0.0),
        ("[20, 0, 30, 10] [0, 0, 10, 10]", "[0, 0, 10, 10] [20, 0, 30, 10]", 1.0),  # in any order
        ("[0, 0, 10, 10] [0, 0, 10, 10]", "[0, 0, 10, 10]", 0.5),  # one too many
        ("[0, 0, 10, 10]", "[0, 0, 10, 10] [20, 0, 30, 10]", 0.5),  # one missing
        ("[0, 0, 10, 10]", "two dogs", None),
    ],
)
def test_iou(answer: str, reference: str, expected: float | None) -> None:
    assert iou(answer, reference) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("[5, 5]", "[0, 0, 10, 10]", 1.0),
        ("(11,5)", "[0, 0, 10, 10]", 0.0),
        ("[2, 2, 8, 8]", "[0, 0, 10, 10]", 1.0),  # a box counts by its middle
        ("[5, 5]", "[0, 0, 10, 10] [20, 0, 30, 10]", 0.5),
        ("[5, 5] [25, 5]", "[20, 0, 30, 10] [0, 0, 10, 10]", 1.0),
        ("[5, 5] [50, 5]", "[0, 0, 10, 10]", 0.5),
        ("nowhere", "[0, 0, 10, 10]", 0.0),
        ("[5, 5]", "[5, 5]", None),
    ],
)
def test_point_in_box(answer: str, reference: str, expected: float | None) -> None:
    assert point_in_box(answer, reference) == expected


def test_rows_without_a_box_do_not_count() -> None:
    answers, references = ["[5, 0, 15, 10]", "3"], ["[0, 0, 10, 10]", "3"]
    assert score(answers, references, "iou") == pytest.approx(1 / 3)
    assert score(answers, references, "point_in_box") == 1.0  # the middle (10, 5) is on the edge
