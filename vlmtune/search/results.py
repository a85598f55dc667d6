"""What a search found: a row per trial, the best one, and its adapter."""

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from ray import tune

from vlmtune.config import Settings
from vlmtune.data.paths import filesystem
from vlmtune.search.tuner import POINT

STATES = COMPLETE, PRUNED, FAILED, INFEASIBLE = "COMPLETE", "PRUNED", "FAILED", "INFEASIBLE"
MEASURED = ("eval_loss", "step", "seconds", "tokens_per_second", "peak_memory")


@dataclass(frozen=True)
class TrialRow:
    """One trial: its values, how it ended, its last report."""

    trial_id: str
    values: dict[str, Any]
    state: str
    metrics: dict[str, Any]
    error: str | None = None

    @property
    def checkpoint(self) -> str:
        return str(self.metrics["checkpoint_path"])


def state_of(metrics: dict[str, Any] | None, *, failed: bool) -> str:
    """How a trial ended, from its last report."""
    if metrics and metrics.get("infeasible"):
        return INFEASIBLE
    if failed or not metrics or "step" not in metrics:
        return FAILED
    return COMPLETE if metrics["step"] >= metrics["max_steps"] else PRUNED


def rows_of(grid: tune.ResultGrid) -> list[TrialRow]:
    """The trials of a search in the order in which they started."""
    rows = []
    for result in (grid[index] for index in range(len(grid))):
        metrics = dict(result.metrics or {})
        config = dict(result.config or {})
        error = str(result.error).strip().splitlines()[-1] if result.error else None
        values = config.get(POINT, config)
        trial_id = str(result.path).rstrip("/").rsplit("/", 1)[-1]
        rows.append(TrialRow(trial_id, values, state_of(metrics, failed=result.error is not None), metrics, error))
    return rows


def best_of(rows: list[TrialRow], metric: str, mode: str) -> TrialRow | None:
    """The best trial that ran to its end, or None."""
    sign = 1 if mode == "min" else -1
    finished = [row for row in rows if row.state == COMPLETE and math.isfinite(row.metrics.get(metric, math.nan))]
    return min(finished, key=lambda row: sign * row.metrics[metric], default=None)


def table(rows: list[TrialRow], names: list[str]) -> pd.DataFrame:
    """A row per trial: trial_id, every searched value, state, eval_loss, steps, seconds, tokens_per_second, peak_memory."""
    return pd.DataFrame(
        [
            {
                "trial_id": row.trial_id,
                **{name: row.values.get(name) for name in names},
                "state": row.state,
                **{"steps" if name == "step" else name: row.metrics.get(name) for name in MEASURED},
            }
            for row in rows
        ]
    )


def write_table(rows: list[TrialRow], names: list[str], folder: str) -> None:
    """`trials.parquet` in the search's output folder."""
    fs, inner = filesystem(folder)
    pq.write_table(pa.Table.from_pandas(table(rows, names), preserve_index=False), f"{inner}/trials.parquet", filesystem=fs)


def settings_of(row: TrialRow, settings: Settings) -> Settings:
    """The settings that train this trial's adapter alone, with train.py."""
    return settings.replace(**row.values)
