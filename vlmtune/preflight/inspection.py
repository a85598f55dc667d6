"""The preflight: what `ray_jobs/inspect_data.py` calls. It prepares the rows that training will use, and
takes no GPU."""

from dataclasses import replace

from vlmtune import output, storage
from vlmtune.cluster import connect, in_ray_job
from vlmtune.config.settings import Settings
from vlmtune.data.cache import find_or_make_store
from vlmtune.data.samples import pick_samples
from vlmtune.data.source import DataSource
from vlmtune.output import cache_folder, located
from vlmtune.preflight.html_report import html_report
from vlmtune.preflight.summary import Summary, summarise
from vlmtune.storage import filesystem
from vlmtune.training.needs import gpu_memory


def inspect_data(settings: Settings, output_dir: str | None) -> tuple[Summary, str]:
    """Read all rows, and write `preflight.json` and `preflight.html`.

    Args:
        output_dir: folder or URI for the two files; by default beside the settings' own `output_dir`, which
        is left to training.

    Returns:
        The summary, and the absolute path or URI of the folder.

    Raises:
        UserError: the data as a whole or the processor cannot be read. Bad rows do not raise: they are what
        is told.
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
    processor = source.model.processor()
    summary = summarise(store, settings, processor.tokenizer)
    if summary.ready:
        summary = replace(summary, memory=gpu_memory(settings, store))
    fs, inner = filesystem(folder)
    fs.create_dir(inner, recursive=True)
    storage.write_json(f"{folder}/preflight.json", summary.to_dict())
    storage.write_text(f"{folder}/preflight.html", html_report(summary, pick_samples(store, scanned.pieces)))
    return summary, folder
