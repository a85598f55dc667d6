"""What the report page of a search shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlmtune.config.settings import Settings
from vlmtune.search.comparison import Comparison, NoComparison
from vlmtune.search.report.charts import ReportTrials


@dataclass(frozen=True)
class SearchReport:
    """What the report page of a search shows.

    Attributes:
        settings: settings of the best trial.
        trials: the trials and their curves.
        names: flag names of the options that vary.
        drawn: the options among `names` that are drawn, not computed from others.
        comparison: the models on test rows, or why they were not compared.
        images: thumbnails of test rows as data URIs, by row of the store.
        folder: the output folder.
        data_key: key of the prepared rows.
        counts: number of rows by split.
        gpus: number of GPUs that a trial trained on; 0 on a CPU.
        date: when the search ended.
        hardware: what it ran on, in words.
        image_names: file names of the images of test rows, by row of the store.
    """

    settings: Settings
    trials: ReportTrials
    names: Sequence[str]
    drawn: Sequence[str]
    comparison: Comparison | NoComparison
    images: Mapping[int, Sequence[str]]
    folder: str
    data_key: str
    counts: Mapping[str, int]
    gpus: int
    date: str = ""
    hardware: str = ""
    image_names: Mapping[int, Sequence[str]] = field(default_factory=dict)
