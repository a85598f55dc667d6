"""The preflight: prepare the rows that training will use, and report on them. It needs no GPU."""

from dataclasses import replace

from vlmtune import output, storage
from vlmtune.cluster import connect, in_ray_job
from vlmtune.config.settings import Settings
from vlmtune.data.cache import find_or_make_store
from vlmtune.data.samples import pick_samples
from vlmtune.data.source import DataSource
from vlmtune.output import cache_folder, located
from vlmtune.preflight.html_report import html_report
from vlmtune.preflight.memory import gpu_memory
from vlmtune.preflight.statistics import summarise
from vlmtune.preflight.summary import Summary
from vlmtune.storage import filesystem


def inspect_data(settings: Settings, output_dir: str | None) -> tuple[Summary, str]:
    """Read all rows, and write `preflight.json` and `preflight.html`.

    Args:
        output_dir: folder or URI for the two files; by default the settings' `output_dir` with `-preflight`
            behind it, because training wants its folder free.

    Returns:
        The summary, and the absolute path or URI of the folder.

    Raises:
        UserError: the data as a whole or the processor cannot be read. Bad rows do not raise: they are part
            of the report.
    """
    folder = output.place(
        output_dir or f"{settings.run.output_dir.rstrip('/')}-preflight", in_job=in_ray_job()
    )
    settings = located(settings)
    source = DataSource.from_settings(settings)
    scanned = source.scan()  # first, because starting Ray takes seconds
    connect()
    store = find_or_make_store(
        source, cache_folder(settings), size_gb=settings.data.cache_size_gb, scanned=scanned
    )
    summary = summarise(store, settings, source.model.processor().tokenizer)
    if summary.ready:
        summary = replace(summary, memory=gpu_memory(settings, store))
    fs, inner = filesystem(folder)
    fs.create_dir(inner, recursive=True)
    storage.write_json(f"{folder}/preflight.json", summary.to_dict())
    storage.write_text(f"{folder}/preflight.html", html_report(summary, pick_samples(store, scanned.pieces)))
    return summary, folder
