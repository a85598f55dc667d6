"""The preflight: prepare the rows that training will use, and report on them. It needs no GPU."""

from dataclasses import dataclass, replace

from vlmtune import output, storage
from vlmtune.cluster import connect, in_ray_job
from vlmtune.config.settings import Settings
from vlmtune.data.cache import find_or_make_store
from vlmtune.data.chat_template import ChatTemplate
from vlmtune.data.samples import pick_samples
from vlmtune.data.serving_prompt import serving_notes
from vlmtune.data.source import DataSource, ScannedData
from vlmtune.data.store import Store
from vlmtune.errors import DataError, writable
from vlmtune.preflight.gpu_steps import gpu_acceleration_lines
from vlmtune.preflight.html_report import html_report
from vlmtune.preflight.memory import gpu_memory
from vlmtune.preflight.statistics import summarize
from vlmtune.preflight.summary import Summary
from vlmtune.search.max_lengths import usable_max_lengths
from vlmtune.search.resolutions import (
    NAMES,
    at_resolution_of,
    check_lengths,
    prepare_resolutions,
    resolution_lines,
)
from vlmtune.search.space import Space
from vlmtune.session import cache_folder, with_absolute_paths
from vlmtune.storage import filesystem


def _with_resolutions(
    settings: Settings, store: Store, summary: Summary, scanned: ScannedData
) -> tuple[Store, Summary]:
    """The store with those of the other image resolutions that the search varies, and what they need."""
    space = settings.search.search_space or {}
    if not any(name in space for name in NAMES):
        return store, summary
    try:
        store = prepare_resolutions(settings, Space.parse(space, settings), store, scanned)
        check_lengths(settings, store)
        removed = usable_max_lengths(store.largest, space, on_long_row=settings.data.on_long_row)[1]
    except DataError as error:
        return store, replace(summary, problems=[*summary.problems, str(error)])
    notes = dict.fromkeys([*summary.notes, *removed, *resolution_lines(store)])
    return store, replace(summary, notes=list(notes))


@dataclass(frozen=True)
class InspectResult:
    """What `vlmtune.inspect` found.

    Attributes:
        summary: what is in the data, whether training can start (`summary.ready`), and if not, why
            (`summary.problems`).
        folder: absolute path or URI of the output folder.
        json_file: the summary as JSON.
        html_file: the summary as a page, with sample rows.
    """

    summary: Summary
    folder: str
    json_file: str
    html_file: str


def inspect_data(settings: Settings, output_dir: str | None) -> InspectResult:
    """Read all rows, and write `preflight.json` and `preflight.html`.

    Args:
        output_dir: folder or URI for the two files. The default is the settings' `output_dir` with
            `-preflight` appended, because training needs an empty folder.

    Raises:
        UserError: the data as a whole or the processor cannot be read. Bad rows do not raise.
    """
    folder = output.resolve_folder(
        output_dir or f"{settings.run.output_dir.rstrip('/')}-preflight", in_job=in_ray_job()
    )
    settings = with_absolute_paths(settings)
    source = DataSource.from_settings(settings)
    scanned = source.scan()  # so that faults of the data show before the seconds that Ray takes to start
    connect()
    store = find_or_make_store(
        source, cache_folder(settings), size_gb=settings.data.cache_size_gb, scanned=scanned
    )
    summary = summarize(store, settings, source.model.processor().tokenizer)
    if summary.ready:
        store, summary = _with_resolutions(settings, store, summary, scanned)
    if summary.ready:
        summary = replace(
            summary,
            memory=gpu_memory(at_resolution_of(store.largest, settings), store.largest),
            gpu_steps=gpu_acceleration_lines(settings),
            serving=serving_notes(ChatTemplate(source.model.processor()), source.model.resolution),
        )
    files, path_in_filesystem = filesystem(folder)
    result = InspectResult(summary, folder, f"{folder}/preflight.json", f"{folder}/preflight.html")
    page = html_report(summary, pick_samples(store, scanned.fragments))
    with writable(folder, "--output_dir"):
        files.create_dir(path_in_filesystem, recursive=True)
        storage.write_json(result.json_file, summary.to_dict())
        storage.write_text(result.html_file, page)
    return result
