"""`Acceleration`: a change of a model that makes its steps fast, and that can be undone."""

from __future__ import annotations

from collections.abc import Callable


class Acceleration:
    """A change of a model that makes its steps faster without changing their results.

    Args:
        name: its name in messages.
        apply: makes the change (True) or undoes it (False). None if the changed code reads `on` itself.

    Attributes:
        on: whether the change is in use.
    """

    def __init__(self, name: str, apply: Callable[[bool], None] | None = None) -> None:
        self.name, self.on, self._apply = name, True, apply

    def switch(self, on: bool) -> None:
        self.on = on
        if self._apply is not None:
            self._apply(on)
