"""Reads boxes and points of answers in the form of any model family, and compares them with a reference.

Both measures, `iou` and `point_in_box`, do not depend on the unit: from one unit to another (pixels of the
original or of the resized image, shares of 1 or of 1000), all boxes of a row are scaled alike along x and
along y.
"""

import re

Box = tuple[float, float, float, float]
Point = tuple[float, float]

NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
BOX = re.compile(
    rf"[\[(<]{NUMBER},{NUMBER},{NUMBER},{NUMBER}[\])>]"  # [x1, y1, x2, y2]
    rf"|[\[(]{NUMBER},{NUMBER}[\])]\s*,\s*[\[(]{NUMBER},{NUMBER}[\])]"  # (x1,y1),(x2,y2)
)
POINT = re.compile(rf"[\[(]{NUMBER},{NUMBER}[\])]")


def boxes_and_points(text: str) -> tuple[list[Box], list[Point]]:
    """(boxes, points) in a text; the corners of boxes are not among the points."""
    boxes: list[Box] = []
    for match in BOX.finditer(text):
        x1, y1, x2, y2 = (float(number) for number in match.groups() if number is not None)
        if x1 < x2 and y1 < y2:
            boxes.append((x1, y1, x2, y2))
    rest = BOX.sub(" ", text)
    return boxes, [(float(x), float(y)) for x, y in POINT.findall(rest)]


def iou(answer: str, reference: str) -> float | None:
    """The mean intersection over union of the boxes of an answer and of its reference.

    Boxes are paired from the best pair to the worst, each box at most once, as in COCO's evaluation. The sum
    over the pairs is divided by the larger number of boxes, so an extra box counts like a missing one. None
    if the reference has no box.
    """
    answered, expected = boxes_and_points(answer)[0], boxes_and_points(reference)[0]
    if not expected:
        return None
    pairs = sorted(
        ((_overlap(one, other), i, j) for i, one in enumerate(answered) for j, other in enumerate(expected)),
        reverse=True,
    )
    total, used_answers, used_references = 0.0, set[int](), set[int]()
    for value, i, j in pairs:
        if i not in used_answers and j not in used_references:
            total += value
            used_answers.add(i)
            used_references.add(j)
    return total / max(len(answered), len(expected))


def point_in_box(answer: str, reference: str) -> float | None:
    """The share of the reference's boxes with a point of the answer in them; a box counts as its middle.

    Each point counts for one box. A point outside all boxes counts like a missed box. None if the reference
    has no box.
    """
    boxes, points = boxes_and_points(answer)
    expected = boxes_and_points(reference)[0]
    if not expected:
        return None
    free = [*points, *(((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in boxes)]
    number, hits = len(free), 0
    for x1, y1, x2, y2 in sorted(expected, key=_area):
        inside = next((point for point in free if x1 <= point[0] <= x2 and y1 <= point[1] <= y2), None)
        if inside is not None:
            free.remove(inside)
            hits += 1
    return hits / max(number, len(expected))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (_area(one) + _area(other) - width * height)
