"""Boxes and points in an answer, as any model family writes them, and how well they meet a reference.

Both numbers are the same in every unit: all boxes of a row are stretched alike, along x and along y,
between pixels of the original image, pixels of the resized one, and shares of 1 or 1000.
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


def places(text: str) -> tuple[list[Box], list[Point]]:
    """The boxes of a text, and its points that are no corners of these."""
    boxes: list[Box] = []
    for match in BOX.finditer(text):
        x1, y1, x2, y2 = (float(number) for number in match.groups() if number is not None)
        if x1 < x2 and y1 < y2:
            boxes.append((x1, y1, x2, y2))
    rest = BOX.sub(" ", text)
    return boxes, [(float(x), float(y)) for x, y in POINT.findall(rest)]


def iou(answer: str, reference: str) -> float | None:
    """The mean intersection over union of the boxes of both, each with at most one of the other.

    Pairs are taken from the best to the worst, as COCO's evaluation does. The sum over the pairs is divided
    by the larger number of boxes, so a box too many counts as one that is missing. None where the reference
    has no box.
    """
    answered, expected = places(answer)[0], places(reference)[0]
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
    """The share of the reference's boxes that a point of the answer lies in; a box's middle is its point.

    Each point is taken for one box, and points that lie in none count like boxes that are missed. None where
    the reference has no box.
    """
    boxes, points = places(answer)
    expected = places(reference)[0]
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
