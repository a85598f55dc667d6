"""What a search takes over from earlier ones (`--warm_start`).

Trials of a search on the same prepared rows and model, with the same other settings, measured what this
search measures: the sampler learns from their results. Any other search only says which points are worth a
try: its best ones are proposed first, at most a tenth of the trials, so that a misleading search costs no
more than that.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune import storage
from vlmtune.config import yaml12
from vlmtune.config.flag_table import flags
from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.errors import ConfigError
from vlmtune.folder_owner import check_owner
from vlmtune.search.distributions import Categorical
from vlmtune.search.space import Space
from vlmtune.search.trial_results import COMPLETE

logger = logging.getLogger(__name__)

TRIALS_PER_EARLIER_POINT = 10  # at most one trial in this many tries a point of an earlier search
# Options that do not change what a trial measures, beside those of the groups `run` and `search`. Paths are
# among them because the key of the prepared rows stands for their content.
_IRRELEVANT = ("data_path", "eval_data_path", "image_root", "cache_dir", "cache_size_gb", "no_cache", "seed")


@dataclass(frozen=True)
class EarlierTrials:
    """Trials of earlier searches, given by their parameters as Optuna stores them.

    Attributes:
        results: (parameters, metric) of trials that measured what this search measures. The sampler learns
            from them as from this search's own; they do not count towards `num_samples`.
        points: parameters to try first, the most promising one first; some options may be missing.
    """

    results: Sequence[tuple[dict[str, Any], float]] = field(default_factory=list)
    points: Sequence[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class EarlierSearch:
    """A finished search: its settings, the key of its prepared rows, and the rows of its table of trials."""

    FILES: ClassVar = ("search.yaml", "trials.parquet")

    folder: str
    settings: Settings
    data_key: str | None
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: str) -> "EarlierSearch":
        """Read the output folder of a finished search.

        Raises:
            ConfigError: no finished search is there, or its settings cannot be read.
        """
        path = storage.absolute(folder)
        for name in cls.FILES:
            if not storage.exists(f"{path}/{name}"):
                raise ConfigError(
                    f"--warm_start {folder}: no finished search is there ({name} is missing); name its "
                    "--output_dir"
                )
        try:
            options = yaml12.load_options(storage.read_text(f"{path}/search.yaml"))
            settings = Settings.from_flags(options or {})
        except (ConfigError, yaml12.YamlError, UnicodeDecodeError) as error:
            raise ConfigError(f"--warm_start {folder}: search.yaml: {storage.one_line(error)}") from None
        files, inner = storage.filesystem(f"{path}/trials.parquet")
        try:
            rows = pq.read_table(inner, filesystem=files).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(
                f"--warm_start {folder}: trials.parquet is damaged: {storage.one_line(error)}"
            ) from None
        if any(not {"state", "eval_loss"} <= row.keys() for row in rows[:1]):
            raise ConfigError(f"--warm_start {folder}: trials.parquet is no table of trials")
        return cls(folder, settings, _data_key(f"{path}/best/metrics.json"), rows)

    def ranked(self, metric: str, mode: str) -> list[tuple[dict[str, Any], float]]:
        """The complete trials with their metric (eval_loss if the search had no such metric), best first."""
        if any(metric not in row for row in self.rows):
            metric, mode = "eval_loss", "min"
        complete = [(row, row[metric]) for row in self.rows if row["state"] == COMPLETE]
        finite = [
            (row, float(value)) for row, value in complete if value is not None and math.isfinite(value)
        ]
        return sorted(finite, key=lambda one: one[1], reverse=mode == "max")


def _data_key(path: str) -> str | None:
    """The key of the prepared rows in an adapter's metrics.json; None if it is not there."""
    try:
        metrics = json.loads(storage.read_text(path)) if storage.exists(path) else {}
    except ValueError:
        return None
    key = metrics.get("data") if isinstance(metrics, dict) else None
    return key if isinstance(key, str) else None


def read_earlier_trials(settings: Settings, space: Space, data_key: str) -> EarlierTrials:
    """What this search can learn from the earlier searches that `warm_start` names.

    Args:
        data_key: the key of this search's prepared rows.

    Raises:
        ConfigError: a folder holds no finished search, or the space is a grid.
    """
    folders = settings.search.warm_start or []
    if folders and space.is_grid:
        raise ConfigError("--warm_start: this search space is a grid, which is run as a whole; leave it out")
    for folder in folders:
        check_owner(folder, "--warm_start", EarlierSearch.FILES, trusted=settings.run.trust_folder)
    searches = [EarlierSearch.read(folder) for folder in folders]
    results: list[tuple[dict[str, Any], float]] = []
    others: list[list[dict[str, Any]]] = []
    for search in sorted(searches, key=lambda one: -similarity(one, settings, data_key)):
        ranked = search.ranked(settings.search.metric, settings.search.mode)
        if is_same_problem(search, settings, space, data_key):
            counted = [(parameters_of(row, space), value) for row, value in ranked if is_point_of(row, space)]
            results += counted
            text = f"{len(counted)} trials of {search.folder} are learnt from: the same problem"
        else:
            others.append([one for row, _ in ranked if (one := parameters_of(row, space))])
            text = f"the best values of {search.folder} are tried first: other rows, model or settings"
        logger.info(console_line("Warm start", text))
    limit = max(1, settings.search.num_samples // TRIALS_PER_EARLIER_POINT)
    return EarlierTrials(results, list(_interleave(others))[:limit])


def similarity(search: EarlierSearch, settings: Settings, data_key: str) -> int:
    """How similar an earlier search is: 2 for the same model, 1 for the same rows, 3 for both."""
    same_model = search.settings.model.model_name_or_path == settings.model.model_name_or_path
    return 2 * same_model + (search.data_key == data_key)


def is_same_problem(search: EarlierSearch, settings: Settings, space: Space, data_key: str) -> bool:
    """Whether trials of an earlier search measured what this search measures.

    Its rows, metric and all settings that are not searched have to be the same.
    """
    earlier = search.settings
    if search.data_key != data_key or (earlier.search.metric, earlier.search.mode) != (
        settings.search.metric,
        settings.search.mode,
    ):
        return False
    searched = {*space.names, *space.constants, *(earlier.search.search_space or {})}
    compared = [
        name
        for name, flag in flags().items()
        if flag.group in ("data", "model", "lora", "training") and name not in (*_IRRELEVANT, *searched)
    ]
    return all(earlier.value(name) == space.settings.value(name) for name in compared)


def parameters_of(row: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """The values of a row of `trials.parquet` that this space contains, as Optuna's parameters."""
    parameters = {}
    for name, distribution in space.distributions.items():
        if name not in row:  # the earlier search did not vary it; None is a value, as of max_pixels
            continue
        value = row[name]
        if isinstance(distribution, Categorical):
            # The table, like Optuna, stores lists as JSON.
            labels = [distribution.parameter(known) for known in distribution.values]
            if value in labels:
                parameters[name] = value
        elif distribution.contains(value):
            parameters[name] = distribution.parameter(value)
    return parameters


def is_point_of(row: Mapping[str, Any], space: Space) -> bool:
    """Whether the searched values of an earlier trial are a point of this space.

    Its options that are fixed or computed here have to have the values that they have here.

    Args:
        row: the trial's row of `trials.parquet`, of a search whose other settings equal this one's.
    """
    parameters = parameters_of(row, space)
    if len(parameters) < len(space.distributions):
        return False
    drawn = {}
    for name, distribution in space.distributions.items():
        known = distribution.values if isinstance(distribution, Categorical) else [row[name]]
        drawn[name] = next(value for value in known if distribution.parameter(value) == parameters[name])
    point = space.complete(drawn)
    for name in (column for column in row if column in flags()):
        value = point[name] if name in point else space.settings.value(name)
        if row[name] != (json.dumps(value) if isinstance(value, list | dict) else value):
            return False
    return True


def _interleave(lists: Sequence[Sequence[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The first item of each list, then the second item of each, and so on, without repeats."""
    seen: list[dict[str, Any]] = []
    for items in zip_longest(*lists):
        for item in items:
            if item is not None and item not in seen:
                seen.append(item)
                yield item
