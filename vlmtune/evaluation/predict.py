"""What `ray_jobs/predict.py` calls: answers to images or rows, written as they come, so that a killed run
goes on where it was.

OUTPUT_DIR/predict.yaml            what is answered and by what; a run with other options does not go on with
it
OUTPUT_DIR/parts/PIECE-ROW.jsonl   finished rows, the last of which is this row of this piece; each written
in one move
OUTPUT_DIR/predictions.jsonl       or .parquet: all of them, in the order of the data, when the run has ended
"""

import argparse
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from vlmtune import output, storage
from vlmtune.cluster import connect, in_ray_job
from vlmtune.config import yaml12
from vlmtune.config.settings import Settings
from vlmtune.console import SECONDS_BETWEEN_LINES, labelled
from vlmtune.data.collate import probe_pixel_format
from vlmtune.data.formats import Piece
from vlmtune.data.store import file_states
from vlmtune.errors import ConfigError
from vlmtune.evaluation.actors import ADAPTER, BASE, Job, run
from vlmtune.evaluation.adapter import adapter_files, adapter_settings, check_fit
from vlmtune.evaluation.generate import Layout
from vlmtune.evaluation.options import BASE as BASE_OPTIONS
from vlmtune.evaluation.options import NEW_TOKENS, RUN, at_least_1
from vlmtune.evaluation.options import read as read_options
from vlmtune.evaluation.questions import Asked, ImageList, pieces_of, read
from vlmtune.storage import PART, filesystem

logger = logging.getLogger(__name__)

RULES = ("image_root", "allow_outside_paths", "allow_remote_images")
ROWS_PER_PART = 256
SECONDS_PER_PART = 60.0  # at most so much work is lost
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("images", pa.list_(pa.string())),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("reference", pa.string()),
        ("error", pa.string()),
    ]
)


def predict(argv: Sequence[str], description: str) -> list[str]:
    """Run the command line, or go on with it; returns what to print.

    Raises:
        UserError: for whatever is wrong with the options, the adapter, its base, the data or the machine. A
        single row that cannot be
            answered does not raise: its reason stands in its `error`.
    """
    options, given = read_options(argv, description, (*BASE_OPTIONS, "data_path", *RULES, *RUN), _add_options)
    if "data_path" not in given:
        raise ConfigError(
            "--data_path is missing: give a folder of images with --question, or a file or folder of rows"
        )
    settings = output.located(adapter_settings(options.adapter, given))
    folder = output.place(settings.run.output_dir, in_job=in_ray_job())
    pieces = pieces_of(given["data_path"], options.question, **{name: settings.value(name) for name in RULES})
    identity = _identity(options, settings, pieces)
    start = _start(folder, identity, overwrite=settings.run.overwrite)
    check_fit(settings, options.adapter)
    cluster = connect()
    processor: Any = settings.model.ref.processor()
    pad = processor.tokenizer.pad_token_id
    pixels = probe_pixel_format(processor)
    adapters = {} if options.base_only else {ADAPTER: adapter_files(options.adapter)}
    job = Job(
        settings.to_flags(),
        adapters,
        (BASE if options.base_only else ADAPTER,),
        Layout(pixels, processor.tokenizer.eos_token_id if pad is None else pad),
        options.max_new_tokens,
        likely=False,
    )

    def read_piece(item: dict[str, Any]) -> Iterator[dict[str, bytes]]:
        return read(pieces[item["piece"]], item["piece"], item["after"], settings.model.ref, pixels.raw)

    first, after = start or (0, 0)
    items = [{"piece": index, "after": after if index == first else 0} for index in range(first, len(pieces))]
    if start is None:
        output.claim(folder, overwrite=settings.run.overwrite, kind=output.PREDICTION)
        storage.write_text(f"{folder}/predict.yaml", yaml12.dump(identity))
    else:
        logger.info(labelled("", "going on with what is there"))
    images = sum(len(piece.paths) for piece in pieces if isinstance(piece, ImageList)) or None
    _write_parts(folder, run(job, items, read_piece, cluster, rows=images), job.models[0])
    rows, errors, path = _join_parts(folder, options.format)
    said = f"; {errors} could not be answered, see their error" if errors else ""
    return [labelled("Answers", f"{path}: {rows} rows{said}")]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--question", help="Asked about every image of --data_path, a folder of images.")
    parser.add_argument(
        "--base_only",
        "--base-only",
        action="store_true",
        help="Let the base model answer, without the adapter.",
    )
    parser.add_argument(
        "--format",
        choices=("jsonl", "parquet"),
        default="jsonl",
        help="File that the answers are written to.",
    )
    parser.add_argument(
        "--max_new_tokens",
        "--max-new-tokens",
        type=at_least_1,
        default=NEW_TOKENS,
        help="Longest answer in tokens.",
    )


def _identity(
    options: argparse.Namespace, settings: Settings, pieces: Sequence[Piece | ImageList]
) -> dict[str, Any]:
    """All that the answers depend on."""
    files = sorted(
        {
            path
            for piece in pieces
            for path in (piece.paths if isinstance(piece, ImageList) else (piece.path,))
        }
    )
    weights = {} if options.base_only else adapter_files(options.adapter)
    return {
        "data_path": settings.data.data_path,
        "question": options.question,
        "adapter": None if options.base_only else options.adapter,
        "max_new_tokens": options.max_new_tokens,
        **{name: settings.value(name) for name in BASE_OPTIONS},
        "weights": _digest(*weights.values()),
        "data": _digest(
            json.dumps([[asdict(piece) for piece in pieces], file_states(files)], default=str).encode()
        ),
    }


def _digest(*contents: bytes) -> str:
    return hashlib.blake2b(b"\0".join(contents), digest_size=12).hexdigest()


def _start(folder: str, identity: dict[str, Any], *, overwrite: bool) -> tuple[int, int] | None:
    """The (piece, row) to go on with, after the last finished one of a run with the same identity; None for
    a new run.

    Raises:
        ConfigError: the folder holds finished predictions, those of another run, or other things, and
        `overwrite` is not set.
    """
    ended = any(storage.exists(f"{folder}/predictions.{form}") for form in ("jsonl", "parquet"))
    if overwrite or ended or not storage.exists(f"{folder}/predict.yaml"):
        output.check_free(folder, overwrite=overwrite, kind=output.PREDICTION)
        return None
    before = yaml12.load_value(storage.read_text(f"{folder}/predict.yaml"))
    if changed := [name for name, value in identity.items() if before.get(name) != value]:
        raise ConfigError(
            f"--output_dir {folder}: holds predictions that were begun with another {changed[0]}; choose another folder, or replace them "
            "with --overwrite"
        )
    done = [
        tuple(int(part) for part in path.rpartition("/")[2].removesuffix(".jsonl").split("-"))
        for path in _parts(folder)
    ]
    piece, row = max(done, default=(0, -1))
    return piece, row + 1


def _parts(folder: str) -> list[str]:
    """The finished parts, in the order of their rows."""
    fs, inner = filesystem(folder)
    found = fs.get_file_info(pafs.FileSelector(f"{inner}/parts", allow_not_found=True))
    return sorted(entry.path for entry in found if entry.base_name.endswith(".jsonl"))


def _write_parts(folder: str, results: Iterator[tuple[Asked, Any]], model: str) -> None:
    lines: list[str] = []
    total, began, said = 0, 0.0, 0.0
    last: Asked | None = None

    def write() -> None:
        if last is not None and lines:
            storage.write_text(f"{folder}/parts/{last.piece:06d}-{last.number:012d}.jsonl", "".join(lines))
            lines.clear()

    for asked, result in results:
        if last is not None and (asked.piece, asked.number) <= (last.piece, last.number):
            raise RuntimeError(f"{asked.source} came after {last.source}: a run that goes on would lose rows")
        last, total = asked, total + 1
        lines.append(json.dumps(_line(asked, result, model), ensure_ascii=False) + "\n")
        now = time.monotonic()
        if total == 1:  # the models are loaded
            began = said = now
        if len(lines) >= ROWS_PER_PART or now - began >= SECONDS_PER_PART:
            write()
            began = now
        if now - said >= SECONDS_BETWEEN_LINES:
            logger.info(f"{total:,} rows answered")
            said = now
    write()


def _line(asked: Asked, result: Any, model: str) -> dict[str, Any]:
    answer = (
        {"question": None, "answer": None}
        if result is None
        else {"question": result["question"], "answer": result[model]["answer"]}
    )
    reference = result["reference"] if result is not None and asked.has_reference else None
    return {
        "source": asked.source,
        "images": asked.images,
        **answer,
        "reference": reference,
        "error": asked.error,
    }


def _join_parts(folder: str, form: str) -> tuple[int, int, str]:
    """Make one file of all parts; returns (rows, those with an error, its path). A part at a time is in
    memory."""
    path = f"{folder}/predictions.{form}"
    fs, inner = filesystem(path)
    rows = errors = 0
    with fs.open_output_stream(f"{inner}{PART}") as stream:
        table = pq.ParquetWriter(stream, SCHEMA) if form == "parquet" else None
        for part in _parts(folder):
            with fs.open_input_stream(part) as source:
                text = source.read()
            found = [json.loads(line) for line in text.splitlines()]
            rows, errors = rows + len(found), errors + sum(line["error"] is not None for line in found)
            if table is None:
                stream.write(text)
            else:
                table.write_table(pa.Table.from_pylist(found, schema=SCHEMA))
        if table is not None:
            table.close()
    fs.move(f"{inner}{PART}", inner)
    if _parts(folder):
        fs.delete_dir(f"{filesystem(folder)[1]}/parts")
    return rows, errors, path
