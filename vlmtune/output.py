"""Places on disk or in object storage: claimed before a run, never half-written, never somebody else's."""

import json
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from vlmtune.data.paths import absolute, filesystem, one_line, scheme
from vlmtune.errors import ConfigError

# Files whose presence shows that a folder was written by train.py or tune.py, and that the run in it ended.
OURS = ("config.yaml", "search.yaml")
FINISHED = ("metrics.json", "trials.parquet")
# Whatever else a run leaves there: only a folder that holds nothing but these is ever emptied.
RESULTS = "README.md adapter_config.json adapter_model.safetensors bad_rows.jsonl best checkpoints report.html runs tune"
PREFLIGHT = "preflight.html preflight.json"
PROCESSOR = (  # the names under which transformers saves a processor and its tokenizer
    "added_tokens.json additional_chat_templates chat_template.jinja chat_template.json merges.txt preprocessor_config.json "
    "processor_config.json sentencepiece.bpe.model special_tokens_map.json spiece.model tokenizer.json tokenizer.model "
    "tokenizer_config.json video_preprocessor_config.json vocab.json vocab.txt"
)
PART = ".part"  # ends the name of a file that is being written
KNOWN = {*OURS, *FINISHED, *RESULTS.split(), *PREFLIGHT.split(), *PROCESSOR.split()}


def place(path: str, *, in_job: bool, flag: str = "--output_dir") -> str:
    """The path as it will be printed and handed to workers: absolute, or a URI of a file system that pyarrow opens.

    Raises:
        ConfigError: for a relative path inside a Ray job, whose working directory is deleted with the job, or for such a file system.
    """
    if not scheme(path) and in_job and not Path(path).is_absolute():
        raise ConfigError(
            f"{flag} {path}: inside a Ray job give an absolute path or a URI; the job's working directory is deleted after it"
        )
    try:
        filesystem(path)
    except (ValueError, NotImplementedError, OSError) as error:
        raise ConfigError(f"{flag} {path}: cannot be opened: {one_line(error)}") from error
    return absolute(path)


def check_free(folder: str, *, overwrite: bool) -> None:
    """Refuse a folder that a new run may not use, before anything expensive is done.

    Raises:
        ConfigError: if it holds a run and `overwrite` is not set, or things that no run of ours wrote.
    """
    fs, inner = filesystem(folder)
    info = fs.get_file_info(inner)
    if info.type == pafs.FileType.File:
        raise ConfigError(f"--output_dir {folder}: is a file, not a folder")
    if info.type == pafs.FileType.NotFound:
        return
    names = {entry.base_name for entry in fs.get_file_info(pafs.FileSelector(inner))}
    if names and not names & set(OURS):
        raise ConfigError(f"--output_dir {folder}: is not empty and holds no run of vlmtune; choose another folder")
    if foreign := sorted(name for name in names if name.removesuffix(PART) not in KNOWN):
        raise ConfigError(f"--output_dir {folder}: holds {foreign[0]}, which no run of vlmtune wrote; move it, or choose another folder")
    if names and not overwrite:
        finished = bool(names & set(FINISHED))
        state = "holds a finished run" if finished else "holds an unfinished run"
        resume = "" if finished else f", or go on with it: --resume {folder}"
        raise ConfigError(f"--output_dir {folder}: {state}; choose another folder, or replace it with --overwrite{resume}")


def claim(folder: str, *, overwrite: bool) -> None:
    """Make the folder ready and empty for a new run. Raises what `check_free` raises."""
    check_free(folder, overwrite=overwrite)
    fs, inner = filesystem(folder)
    fs.create_dir(inner, recursive=True)
    fs.delete_dir_contents(inner)


def exists(path: str) -> bool:
    """Whether there is a file of this path or URI."""
    fs, inner = filesystem(path)
    return bool(fs.get_file_info(inner).type == pafs.FileType.File)


def read_text(path: str) -> str:
    fs, inner = filesystem(path)
    with fs.open_input_stream(inner) as stream:
        return bytes(stream.read()).decode()


def write_text(path: str, text: str) -> None:
    """Write a text file in one move: it is either there whole or not at all."""
    content = text.encode()
    fs, inner = filesystem(path)
    fs.create_dir(inner.rpartition("/")[0], recursive=True)
    with fs.open_output_stream(f"{inner}{PART}") as stream:
        stream.write(content)
    fs.move(f"{inner}{PART}", inner)


def write_json(path: str, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n")
