"""Names and phrases that the preflight's page and its text share."""

from vlmtune.data.split import TEST
from vlmtune.evaluation.verdict import few_rows_warning
from vlmtune.preflight.summary import Summary

FORMAT_NAMES = {
    "frames": "frames folder",
    "jsonl": "JSONL",
    "json": "JSON",
    "parquet": "Parquet",
    "saved": "saved dataset",
    "hub": "Hub dataset",
}


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def listed(counts: dict[str, int], names: dict[str, str] | None = None) -> str:
    """`JPEG` for one entry, `JPEG 30, PNG 2` for more.

    Args:
        names: other words for the keys of `counts`.
    """
    count_of = {(names or {}).get(name, name): count for name, count in counts.items()}
    if len(count_of) == 1:
        return next(iter(count_of))
    return ", ".join(f"{name} {count:,}" for name, count in count_of.items())


def short_source(source: str, summary: Summary) -> str:
    """The source of a row without the folder that the data is in."""
    return source.removeprefix(summary.data_path.rpartition("/")[0] + "/")


def verdict_words(summary: Summary) -> str:
    """Whether training can start, and a warning if there are too few test rows to judge the result."""
    if not summary.ready:
        return "; and ".join(summary.problems)
    warning = few_rows_warning(summary.split[TEST])
    return f"ready; {warning}" if warning else "ready"
