"""Helpers for drawn images: colours, boxes, and how much boxes overlap."""

Colour = tuple[int, int, int]  # red, green, blue
Box = tuple[float, float, float, float]  # left, top, right, bottom


def shade(colour: Colour, factor: float) -> Colour:
    """The colour with its brightness times `factor`."""
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def overlap(one: Box, other: Box) -> float:
    """The common area as a share of the smaller box's: 0 to 1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(0.0, width) * max(0.0, height) / smaller
