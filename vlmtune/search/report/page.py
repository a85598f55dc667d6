"""A search as one HTML page that opens offline: which trial won, how it was found, and answers to look at."""

import hashlib
import logging
from html import escape

from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.samples import Sample, load_samples
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.errors import UserError
from vlmtune.html_page import document, section, table
from vlmtune.output import settings_yaml
from vlmtune.search.comparison import Comparison, NoComparison
from vlmtune.search.report.answers import before_and_after, gallery, gallery_rows
from vlmtune.search.report.breakdown import breakdown_section, confusion_section, data_section
from vlmtune.search.report.report_data import SearchReport
from vlmtune.search.report.sections import (
    coordinates_section,
    curves_section,
    headline_tiles,
    history_section,
    importance_section,
    losses_section,
    slices_section,
    trade_offs_section,
    verdict,
)
from vlmtune.search.report.training_time import time_section, training_seconds
from vlmtune.search.report.trial_table import STYLE as TRIALS_STYLE
from vlmtune.search.report.trial_table import trials_section
from vlmtune.search.trial_results import COMPLETE
from vlmtune.shown_text import shown_name
from vlmtune.training.save import versions

logger = logging.getLogger(__name__)

PATH_OPTIONS = (
    *("data_path", "eval_data_path", "image_root", "model_name_or_path"),
    *("output_dir", "storage_path", "cache_dir"),
)
STYLE = """
.legend span { margin-right: 14px; white-space: nowrap; } .legend i { display: inline-block; width: 10px;
height: 10px; border-radius: 5px;
  margin-right: 5px; vertical-align: -1px; } .legend i.hollow { border: 1.5px solid var(--soft); }
.share { display: grid; grid-template-columns: minmax(112px, 1fr) 2fr 48px; gap: 10px; align-items: center;
margin: 6px 0; }
.share b { text-align: right; font-weight: 500; font-variant-numeric: tabular-nums; }
.track { background: var(--line); border-radius: 6px; height: 12px; overflow: hidden; }
.track i { display: block; background: var(--bar); height: 12px; }
.versus td:first-child { white-space: normal; line-height: 1.3; }
td.won { font-weight: 600; } td b { font-weight: 600; } td .soft { font-size: 12px; font-weight: 400; }
@media (max-width: 500px) { .versus th, .versus td { padding: 5px 0 5px 6px; font-size: 13px; } .versus
td:first-child { padding-left: 0; }
  .versus td .soft { font-size: 10.5px; } }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; }
summary { cursor: pointer; color: var(--soft); } figcaption dl { display: grid; grid-template-columns: auto
1fr; gap: 0 8px; margin: 0; }
figcaption dt { color: var(--soft); } figcaption dd { margin: 0; } .right { color: var(--good); font-weight:
600; }
.wrong { color: var(--bad); font-weight: 600; } .file { display: block; background: none; font-size: 12px; }
a { color: var(--bar); }
"""


def shown_samples(
    comparison: Comparison | NoComparison, store: Store, settings: Settings
) -> dict[int, Sample]:
    """The test rows that the page shows, with thumbnails and file names, by row of the store.

    They are read from the original data. The result is empty if that is no longer there.
    """
    if isinstance(comparison, NoComparison):
        return {}
    rows = [row.row for row in gallery_rows(comparison, settings.training.seed)]
    try:
        fragments = DataSource.from_settings(settings).scan().fragments
        samples = load_samples(store, fragments, rows)
    except UserError as error:
        logger.info(console_line("", f"no images in the report: {error}"))
        return {}
    return dict(zip(rows, samples, strict=True))


def report_page(report: SearchReport) -> str:
    """The whole page."""
    comparison, settings = report.comparison, report.settings
    metrics_table = answers = groups = confusions = data = ""
    if isinstance(comparison, Comparison):
        metrics_table = before_and_after(comparison, refit=settings.search.refit)
        answers = gallery(comparison, report.images, settings.training.seed, report.image_names)
        groups = breakdown_section(comparison, group_by=settings.data.group_by)
        confusions, data = confusion_section(comparison), data_section(comparison, dict(report.counts))
    task = ", ".join(path.rstrip("/").rpartition("/")[2] for path in settings.data.paths)
    model = settings.model.base_model.rstrip("/").rpartition("/")[2]
    title = f"Search for the best adapter: {task}, {model}"
    seconds, _, _ = training_seconds(report.trials.results)
    hours = f"{report.gpus * seconds / 3600:.2g} GPU-hours of training" if report.gpus else ""
    facts = [report.date, report.hardware, hours, _names(settings)]
    subtitle = (
        f"{escape(shown_name(settings.model.base_model))} · {escape(settings.model.base_quantization)} · "
        f"{len(report.trials.results)} trials of {escape(', '.join(report.names))}"
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft wrap">{subtitle}</p>',
        f'<p class="soft small wrap">{escape(" · ".join(filter(None, facts)))}</p>',
        verdict(report),
        headline_tiles(report),
        metrics_table,
        f'<div class="pair">{history_section(report)}{curves_section(report)}</div>',
        losses_section(report),
        trade_offs_section(report),
        slices_section(report),
        coordinates_section(report),
        f'<div class="pair">{importance_section(report)}{time_section(report)}</div>',
        groups,
        f'<div class="pair">{confusions}{data}</div>' if data else "",
        answers,
        trials_section(report),
        repeat_section(report),
    ]
    return document(title, body, style=STYLE + TRIALS_STYLE)


def repeat_section(report: SearchReport) -> str:
    """Commands that repeat the best trial, and everything that its result depends on."""
    settings, best = report.settings, f"{shown_name(report.folder)}/best"
    train = f"python ray_jobs/train.py --config {best}/config.yaml --output_dir NEW_FOLDER"
    evaluate = f"python ray_jobs/eval.py --adapter {best} --compare_base --output_dir NEW_FOLDER"
    commands = f"{train}    # the best adapter again\n{evaluate}    # its answers, all metrics"
    config = settings_yaml(settings)
    complete = sum(one.state == COMPLETE for one in report.trials.results)
    facts = {
        "data": f"{_names(settings)}, key {report.data_key}",
        "config": f"best/config.yaml, sha256 {hashlib.sha256(config.encode()).hexdigest()}",
        "rows": ", ".join(f"{count:,} {split}" for split, count in report.counts.items()),
        "seeds": f"{settings.training.seed}, of the split {settings.data.split_seed}",
        "trials ran": f"{settings.search.trial_runner}; {complete} to their end",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    rows = (f'<td>{name}</td><td class="text">{escape(text)}</td>' for name, text in facts.items())
    summary = "<summary>All settings of the best trial (best/config.yaml)</summary>"
    return section(
        "Repeat it",
        f"<p><pre>{escape(commands)}</pre></p>",
        table((), rows),
        f"<details>{summary}<pre>{escape(_published(settings))}</pre></details>",
    )


def _names(settings: Settings) -> str:
    """The data's names, without local paths."""
    return ", ".join(map(shown_name, settings.data.paths))


def _published(settings: Settings) -> str:
    """The settings as YAML, with names in place of local paths."""
    return settings_yaml(
        settings.replace(
            **{
                name: shown_name(value) if isinstance(value, str) else [shown_name(path) for path in value]
                for name in PATH_OPTIONS
                if (value := settings.value(name)) is not None
            }
        )
    )
