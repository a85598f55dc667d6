"""Ray Data: files → rows → prepared store, once per dataset and processor; and the stream of micro-batches
out of it.

The driver lists pieces of the files; tasks on CPU workers read, tokenise and resize them and write the
store's shards themselves, so that
pixels never cross the object store on the way in. What comes back to the driver is one small index line per
row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.exceptions import RayTaskError

from vlmtune.data.collate import Pixels, probe
from vlmtune.data.facts import FACTS, facts_of, kind_of
from vlmtune.data.formats import Piece, read_piece, scan
from vlmtune.data.images import ImageError, content_hash, load_image
from vlmtune.data.processor import load_processor
from vlmtune.data.split import EVAL, TRAIN, connected, split
from vlmtune.data.store import BAD_ROWS, IMAGES, INDEX, Meta, Store, file_states, write_shard
from vlmtune.data.tokenize import EncodeError, Example, RowEncoder, required_length
from vlmtune.errors import ConfigError, DataError, UserError
from vlmtune.storage import filesystem, scheme

if TYPE_CHECKING:
    from vlmtune.config.settings import Settings

ROWS_PER_SHARD = 64  # under a second of work at LLaVA's image size
# A worker waits up to 0.1 s for its next task, so a task makes several shards, but for the first ones: few
# rows still reach all workers.
SHARDS_PER_TASK = 8
SMALL_TASKS_PER_CPU = 2
# The files are read while every CPU encodes, and no more tasks encode than there are CPUs.
FEED_CPUS, ENCODE_CPUS = 0.1, 0.95


@dataclass(frozen=True)
class Source:
    """Which data is prepared and how; plain values. Everything here that changes a prepared row is part of
    the store's key.

    `encoded`: whether the store holds token ids and pixels, or, for `--no_cache`, the rows as they were
    read, to be encoded at every use.
    """

    data_path: str
    model: str
    revision: str = "main"
    trust_remote_code: bool = False
    eval_data_path: str | None = None
    image_root: str | None = None
    group_by: str | None = None
    eval_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 42
    on_bad_row: str = "error"
    allow_outside_paths: bool = False
    allow_remote_images: bool = False
    encoded: bool = True

    @classmethod
    def of(cls, settings: Settings) -> Source:
        """The source that the settings of a run name.

        Raises:
            ConfigError: they name no data.
        """
        data = settings.data
        if data.data_path is None:
            raise ConfigError("--data_path is missing: give a file, a folder or a dataset's name")
        return cls(
            data_path=data.data_path if "://" in data.data_path else str(Path(data.data_path)),
            model=settings.model.base_model,
            revision=settings.model.model_revision,
            trust_remote_code=settings.get("trust_remote_code"),
            eval_data_path=data.eval_data_path,
            image_root=data.image_root,
            group_by=data.group_by,
            eval_fraction=data.eval_fraction,
            test_fraction=data.test_fraction,
            seed=settings.get("seed"),
            on_bad_row=data.on_bad_row,
            allow_outside_paths=data.allow_outside_paths,
            allow_remote_images=data.allow_remote_images,
            encoded=not data.no_cache,
        )

    def pieces(self) -> list[Piece]:
        """The pieces of the training data and then of the evaluation data."""
        return [
            piece
            for path in (self.data_path, self.eval_data_path)
            if path is not None
            for piece in self._scan(path)
        ]

    def first_eval_piece(self) -> int | None:
        """The number of the first piece that comes from `eval_data_path`."""
        return None if self.eval_data_path is None else len(self._scan(self.data_path))

    def _scan(self, path: str) -> list[Piece]:
        return scan(
            path,
            image_root=self.image_root,
            group_by=self.group_by,
            allow_outside_paths=self.allow_outside_paths,
            allow_remote_images=self.allow_remote_images,
        )


@lru_cache(maxsize=2)
def _encoder(model: str, revision: str, trust_remote_code: bool, raw_pixels: bool, key: str) -> RowEncoder:
    """One encoder a worker process: loading a processor costs a second, a row a few milliseconds. `key`: a
    changed one is loaded again."""
    return RowEncoder(
        load_processor(model, revision=revision, trust_remote_code=trust_remote_code), raw_pixels=raw_pixels
    )


def fingerprint(source: Source, pieces: Sequence[Piece], processor: Any) -> str:
    """The store's key: changes with a data file, the processor, its template, or an option that changes
    rows."""
    options = {
        name: value
        for name, value in asdict(source).items()
        if name not in ("model", "revision", "on_bad_row")
    }
    parts = {
        "format": 3,
        "options": options,
        "pieces": [asdict(piece) for piece in pieces],
        "files": file_states(sorted({piece.path for piece in pieces})),
        "processor": processor.to_json_string(),
        "template": processor.chat_template or processor.tokenizer.chat_template,
        "tokenizer": hashlib.blake2b(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    }
    return hashlib.blake2b(
        json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=12
    ).hexdigest()


def read_examples(store: Store, rows: Sequence[int]) -> list[Example]:
    """The examples of these rows of a store, encoded now where it holds them as they were read.

    Raises:
        DataError: a row or an image of it can no longer be read.
    """
    if store.meta.encoded:
        return store.read(rows)
    encoder = _encoder(**store.meta.processor, raw_pixels=store.meta.pixels.raw, key=store.meta.key)
    examples = []
    for record in map(pickle.loads, store.records(rows)):
        line, example = _encode_row(encoder, record)
        if example is None:
            raise DataError(f"{line['source']}: {line['error']} (it could be read when the run began)")
        examples.append(example)
    return examples


def quiet_ray_data() -> None:
    """Keep row order, and leave the console to us: progress bars and plans go to Ray's log files."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # not wrapped, see `plain_task_errors`
    logging.getLogger("ray.data").setLevel(
        logging.CRITICAL
    )  # it prints the traceback of an error that it raises as well


@contextmanager
def plain_task_errors() -> Iterator[None]:
    """Around a Ray Data run: a UserError of one of its tasks is raised as it was there, one line, without
    what Ray adds to it."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise type(error.cause)(str(error.cause).partition("\n")[0]) from None
        raise


def make(source: Source, pieces: Sequence[Piece], processor: Any, folder: str, key: str) -> None:
    """Encode every row into `folder` and write index and meta."""
    quiet_ray_data()
    pixels = probe(processor)
    small_tasks = SMALL_TASKS_PER_CPU * int(ray.cluster_resources().get("CPU", 1))

    def read(item: dict[str, int]) -> Iterator[dict[str, Any]]:
        rows = enumerate(read_piece(pieces[item["piece"]]))
        for size in chain([ROWS_PER_SHARD] * small_tasks, repeat(ROWS_PER_SHARD * SHARDS_PER_TASK)):
            if not (some := list(islice(rows, size))):
                return
            # Bytes, because Arrow would force the ragged messages of different rows into one shape.
            yield {"piece": item["piece"], "rows": pickle.dumps(some)}

    def encode(task: dict[str, Any]) -> Iterator[dict[str, str]]:
        encoder = _encoder(source.model, source.revision, source.trust_remote_code, pixels.raw, key)
        rows = iter(pickle.loads(task["rows"]))
        while some := list(islice(rows, ROWS_PER_SHARD)):
            yield {"lines": json.dumps(encode_shard(encoder, task["piece"], some), ensure_ascii=False)}

    def encode_shard(
        encoder: RowEncoder, piece: int, rows: list[tuple[int, dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        kept: list[Example | bytes] = []
        for number, row in rows:
            line, example = _encode_row(encoder, row)
            lines.append({"piece": piece, "number": number, "format": pieces[piece].format, **line})
            if example is not None:
                kept.append(example if source.encoded else pickle.dumps(row))
        if kept:
            shard = f"rows-{piece:05d}-{lines[0]['number']:09d}.parquet"
            places = iter(write_shard(f"{folder}/{shard}", kept))
            for line in lines:
                if line["error"] is None:
                    line["shard"], (line["row_group"], line["offset"]) = shard, next(places)
        return lines

    numbers = [{"piece": index} for index in range(len(pieces))]
    dataset = ray.data.from_items(numbers, override_num_blocks=len(pieces))
    dataset.context.target_max_block_size = (
        1  # byte: each thing that `read` yields goes on at once, as a task of its own
    )
    encoded = dataset.flat_map(read, num_cpus=FEED_CPUS).flat_map(encode, num_cpus=ENCODE_CPUS)
    with plain_task_errors():
        lines = [line for row in encoded.iter_rows() for line in json.loads(row["lines"])]
    _finish(
        source,
        sorted(lines, key=lambda line: (line["piece"], line["number"])),
        processor,
        pixels,
        folder,
        key,
    )


def _encode_row(encoder: RowEncoder, row: dict[str, Any]) -> tuple[dict[str, Any], Example | None]:
    """The index line of one row, and the row itself unless it is bad."""
    names = [reference for reference in row["images"] if isinstance(reference, str)]
    line: dict[str, Any] = {
        "source": row["source"],
        "images": names,
        "error": None,
        "shard": None,
        "row_group": 0,
        "offset": 0,
    }
    if row["error"] is not None:
        return {**line, "error": row["error"], "kind": kind_of(row["error"])}, None
    try:
        images = [load_image(reference) for reference in row["images"]]
    except ImageError as error:
        reason = f"image {', '.join(names)}: {error}" if names else f"image: {error}"
        return {**line, "error": reason, "kind": kind_of(f"image: {error}")}, None
    try:
        example = encoder.encode(row["messages"], images)
    except EncodeError as error:
        return {**line, "error": str(error), "kind": kind_of(str(error))}, None
    hashes = [content_hash(image) for image in images]
    line |= {
        "keys": (hashes or [_prompt_hash(row["messages"])])
        + ([f"group {row['group']}"] if row["group"] is not None else []),
        "tokens": len(example.input_ids),
        "image_tokens": example.image_tokens,
        "answer_tokens": int((example.labels >= 0).sum()),
        "required": required_length(example),
        **facts_of(row["messages"], images, hashes),
    }
    return line, example


def _prompt_hash(messages: list[dict[str, Any]]) -> str:
    """The content of a row without images, for the split: its first question."""
    texts = [
        part["text"]
        for message in messages
        if message["role"] == "user"
        for part in message["content"]
        if part["type"] == "text"
    ]
    return hashlib.blake2b(" ".join(" ".join(texts[:1]).split()).encode(), digest_size=8).hexdigest()


def _finish(
    source: Source, lines: list[dict[str, Any]], processor: Any, pixels: Pixels, folder: str, key: str
) -> None:
    """Write the bad rows, the index and, last, the meta file, which also says why the good rows cannot be
    trained on, if so."""
    bad = [line for line in lines if line["error"] is not None]
    good = [line for line in lines if line["error"] is None]
    fs, inner = filesystem(folder)
    with fs.open_output_stream(f"{inner}/{BAD_ROWS}") as stream:
        for line in bad:
            reason = {"source": line["source"], "reason": line["error"], "kind": line["kind"]}
            stream.write((json.dumps(reason, ensure_ascii=False) + "\n").encode())
    groups = connected([line["keys"] for line in good])
    problem = None if good else f"{source.data_path}: no usable row"
    try:
        sides = _sides(source, good, groups) if good else []
    except DataError as error:
        sides, problem = [TRAIN] * len(good), str(error)
    for line, group, side in zip(good, groups, sides, strict=True):
        line |= {"group": group, "split": side}
    images = sorted({image for line in lines for image in line["images"]})
    states = [{"path": path, "state": state} for path, state in file_states(images)]
    # A download that failed may work the next time: `images_unchanged` never finds this state again.
    states += [
        {"path": path, "state": "not there"}
        for line in bad
        for path in line["images"]
        if scheme(path) in ("http", "https")
    ]
    for name, rows, schema in (("images", states, IMAGES), ("facts", good, FACTS), ("index", good, INDEX)):
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), f"{inner}/{name}.parquet", filesystem=fs)
    pad = processor.tokenizer.pad_token_id
    meta = Meta(
        key=key,
        pixels=pixels,
        pad_token_id=processor.tokenizer.eos_token_id if pad is None else pad,
        rows=len(good),
        bad_rows=len(bad),
        problem=problem,
        encoded=source.encoded,
        processor={
            "model": source.model,
            "revision": source.revision,
            "trust_remote_code": source.trust_remote_code,
        },
    )
    with fs.open_output_stream(f"{inner}/meta.json") as stream:
        stream.write(json.dumps(meta.to_dict(), indent=2).encode())


def _sides(source: Source, lines: list[dict[str, Any]], groups: list[str]) -> list[str]:
    """The split of each row. Rows of `eval_data_path` are the evaluation set; no group of theirs may be
    trained on."""
    first_eval = source.first_eval_piece()
    if first_eval is None:
        return split(
            groups, eval_fraction=source.eval_fraction, test_fraction=source.test_fraction, seed=source.seed
        )
    own = [index for index, line in enumerate(lines) if line["piece"] < first_eval]
    sides = split(
        [groups[index] for index in own],
        eval_fraction=0.0,
        test_fraction=source.test_fraction,
        seed=source.seed,
    )
    out = [EVAL] * len(lines)
    for index, side in zip(own, sides, strict=True):
        out[index] = side
    held_out = {group for group, side in zip(groups, out, strict=True) if side == EVAL}
    if shared := next((lines[index] for index in own if groups[index] in held_out), None):
        raise DataError(
            f"{shared['source']}: the same image or group is also in {source.eval_data_path}; remove it from one of them"
        )
    return out
