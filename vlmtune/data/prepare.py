"""Ray Data: files → rows → prepared store, once per dataset and processor; and the stream of micro-batches out of it.

The driver lists pieces of the files; tasks on CPU workers read, tokenise and resize them and write the store's shards themselves, so that
pixels never cross the object store on the way in. What comes back to the driver is one small index line per row.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
import ray.data

from vlmtune.data.collate import Pixels, probe
from vlmtune.data.formats import Piece, read_piece, scan
from vlmtune.data.images import ImageError, content_hash, load_image
from vlmtune.data.paths import filesystem
from vlmtune.data.processor import load_processor
from vlmtune.data.split import EVAL, connected, split
from vlmtune.data.store import IMAGES, INDEX, Meta, Store, file_states, write_shard
from vlmtune.data.tokenize import EncodeError, Example, RowEncoder, required_length
from vlmtune.errors import DataError

ROWS_PER_TASK = 64  # rows in one encoding task and one shard: a second or two of work at LLaVA's image size
SHOWN_BAD_ROWS = 5


@dataclass(frozen=True)
class Source:
    """Which data is prepared and how; plain values. Everything here that changes a prepared row is part of the store's key."""

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

    def pieces(self) -> list[Piece]:
        """The pieces of the training data and then of the evaluation data."""
        return [piece for path in (self.data_path, self.eval_data_path) if path is not None for piece in self._scan(path)]

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
def _encoder(model: str, revision: str, trust_remote_code: bool, raw_pixels: bool) -> RowEncoder:
    """One encoder a worker process: loading a processor costs a second, a row a few milliseconds."""
    return RowEncoder(load_processor(model, revision=revision, trust_remote_code=trust_remote_code), raw_pixels=raw_pixels)


def prepare(source: Source, cache_dir: str) -> Store:
    """The prepared store of `source` under `cache_dir`: found there, or made by Ray Data and then put there in one move.

    Args:
        cache_dir: folder or URI that every worker can reach.

    A store is found by its key, and used if the image files that its rows name are as they were.

    Raises:
        DataError: bad rows with `on_bad_row="error"`, no rows at all, a split that would be empty.
        ModelError: a processor that cannot be loaded.
    """
    pieces = source.pieces()
    processor = load_processor(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)
    key = fingerprint(source, pieces, processor)
    cache, inner = filesystem(cache_dir)
    cache.create_dir(inner, recursive=True)
    found = next((folder for folder in _stores_of(cache_dir, key) if Store(folder).images_unchanged()), None)
    if found is not None:
        return Store(found)
    making = f"{cache_dir}/{key}.{uuid.uuid4().hex[:8]}.part"
    cache.create_dir(filesystem(making)[1])
    try:
        _make(source, pieces, processor, making, key)
        # Two runs that prepare the same data at once end in two names for the same rows: either is right.
        made = making.removesuffix(".part")
        cache.move(filesystem(making)[1], filesystem(made)[1])
    finally:
        if cache.get_file_info(filesystem(making)[1]).type == pafs.FileType.Directory:
            cache.delete_dir(filesystem(making)[1])
    return Store(made)


def _stores_of(cache_dir: str, key: str) -> list[str]:
    """The finished stores of this key, in name order."""
    cache, inner = filesystem(cache_dir)
    names = sorted(entry.base_name for entry in cache.get_file_info(pafs.FileSelector(inner)))
    finished = [f"{cache_dir}/{name}" for name in names if name.startswith(f"{key}.") and not name.endswith(".part")]
    return [folder for folder in finished if Store.exists(folder)]


def fingerprint(source: Source, pieces: Sequence[Piece], processor: Any) -> str:
    """The store's key: changes with a data file, the processor, its template, or an option that changes rows."""
    options = {name: value for name, value in asdict(source).items() if name not in ("model", "revision")}
    parts = {
        "format": 1,
        "options": options,
        "pieces": [asdict(piece) for piece in pieces],
        "files": file_states(sorted({piece.path for piece in pieces})),
        "processor": processor.to_json_string(),
        "template": processor.chat_template or processor.tokenizer.chat_template,
        "tokenizer": hashlib.blake2b(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def quiet_ray_data() -> None:
    """Keep row order, and leave the console to us: progress bars and plans go to Ray's log files."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _make(source: Source, pieces: Sequence[Piece], processor: Any, folder: str, key: str) -> None:
    """Encode every row into `folder` and write index and meta."""
    quiet_ray_data()
    pixels = probe(processor)

    def read(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(read_piece(pieces[item["piece"]])):
            yield {"piece": item["piece"], "number": number, "row": _pack(row)}

    def encode(batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        encoder = _encoder(source.model, source.revision, source.trust_remote_code, pixels.raw)
        lines, examples = [], []
        for piece, number, packed in zip(batch["piece"], batch["number"], batch["row"], strict=True):
            line, example = _encode_row(encoder, _unpack(packed))
            lines.append({"piece": int(piece), "number": int(number), **line})
            if example is not None:
                examples.append(example)
        if examples:
            shard = f"rows-{lines[0]['piece']:05d}-{lines[0]['number']:09d}.parquet"
            places = iter(write_shard(f"{folder}/{shard}", examples))
            for line in lines:
                if line["error"] is None:
                    line["shard"], (line["row_group"], line["offset"]) = shard, next(places)
        return {"line": [json.dumps(line, ensure_ascii=False) for line in lines]}

    rows = ray.data.from_items([{"piece": index} for index in range(len(pieces))], override_num_blocks=len(pieces)).flat_map(read)
    encoded = rows.repartition(target_num_rows_per_block=ROWS_PER_TASK).map_batches(encode, batch_size=ROWS_PER_TASK)
    lines = [json.loads(row["line"]) for row in encoded.iter_rows()]
    _finish(source, sorted(lines, key=lambda line: (line["piece"], line["number"])), processor, pixels, folder, key)


def _encode_row(encoder: RowEncoder, row: dict[str, Any]) -> tuple[dict[str, Any], Example | None]:
    """The index line of one row, and the row itself unless it is bad."""
    line: dict[str, Any] = {"source": row["source"], "error": row["error"], "shard": None, "row_group": 0, "offset": 0}
    if row["error"] is not None:
        return line, None
    try:
        images = [load_image(reference) for reference in row["images"]]
    except ImageError as error:
        names = ", ".join(reference for reference in row["images"] if isinstance(reference, str))
        return {**line, "error": f"image {names}: {error}" if names else f"image: {error}"}, None
    try:
        example = encoder.encode(row["messages"], images)
    except EncodeError as error:
        return {**line, "error": str(error)}, None
    keys = [content_hash(image) for image in images] or [_prompt_hash(row["messages"])]
    line |= {
        "keys": keys + ([f"group {row['group']}"] if row["group"] is not None else []),
        "tokens": len(example.input_ids),
        "image_tokens": example.image_tokens,
        "images": [reference for reference in row["images"] if isinstance(reference, str)],
        "answer_tokens": int((example.labels >= 0).sum()),
        "required": required_length(example),
    }
    return line, example


def _prompt_hash(messages: list[dict[str, Any]]) -> str:
    """The content of a row without images, for the split: its first question."""
    texts = [part["text"] for message in messages if message["role"] == "user" for part in message["content"] if part["type"] == "text"]
    return hashlib.blake2b(" ".join(" ".join(texts[:1]).split()).encode(), digest_size=8).hexdigest()


def _finish(source: Source, lines: list[dict[str, Any]], processor: Any, pixels: Pixels, folder: str, key: str) -> None:
    """Write the index and, last, the meta file; or refuse the data."""
    bad = [line for line in lines if line["error"] is not None]
    good = [line for line in lines if line["error"] is None]
    if bad and source.on_bad_row == "error":
        raise DataError(bad_rows_message(bad, len(lines)))
    if not good:
        raise DataError(f"{source.data_path}: no usable row" + (f"; {bad_rows_message(bad, len(lines))}" if bad else ""))
    fs, inner = filesystem(folder)
    if bad:
        with fs.open_output_stream(f"{inner}/bad_rows.jsonl") as stream:
            for line in bad:
                reason = {"source": line["source"], "reason": line["error"]}
                stream.write((json.dumps(reason, ensure_ascii=False) + "\n").encode())
    groups = connected([line["keys"] for line in good])
    for line, group, side in zip(good, groups, _sides(source, good, groups), strict=True):
        line |= {"group": group, "split": side}
    images = sorted({image for line in good for image in line["images"]})
    states = [{"path": path, "state": state} for path, state in file_states(images)]
    pq.write_table(pa.Table.from_pylist(states, schema=IMAGES), f"{inner}/images.parquet", filesystem=fs)
    pq.write_table(pa.Table.from_pylist(good, schema=INDEX), f"{inner}/index.parquet", filesystem=fs)
    pad = processor.tokenizer.pad_token_id
    meta = Meta(key, pixels, processor.tokenizer.eos_token_id if pad is None else pad, len(good), len(bad))
    with fs.open_output_stream(f"{inner}/meta.json") as stream:
        stream.write(json.dumps(meta.to_dict(), indent=2).encode())


def _sides(source: Source, lines: list[dict[str, Any]], groups: list[str]) -> list[str]:
    """The split of each row. Rows of `eval_data_path` are the evaluation set; no group of theirs may be trained on."""
    first_eval = source.first_eval_piece()
    if first_eval is None:
        return split(groups, eval_fraction=source.eval_fraction, test_fraction=source.test_fraction, seed=source.seed)
    own = [index for index, line in enumerate(lines) if line["piece"] < first_eval]
    sides = split([groups[index] for index in own], eval_fraction=0.0, test_fraction=source.test_fraction, seed=source.seed)
    out = [EVAL] * len(lines)
    for index, side in zip(own, sides, strict=True):
        out[index] = side
    held_out = {group for group, side in zip(groups, out, strict=True) if side == EVAL}
    if shared := next((lines[index] for index in own if groups[index] in held_out), None):
        raise DataError(f"{shared['source']}: the same image or group is also in {source.eval_data_path}; remove it from one of them")
    return out


def bad_rows_message(bad: Sequence[dict[str, Any]], rows: int) -> str:
    """One line on the bad rows: the first few with their reasons, and how to go on without them."""
    shown = "; ".join(f"{line['source']}: {line['error']}" for line in bad[:SHOWN_BAD_ROWS])
    more = f"; and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
    return f"{shown}{more} ({len(bad)} of {rows} rows are bad; --on_bad_row skip goes on without them)"


def _pack(row: dict[str, Any]) -> bytes:
    """A row as bytes, because Arrow would force the ragged messages of different rows into one shape."""
    import pickle

    return pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL)


def _unpack(packed: bytes) -> dict[str, Any]:
    import pickle

    row: dict[str, Any] = pickle.loads(packed)
    return row
