"""A finished search in a few lines of text."""

from collections.abc import Iterator

from vlmtune.console import console_line, format_value
from vlmtune.search.comparison import Comparison, NoComparison
from vlmtune.search.first_points import proposals_text
from vlmtune.search.search_result import SearchResult
from vlmtune.search.trial_results import STATES


def search_summary(result: SearchResult) -> str:
    """What was found and where it is: labelled lines, after an empty one."""
    return "\n".join(["", *_lines(result)])


def _lines(result: SearchResult) -> Iterator[str]:
    yield console_line("Best", _best(result))
    if isinstance(result.comparison, Comparison):
        yield console_line("Test", result.comparison.summary_line())
        for line in result.comparison.verdict_lines():
            yield console_line("", line)
    elif isinstance(result.comparison, NoComparison):
        yield console_line("Test", result.comparison.reason)
    if result.confirmation is not None:
        yield console_line("Confirmed", f"{next(iter(result.objectives))} {result.confirmation}")
    values = (f"{name} {format_value(result.best_trial.values[name])}" for name in result.searched)
    yield console_line("Values", ", ".join(values))
    if len(result.objectives) > 1:
        front = (f"trial {index + 1}" for index in result.trials.index[result.trials["pareto"]])
        objectives = ", ".join(result.objectives)
        yield console_line("Front", f"{', '.join(front)}: none is better in all of {objectives}")
    states = result.trials["state"].tolist()
    counts = (f"{states.count(state)} {state.lower()}" for state in STATES if state in states)
    yield console_line("Trials", ", ".join(counts))
    yield console_line("Proposals", proposals_text(result.trials["origin"].tolist()))
    refit = ""
    if result.refit_rows is not None:
        refit = f" (trained once more on the {result.refit_rows} rows of train and eval)"
    yield console_line("Adapter", f"{result.best.folder}{refit}")
    if result.report_file is not None:
        yield console_line("Report", result.report_file)
    yield console_line("Table", result.table_file)
    yield console_line("Curves", f"tensorboard --logdir {result.curves_dir}")


def _best(result: SearchResult) -> str:
    metric = next(iter(result.objectives))
    value = format_value(result.best_trial.metrics[metric])
    others = (("baseline", result.baseline_trial), ("recipe", result.recipe_trial))
    texts = [f"{word}: {format_value(trial.metrics[metric])}" for word, trial in others if trial is not None]
    baseline = f" ({', '.join(texts)})" if texts else ""
    return f"trial {result.best_number} of {len(result.trials)}: {metric} {value}{baseline}"
