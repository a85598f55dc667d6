"""What a person asks a running search to do, through its page: stop a trial, or try values next.

OUTPUT_DIR/requests/stop-TRIAL_ID       a trial that is to be stopped
OUTPUT_DIR/requests/try-NUMBER.json     values that are to be tried, in the order of their numbers; `.taken`
                                        is added to the name when the searcher has taken them

Files connect the page's process with the search's. They work where both see the same local folder.
"""

import json
import time
from pathlib import Path
from typing import Any

from vlmtune.storage import scheme


class UserRequests:
    """The requests to the search in one output folder; none in object storage."""

    def __init__(self, output_dir: str) -> None:
        self.folder = None if scheme(output_dir) else Path(output_dir) / "requests"

    def stop(self, trial_id: str) -> None:
        """Ask that a trial be stopped at its next report."""
        self._write(f"stop-{trial_id}", "")

    def is_stopped(self, trial_id: str) -> bool:
        """Whether a trial is to be stopped."""
        return self.folder is not None and (self.folder / f"stop-{trial_id}").exists()

    def propose(self, parameters: dict[str, Any]) -> None:
        """Ask that values, given as Optuna stores them, be tried next."""
        self._write(f"try-{time.time_ns():020d}.json", json.dumps(parameters))

    def waiting(self) -> list[dict[str, Any]]:
        """The values that wait to be tried."""
        return [json.loads(path.read_text()) for path in self._waiting_files()]

    def take(self) -> dict[str, Any] | None:
        """The values that have waited longest; None if none wait."""
        files = self._waiting_files()
        if not files:
            return None
        values: dict[str, Any] = json.loads(files[0].read_text())
        files[0].rename(f"{files[0]}.taken")
        return values

    def _waiting_files(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob("try-*.json"))

    def _write(self, name: str, text: str) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        unfinished = self.folder / f".{name}.part"
        unfinished.write_text(text)
        unfinished.rename(self.folder / name)
