"""The state that the page shows, from live.json while a search runs, and from its table afterwards."""

import json
import math
from pathlib import Path
from typing import Any

from vlmtune.config.settings import Settings
from vlmtune.console import format_value
from vlmtune.errors import ConfigError
from vlmtune.search.distributions import Categorical, Distribution
from vlmtune.search.objectives import objectives_of
from vlmtune.search.requests import UserRequests
from vlmtune.search.space import Space

FINISHED = "trials.parquet"


class SearchFolder:
    """The output folder of a search, running or finished.

    Raises:
        ConfigError: the folder holds no search.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).absolute()
        file = self.folder / "search.yaml"
        if not file.is_file():
            raise ConfigError(
                f"{folder}: no search is there (search.yaml is missing); name the --output_dir of a search"
            )
        self.settings = Settings.load(file)
        self.space = Space.parse(self.settings.search.search_space or {}, self.settings)
        self.requests = UserRequests(str(self.folder))

    def state(self) -> dict[str, Any]:
        """The state that the page shows, as plain values."""
        live = self.folder / "live.json"
        finished = (self.folder / FINISHED).is_file()
        if live.is_file():
            state: dict[str, Any] = json.loads(live.read_text(encoding="utf-8"))
        else:
            state = {"objectives": objectives_of(self.settings), "total": 0, "trials": self._from_table()}
        state["running"] = bool(state.get("running")) and not finished
        if finished and not state["total"]:
            state["total"] = len(state["trials"])
        metric, mode = next(iter(state["objectives"].items()))
        complete = [one for one in state["trials"] if one["state"] == "COMPLETE" and metric in one]
        sign = 1 if mode == "min" else -1
        best = min(complete, key=lambda one: sign * one[metric], default=None)
        return {
            **state,
            "folder": str(self.folder),
            "best": None if best is None else best["number"],
            "front": self._front(complete, state["objectives"]),
            "names": self.space.names,
            "drawn": {name: input_of(one) for name, one in self.space.distributions.items()},
            "waiting": self.requests.waiting(),
            "report": (self.folder / "report.html").is_file(),
        }

    def propose(self, values: dict[str, str]) -> None:
        """Queue values for the next trial.

        Raises:
            ConfigError: a value is missing, of a wrong type, or outside the search space.
        """
        if self.space.is_grid:
            raise ConfigError("a grid is run whole: no trial can be proposed")
        unknown = set(values) - set(self.space.distributions)
        if unknown:
            raise ConfigError(f"{min(unknown)}: is not searched here")
        parameters = {}
        for name, distribution in self.space.distributions.items():
            if name not in values:
                raise ConfigError(f"{name}: has no value")
            value = self.settings.replace(**{name: values[name]}).value(name)
            if not distribution.contains(value):
                raise ConfigError(f"{name}: {values[name]} is outside the search space, {self._entry(name)}")
            parameters[name] = distribution.parameter(value)
        self.requests.propose(parameters)

    def stop(self, trial_id: str) -> None:
        """Ask that a running trial be stopped.

        Raises:
            ConfigError: no such trial runs.
        """
        running = [one["trial_id"] for one in self.state()["trials"] if one["state"] == "RUNNING"]
        if trial_id not in running:
            raise ConfigError(f"{trial_id}: no such trial is running")
        self.requests.stop(trial_id)

    def _entry(self, name: str) -> str:
        return json.dumps((self.settings.search.search_space or {}).get(name), ensure_ascii=False)

    @staticmethod
    def _front(complete: list[dict[str, Any]], objectives: dict[str, str]) -> list[int]:
        """The numbers of the trials that no other beats in every objective; empty with one objective."""
        if len(objectives) < 2:
            return []
        signs = {name: 1 if mode == "min" else -1 for name, mode in objectives.items()}
        losses = {
            one["number"]: [sign * one[name] for name, sign in signs.items()]
            for one in complete
            if all(name in one for name in signs)
        }
        return [
            number
            for number, own in losses.items()
            if not any(
                other != own and all(a <= b for a, b in zip(other, own, strict=True))
                for other in losses.values()
            )
        ]

    def _from_table(self) -> list[dict[str, Any]]:
        """The trials of a finished search, without curves."""
        import pyarrow.parquet as pq

        if not (self.folder / FINISHED).is_file():
            return []
        trials = []
        for number, row in enumerate(pq.read_table(self.folder / FINISHED).to_pylist(), 1):
            numbers = {
                name: value
                for name, value in row.items()
                if isinstance(value, int | float) and math.isfinite(value) and name not in self.space.names
            }
            values = {name: row[name] for name in self.space.names if name in row}
            step = {"step": row["steps"], "max_steps": row["steps"]} if row.get("steps") else {}
            known = {"number": number, "trial_id": row["trial_id"], "state": row["state"]}
            trials.append({**numbers, **step, **known, "values": values, "curve": []})
        return trials


def input_of(distribution: Distribution) -> dict[str, Any]:
    """How the page asks for a value: by `choices`, in the form of flags' values, or a `range` in words."""
    if isinstance(distribution, Categorical):
        return {"range": "", "choices": [flag_text(value) for value in distribution.values]}
    low, high = format_value(distribution.low), format_value(distribution.high)
    return {"range": f"{low} to {high}{', on a log scale' if distribution.log else ''}", "choices": None}


def flag_text(value: Any) -> str:
    """A value as a command line gives it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)
