"""A search as one HTML page that opens offline: what won and by how much first, then how it was found, then
answers to look at."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from vlmtune.config import yaml12
from vlmtune.config.settings import Settings
from vlmtune.console import format_value, labelled
from vlmtune.data.samples import load_samples
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.errors import UserError
from vlmtune.html_page import document, section, table, tiles
from vlmtune.search.compare import Comparison, shown
from vlmtune.search.report.answers import MODELS, before_and_after, chosen, difference, gallery
from vlmtune.search.report.charts import Trials, bars, history, learning_curves, slice_of, trade_off
from vlmtune.search.report.coordinates import parallel
from vlmtune.search.report.importance import importances
from vlmtune.search.results import COMPLETE, PRUNED, STATES, TrialRow, front_of
from vlmtune.training.save import repeatable, versions

logger = logging.getLogger(__name__)

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
.wrong { color: var(--bad); font-weight: 600; }
"""


@dataclass(frozen=True)
class Report:
    """All that the page tells.

    `settings`: those of the best trial; `names`: the options that vary, `drawn`: those of them that do not
    follow from others;
    `compared`: the models on the test rows, or why they were not compared; `pictures`: by row of the store,
    as data URIs; `gpus`: that a
    trial trained on, 0 on a CPU.
    """

    settings: Settings
    trials: Trials
    names: Sequence[str]
    drawn: Sequence[str]
    compared: Comparison | str
    pictures: Mapping[int, Sequence[str]]
    folder: str
    data_key: str
    counts: Mapping[str, int]
    gpus: int


def pictures_of(compared: Comparison | str, store: Store, settings: Settings) -> dict[int, list[str]]:
    """Small pictures of the rows that the page shows, from the data that the store was made of; none where
    that is gone by now."""
    rows = [] if isinstance(compared, str) else [row.row for row in chosen(compared, settings.training.seed)]
    try:
        return {
            row: sample.images
            for row, sample in zip(
                rows, load_samples(store, DataSource.from_settings(settings).scan().pieces, rows), strict=True
            )
        }
    except UserError as error:
        logger.info(labelled("", f"no pictures in the report: {error}"))
        return {}


def page(report: Report) -> str:
    """The whole page."""
    title = f"Search over {report.settings.data.data_path}"
    model = report.settings.model
    drawn = len(report.trials.rows)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft wrap">{escape(model.base_model)} · {escape(model.base_quantization)} · {drawn} trials of '
        f"{escape(', '.join(report.names))}</p>",
        _verdict(report),
        _tiles(report),
        before_and_after(report.compared, refit=report.settings.search.refit)
        if isinstance(report.compared, Comparison)
        else "",
        '<div class="pair">'
        + section("Trials", _legend(), history(report.trials))
        + _curves(report)
        + "</div>",
        _trade_offs(report),
        _slices(report),
        _parallel(report),
        '<div class="pair">' + _importance(report) + _time(report) + "</div>",
        gallery(report.compared, report.pictures, report.settings.training.seed)
        if isinstance(report.compared, Comparison)
        else "",
        _repeat(report),
    ]
    return document(title, body, style=STYLE)


def _verdict(report: Report) -> str:
    trials, compared = report.trials, report.compared
    values = ", ".join(f"{name} {format_value(trials.best.values[name])}" for name in report.names)
    lines = [
        f"The best of {len(trials.rows)} trials is number {trials.rows.index(trials.best) + 1}: {values}"
    ]
    lines.append(_searched(trials))
    better = True
    if isinstance(compared, str):
        head = lines.pop(0)
        lines.append(f"No comparison with the base: {compared}")
    else:
        name = compared.metrics[0]
        head = f"On {compared.line()}"
        lines += [
            f"{name.replace('_', ' ')} against {MODELS[other]}: {difference(name, found[name])}, a 95 % interval"
            for other, found in compared.over.items()
        ]
        if trials.best is trials.own:
            lines.append("Searching found nothing better than the config's own values")
        better = all(found[name].value >= 0 for found in compared.over.values())
    listing = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f'<div class="verdict {"ready" if better else "stop"}"><b>{escape(head)}</b><ul>{listing}</ul></div>'
    )


def _searched(trials: Trials) -> str:
    own = f", the config's own values {format_value(trials.value(trials.own))}" if trials.own else ""
    return f"{trials.metric} on the evaluation rows, which the search saw: {format_value(trials.value(trials.best))}{own}"


def _tiles(report: Report) -> str:
    rows = report.trials.rows
    boxes = []
    if isinstance(report.compared, Comparison):
        name = report.compared.metrics[0]
        boxes = [
            (shown(name, found[name].value), f"{name.replace('_', ' ')}", f"{MODELS[model]}, test rows")
            for model in MODELS
            if (found := report.compared.models.get(model))
        ]
    states = ", ".join(
        f"{count} {state.lower()}" for state in STATES if (count := sum(row.state == state for row in rows))
    )
    boxes.append((str(len(rows)), "trials", states))
    total, _, saved = seconds_of(rows)
    boxes.append((_time_text(total), "of training", f"{_time_text(saved)} saved by stopping early"))
    return tiles((escape(value), escape(name), escape(more)) for value, name, more in boxes)


def _legend() -> str:
    kinds = [("good", "best"), ("warn", "the config's own values"), ("bar", "complete")]
    dots = "".join(f'<span><i style="background:var(--{colour})"></i>{name}</span>' for colour, name in kinds)
    return f'<p class="legend soft small">{dots}<span><i class="hollow"></i>stopped early, its last value</span></p>'


def _curves(report: Report) -> str:
    curves = learning_curves(report.trials)
    return section(f"Learning: {escape(report.trials.metric)} by step", _legend(), curves) if curves else ""


def _slices(report: Report) -> str:
    if not report.names:
        return ""
    plots = "".join(f"<div>{slice_of(report.trials, name)}</div>" for name in report.names)
    note = f'<p class="soft small">{escape(report.trials.metric)} of every trial by each searched value</p>'
    return section("What each value did", note, f'<div class="pair">{plots}</div>')


def _parallel(report: Report) -> str:
    plot = parallel(report.trials, report.names)
    note = '<p class="soft small">A line for each trial, dashed where it was stopped early</p>'
    return section("All values together", note, f'<div class="scroll">{plot}</div>') if plot else ""


def _trade_offs(report: Report) -> str:
    """With several objectives: each against the metric, and the trials on the front of all."""
    trials, (metric, *more) = report.trials, report.trials.objectives
    if not more:
        return ""
    plots = "".join(f"<div>{trade_off(trials, name)}</div>" for name in more)
    rows = [
        f"<td>{trials.rows.index(row) + 1}</td>"
        + "".join(f"<td>{escape(format_value(row.metrics[name]))}</td>" for name in trials.objectives)
        + f'<td class="text">{escape(", ".join(f"{name} {format_value(row.values[name])}" for name in report.names))}</td>'
        for row in sorted(
            front_of(trials.rows, trials.objectives), key=trials.value, reverse=trials.mode == "max"
        )
    ]
    note = (
        '<p class="soft small">Trials that ran to their end. None is better than those listed in all of '
        f"{escape(', '.join(trials.objectives))}; the best adapter is the first by {escape(metric)}.</p>"
    )
    front = table(["trial", *map(escape, trials.objectives), "values"], rows)
    return section("Trade-offs", note, f'<div class="pair">{plots}</div>', front)


def _importance(report: Report) -> str:
    trials = report.trials
    found = importances(trials.rows, trials.curves, report.drawn, trials.metric, trials.mode)
    if found is None:
        return ""
    shares, of = found
    note = f'<p class="soft small">Share of each in what made trials good, by PED-ANOVA (Optuna): {escape(of)}</p>'
    return section("What mattered", note, bars(shares))


def seconds_of(rows: Sequence[TrialRow]) -> tuple[float, float, float]:
    """Seconds of training of all trials and of those stopped early, and those that the latter had left at
    their own pace."""
    total = pruned = saved = 0.0
    for row in rows:
        seconds, step, steps = (row.metrics.get(name) for name in ("seconds", "step", "max_steps"))
        if seconds is None:
            continue
        total += seconds
        if row.state == PRUNED and step and steps:
            pruned += seconds
            saved += seconds * (steps / step - 1)
    return total, pruned, saved


def on_the_clock(rows: Sequence[TrialRow]) -> float | None:
    """Seconds from the first trial's start to the last report, by Tune's clock."""
    known = [
        (row.metrics["timestamp"], row.metrics["time_total_s"])
        for row in rows
        if {"timestamp", "time_total_s"} <= row.metrics.keys()
    ]
    return max(end for end, _ in known) - min(end - seconds for end, seconds in known) if known else None


def _time(report: Report) -> str:
    rows, gpus = report.trials.rows, report.gpus
    total, pruned, saved = seconds_of(rows)
    stopped = sum(row.state == PRUNED for row in rows)

    def text(seconds: float) -> str:
        return _time_text(seconds) + (f", {gpus * seconds / 3600:.2g} GPU-hours" if gpus else "")

    lines = [
        f"<td>all {len(rows)} trials, as trained</td><td>{text(total)}</td>",
        f"<td>of it, {stopped} trials that were stopped early</td><td>{text(pruned)}</td>",
        f"<td>all trials to their end, at their own pace</td><td>{text(total + saved)}</td>",
        f"<td>saved by stopping early</td><td>{text(saved)} ({100 * saved / (total + saved) if total else 0:.0f} %)</td>",
    ]
    if (clock := on_the_clock(rows)) is not None:
        lines.append(f"<td>from the first trial's start to the last report</td><td>{_time_text(clock)}</td>")
    said = "Added over trials: those that ran side by side took less on the clock."
    if report.settings.search.trial_runner == "packed":
        said = "A packed trial's time is its share of its device, which loaded the base once for all trials."
    return section(
        "Time", f'<p class="soft small">{said}</p>', f'<div class="versus">{table((), lines)}</div>'
    )


def _time_text(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _repeat(report: Report) -> str:
    settings = report.settings
    commands = (
        f"python ray_jobs/train.py --config {report.folder}/best/config.yaml --output_dir NEW_FOLDER    # the best adapter again\n"
        f"python ray_jobs/eval.py --adapter {report.folder}/best --compare_base --output_dir NEW_FOLDER    # its answers, all metrics"
    )
    dumped = yaml12.dump(repeatable(settings).to_flags())
    facts = {
        "data": f"{settings.data.data_path}, key {report.data_key}",
        "config": f"best/config.yaml, sha256 {hashlib.sha256(dumped.encode()).hexdigest()}",
        "rows": ", ".join(f"{count:,} {split}" for split, count in report.counts.items()),
        "seed": str(settings.training.seed),
        "trials ran": f"{settings.search.trial_runner}; {sum(row.state == COMPLETE for row in report.trials.rows)} to their end",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    rows = (f'<td>{name}</td><td class="text">{escape(text)}</td>' for name, text in facts.items())
    return section(
        "Repeat it",
        f"<p><pre>{escape(commands)}</pre></p>",
        table((), rows),
        f"<details><summary>All settings of the best trial (best/config.yaml)</summary><pre>{escape(dumped)}</pre></details>",
    )
