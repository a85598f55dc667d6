"""Prepare data files with Ray Data: encode their rows into a store, once for each dataset and processor.

The driver divides the files into parts that any process can read alone (`Fragment`). Tasks on CPU workers
read a fragment's rows, tokenize and resize them, and write the store's shards themselves, so that decoded
pixels never pass through Ray's object store. The driver gets one small index line for each row.
"""

import json
import pickle
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import ceil
from typing import Any

import ray
import ray.data

from vlmtune.data.box_formats import box_format_name
from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.examples import cached_encoder, encode_row
from vlmtune.data.find_input_format import find_input_format
from vlmtune.data.find_video_format import find_video_format
from vlmtune.data.formats import read_fragment
from vlmtune.data.fragment import Fragment
from vlmtune.data.frames import NO_LABELS
from vlmtune.data.input_format import InputFormat
from vlmtune.data.prepare_splits import IndexLine, assign_splits
from vlmtune.data.ray_data import configure_ray_data, reraise_user_errors
from vlmtune.data.source import DataSource, ScannedData
from vlmtune.data.store_meta import StoreMeta
from vlmtune.data.store_writer import finish_store, write_shard
from vlmtune.data.tokenize import RowEncoder
from vlmtune.data.video_frames import check_installed
from vlmtune.errors import writable
from vlmtune.storage import parent

ROWS_PER_SHARD = 64  # under a second of work at LLaVA's image size
# A worker waits up to 0.1 s for its next task, so a task makes several shards. The first and the last tasks
# make one shard each, so that a small dataset still reaches all workers, and all end at about the same time.
SHARDS_PER_TASK = 8
SMALL_TASKS_PER_CPU = 2
MAX_LAST_SMALL_TASKS = 32  # their rows are kept in memory until the end of the data is seen
# CPUs that Ray reserves for a task. One encode task fills a CPU. What these tasks leave free is enough for
# read tasks, which mostly wait for storage.
READ_TASK_CPUS, ENCODE_TASK_CPUS = 0.1, 0.95


def make_store(source: DataSource, scanned: ScannedData, processor: Any, folder: str, key: str) -> None:
    """Write the rows into `folder`, then its index, its list of bad rows and its meta file.

    The rows are written as encoded examples or, if `source.encoded` is False, as they were read, after the
    same checks. A store is made even if its rows cannot be trained on. `StoreMeta.problem` then says why.

    Args:
        key: the key of the store in the cache, which is written into the meta file.
    """
    configure_ray_data()
    input_format = find_input_format(processor)
    if source.video_frames is not None:
        check_installed()
        input_format = find_video_format(processor, input_format)
    box_format = box_format_name(source.model, source.box_format)
    lines = _PrepareStages(source, scanned.fragments, folder, key, input_format, box_format).run()
    mark_clashes(lines)
    good = [line for line in lines if line["error"] is None]
    bad = [line for line in lines if line["error"] is not None]
    problem = assign_splits(source, good, scanned)
    pad_token_id = processor.tokenizer.pad_token_id
    meta = StoreMeta(
        key=key,
        input_format=input_format,
        pad_token_id=processor.tokenizer.eos_token_id if pad_token_id is None else pad_token_id,
        rows=len(good),
        bad_rows=len(bad),
        problem=problem,
        unlabelled=sum(line["error"] == NO_LABELS for line in bad),
        unused=_count_unused(good, scanned.fragments),
        reading_notes=_count_reading_notes(good, scanned.fragments),
        encoded=source.encoded,
        box_format=box_format,
        video_frames=source.video_frames if any(line["videos"] for line in good) else None,
        source_fragments=list(scanned.source_fragments),
    )
    with writable(parent(folder), "--cache_dir"):
        finish_store(folder, good, bad, meta)


@dataclass(frozen=True)
class _PrepareStages:
    """The two Ray Data stages, read and encode; pickled into their tasks."""

    source: DataSource
    fragments: Sequence[Fragment]
    folder: str
    key: str
    input_format: InputFormat
    box_format: str

    def run(self) -> list[IndexLine]:
        """Write all shards and return the index lines of all rows, bad ones too, in the order of the data."""
        small_tasks = SMALL_TASKS_PER_CPU * int(ray.cluster_resources().get("CPU", 1))
        share = ceil(small_tasks / len(self.fragments))
        items = [{"fragment": index, "small_tasks": share} for index in range(len(self.fragments))]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        # A block size of one byte makes each dict that `read` yields a task of `encode` at once.
        dataset.context.target_max_block_size = 1
        index_lines = dataset.flat_map(self.read, num_cpus=READ_TASK_CPUS).flat_map(
            self.encode, num_cpus=ENCODE_TASK_CPUS
        )
        with reraise_user_errors():
            lines = [line for row in index_lines.iter_rows() for line in json.loads(row["lines"])]
        return sorted(lines, key=lambda line: (line["fragment"], line["number"]))

    def read(self, item: dict[str, int]) -> Iterator[dict[str, Any]]:
        """The rows of one fragment, cut into encode tasks. `item["fragment"]` is its index."""
        rows = enumerate(read_fragment(self.fragments[item["fragment"]]))
        for task_rows in cut_into_tasks(rows, item["small_tasks"]):
            # Bytes, because Arrow would force the ragged messages of different rows into one shape.
            yield {"fragment": item["fragment"], "rows": pickle.dumps(task_rows)}

    def encode(self, task: dict[str, Any]) -> Iterator[dict[str, str]]:
        """Check, encode and write the rows of one task; yields their index lines as JSON."""
        source = self.source
        encoder = cached_encoder(
            source.model, self.input_format, self.key, self.box_format, source.video_frames
        )
        rows = iter(pickle.loads(task["rows"]))
        while shard_rows := list(islice(rows, ROWS_PER_SHARD)):
            lines = self._write_shard(encoder, task["fragment"], shard_rows)
            yield {"lines": json.dumps(lines, ensure_ascii=False)}

    def _write_shard(
        self, encoder: RowEncoder, fragment_index: int, rows: list[tuple[int, dict[str, Any]]]
    ) -> list[IndexLine]:
        lines: list[IndexLine] = []
        content: list[EncodedExample | dict[str, Any]] = []
        for number, row in rows:
            line, example = encode_row(encoder, row)
            lines.append(
                {
                    "fragment": fragment_index,
                    "number": number,
                    "format": self.fragments[fragment_index].format,
                    **line,
                }
            )
            if example is not None:
                content.append(example if self.source.encoded else row)  # raw rows are checked too
        if content:
            shard = f"rows-{fragment_index:05d}-{lines[0]['number']:09d}.parquet"
            with writable(parent(self.folder), "--cache_dir"):
                places = iter(write_shard(f"{self.folder}/{shard}", content))
            for line in lines:
                if line["error"] is None:
                    line["shard"], (line["row_group"], line["offset"]) = shard, next(places)
        return lines


def cut_into_tasks(rows: Iterator[Any], small_tasks: int) -> Iterator[list[Any]]:
    """Consecutive rows for each task: small tasks, then large ones, then small ones (see `SHARDS_PER_TASK`).

    Args:
        small_tasks: number of small tasks at the beginning, and at least at the end, there up to
            `MAX_LAST_SMALL_TASKS`.
    """
    shards = iter(lambda: list(islice(rows, ROWS_PER_SHARD)), [])
    yield from islice(shards, small_tasks)
    waiting: deque[list[Any]] = deque()
    last_small_tasks = min(small_tasks, MAX_LAST_SMALL_TASKS)
    for shard in shards:
        waiting.append(shard)
        if len(waiting) == last_small_tasks + SHARDS_PER_TASK:
            yield list(chain.from_iterable(waiting.popleft() for _ in range(SHARDS_PER_TASK)))
    yield from waiting


def mark_clashes(lines: Sequence[IndexLine]) -> None:
    """Mark rows as bad if several different paths in the data lead, by the file name alone, to one image."""
    references: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        for path, reference in line["found_by_name"].items():
            references[path].add(reference)
    for line in lines:
        for path, reference in line["found_by_name"].items():
            if len(references[path]) > 1:
                others = sorted(references[path] - {reference})
                line |= {
                    "error": f"image {reference}: {others[0]} leads to the same file {path}, because both "
                    "are found by the file name alone; write full paths below --image_root",
                    "error_kind": "image: several paths end in the name of one file",
                }


def _count_unused(good: Sequence[IndexLine], fragments: Sequence[Fragment]) -> dict[str, int]:
    """The number of rows that have each unused field."""
    counts = Counter(field for line in good for field in line["unused"])
    for fragment in fragments:
        counts.update(dict(fragment.unused))
    return dict(counts)


def _count_reading_notes(good: Sequence[IndexLine], fragments: Sequence[Fragment]) -> dict[str, int]:
    """The number of rows that each note is about; 0 for a note on the data as a whole."""
    counts = Counter(note for line in good for note in line["reading_notes"])
    for fragment in fragments:
        counts.update(dict.fromkeys(fragment.reading_notes, 0))
    return dict(counts)
