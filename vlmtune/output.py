"""Output folders, local or in object storage: checked and claimed before a run writes into them.

Only a folder that vlmtune wrote is ever emptied.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from vlmtune.config import yaml12
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.folder_lock import LOCK_FILE
from vlmtune.shown_text import redacted_values
from vlmtune.storage import PART, absolute, filesystem, one_line, scheme

# Files that identify a folder as the output of train.py or tune.py, and files that are written when the run
# ends.
RUN_MARKS = ("config.yaml", "search.yaml")
RUN_FINISHED = ("metrics.json", "trials.parquet")
# All other files that a run writes there.
RESULTS = (
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "bad_rows.jsonl", "best"),
    *(
        "checkpoints",
        "live.json",
        "live.part",
        "report.html",
        "requests",
        "runs",
        "salvaged",
        "study.journal",
    ),
    *("test_predictions.csv", "test_predictions.html", "test_predictions.parquet", "tune"),
)
PREFLIGHT = ("preflight.html", "preflight.json")
PROCESSOR = (  # the names under which transformers saves a processor and its tokenizer
    *("added_tokens.json", "additional_chat_templates", "chat_template.jinja", "chat_template.json"),
    *("merges.txt", "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model"),
    *("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt"),
)


# Options for one call only: repeating a run must neither delete existing files nor trust a folder.
FOR_ONE_CALL: dict[str, Any] = {"overwrite": False, "resume": None, "salvage": False, "trust_folder": False}

MERGED_MODEL = (
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("model-*-of-*.safetensors", "configuration_*.py", "modeling_*.py", "processing_*.py"),
    *("image_processing_*.py", "tokenization_*.py"),
)


@dataclass(frozen=True)
class FolderKind:
    """How the output folder of a command is recognized.

    Attributes:
        marks: file names, one of which is always in the folder.
        finished: file names, one of which is in the folder once the command has finished.
        known: patterns of the names of all files that the command writes; `*` stands for any characters.
        resume_hint: end of a message that says how to resume an unfinished run, with `{folder}` in it.
    """

    marks: tuple[str, ...]
    finished: tuple[str, ...]
    known: frozenset[str]
    resume_hint: str = ""


RUN = FolderKind(
    RUN_MARKS,
    RUN_FINISHED,
    frozenset({*RUN_MARKS, *RUN_FINISHED, *RESULTS, *PREFLIGHT, *PROCESSOR}),
    ", or resume it: --resume {folder}",
)
EVALUATION = FolderKind(
    ("eval.yaml",), ("metrics.json",), frozenset({"eval.yaml", "metrics.json", "predictions.parquet"})
)
PREDICTION = FolderKind(
    ("predict.yaml",),
    ("predictions.jsonl", "predictions.parquet"),
    frozenset({"predict.yaml", "predictions.jsonl", "predictions.parquet", "parts"}),
    ", or resume it: rerun the same command without --overwrite",
)
# With --merge, the folder also has the files that transformers saves, custom code of the base included.
EXPORT = FolderKind(
    ("export.yaml",),
    ("export.yaml",),
    frozenset({"export.yaml", "lora_adapter_state_dict.pt", *MERGED_MODEL, *PROCESSOR}),
)


def resolve_folder(path: str, *, in_job: bool, flag: str = "--output_dir") -> str:
    """The absolute path or URI of a folder, as it is printed and passed to workers.

    Args:
        in_job: whether this process is the entry point of a Ray job.
        flag: the option that names the path, for messages.

    Raises:
        ConfigError: the path is relative inside a Ray job, whose working directory is deleted after it; it
            names a file; or pyarrow cannot open its file system.
    """
    if not scheme(path) and in_job and not Path(path).is_absolute():
        raise ConfigError(
            f"{flag} {path}: inside a Ray job give an absolute path or a URI; the job's working directory is "
            "deleted after it"
        )
    try:
        filesystem(path)
    except (ValueError, NotImplementedError, OSError) as error:
        raise ConfigError(f"{flag} {path}: cannot be opened: {one_line(error)}") from error
    if not scheme(path):
        local = Path(path).absolute()
        existing = next(one for one in (local, *local.parents) if one.exists())
        if not existing.is_dir():
            what = "is" if existing == local else f"{existing} is"
            raise ConfigError(f"{flag} {path}: {what} a file, not a folder")
    return absolute(path)


def check_free(folder: str, *, overwrite: bool, kind: FolderKind = RUN) -> None:
    """Refuse a folder that a new run may not use, before anything expensive is done. Changes nothing.

    Raises:
        ConfigError: the folder holds a run and `overwrite` is not set, or it holds files that no command of
            this kind writes.
    """
    files, inner = filesystem(folder)
    info = files.get_file_info(inner)
    if info.type == pafs.FileType.File:
        raise ConfigError(f"--output_dir {folder}: is a file, not a folder")
    if info.type == pafs.FileType.NotFound:
        return
    names = {entry.base_name for entry in files.get_file_info(pafs.FileSelector(inner))} - {LOCK_FILE}
    if names and not names & set(kind.marks):
        raise ConfigError(
            f"--output_dir {folder}: is not empty and holds no run of vlmtune; choose another folder"
        )
    foreign = [
        name for name in names if not any(fnmatchcase(name.removesuffix(PART), known) for known in kind.known)
    ]
    if foreign:
        raise ConfigError(
            f"--output_dir {folder}: holds {min(foreign)}, which no run of vlmtune wrote; move it, or choose "
            "another folder"
        )
    if names and not overwrite:
        finished = bool(names & set(kind.finished))
        state = "holds a finished run" if finished else "holds an unfinished run"
        resume = "" if finished else kind.resume_hint.format(folder=folder)
        raise ConfigError(
            f"--output_dir {folder}: {state}; choose another folder, or replace it with --overwrite{resume}"
        )


def claim(folder: str, *, overwrite: bool, kind: FolderKind = RUN) -> None:
    """Create the folder, or empty it, for a new run. Raises what `check_free` raises."""
    check_free(folder, overwrite=overwrite, kind=kind)
    files, inner = filesystem(folder)
    try:
        files.create_dir(inner, recursive=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be made: {one_line(error)}") from error
    for entry in files.get_file_info(pafs.FileSelector(inner)):
        if entry.type == pafs.FileType.Directory:
            files.delete_dir(entry.path)
        elif entry.base_name != LOCK_FILE:
            files.delete_file(entry.path)


def dump_redacted(values: dict[str, Any]) -> str:
    """YAML without the secrets that URIs in the values may hold: the file may be published."""
    return yaml12.dump({name: redacted_values(value) for name, value in values.items()})


def settings_yaml(settings: Settings) -> str:
    """The text of `config.yaml` and `search.yaml`, which repeats a run.

    The options of FOR_ONE_CALL are left out.
    """
    return dump_redacted(settings.replace(**FOR_ONE_CALL).to_flags())
