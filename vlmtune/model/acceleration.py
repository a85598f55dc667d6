"""One way in which a step is made fast: applied to a model, and can be left out again."""

from __future__ import annotations

from collections.abc import Callable


class Acceleration:
    """A change of a model that makes its steps fast and not their results different.

    Args:
        name: in words, for the line that says that it is left out.
        apply: makes the change with True and takes it back with False; not needed by code that reads `on`.

    Attributes:
        on: whether it is in use.
    """

    def __init__(self, name: str, apply: Callable[[bool], None] | None = None) -> None:
        self.name, self.on, self._apply = name, True, apply

    def switch(self, on: bool) -> None:
        self.on = on
        if self._apply is not None:
            self._apply(on)
