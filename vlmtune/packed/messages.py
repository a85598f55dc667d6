"""What trials and engines send each other. Both sides import this module, so it imports neither torch nor
transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NOTES = (
    "notes"  # in a report's metrics: lines that its engine has noted since the last report, for the console
)
# In a report's metrics: why a trial cannot be trained. An exception would make Tune start the trial again,
# as it does for one whose process died.
FAILURE = "failed"


@dataclass(frozen=True)
class TrialReport:
    """The metrics of one evaluation of a trial, and whether the trial has ended with it."""

    metrics: dict[str, Any]
    last: bool


class UnknownTrialError(Exception):
    """The engine has no such trial, because it has restarted since the trial joined. The trial joins again."""
