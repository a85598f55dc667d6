"""Places on disk or in object storage: claimed before a run, never half-written, never somebody else's."""

import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from vlmtune.cluster import in_ray_job
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError
from vlmtune.storage import PART, absolute, filesystem, one_line, scheme

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
KNOWN = {*OURS, *FINISHED, *RESULTS.split(), *PREFLIGHT.split(), *PROCESSOR.split()}


@dataclass(frozen=True)
class Kind:
    """What a folder holds that one kind of command wrote: a file that marks it as such, those that show its
    end, and all else.

    `known` None: whatever lies beside the mark is the command's. `way_on`: how to go on with an unfinished
    one.
    """

    marks: tuple[str, ...]
    finished: tuple[str, ...]
    known: frozenset[str] | None
    way_on: str = ""


RUN = Kind(OURS, FINISHED, frozenset(KNOWN), ", or go on with it: --resume {folder}")
EVALUATION = Kind(
    ("eval.yaml",), ("metrics.json",), frozenset({"eval.yaml", "metrics.json", "predictions.parquet"})
)
PREDICTION = Kind(
    ("predict.yaml",),
    ("predictions.jsonl", "predictions.parquet"),
    frozenset({"predict.yaml", "predictions.jsonl", "predictions.parquet", "parts"}),
    ", or go on with it: without --overwrite",
)
EXPORT = Kind(("export.yaml",), ("export.yaml",), None)


def place(path: str, *, in_job: bool, flag: str = "--output_dir") -> str:
    """The path as it will be printed and handed to workers: absolute, or a URI of a file system that pyarrow
    opens.

    Raises:
        ConfigError: for a relative path inside a Ray job, whose working directory is deleted with the job,
        or for such a file system.
    """
    if not scheme(path) and in_job and not Path(path).is_absolute():
        raise ConfigError(
            f"{flag} {path}: inside a Ray job give an absolute path or a URI; the job's working directory is deleted after it"
        )
    try:
        filesystem(path)
    except (ValueError, NotImplementedError, OSError) as error:
        raise ConfigError(f"{flag} {path}: cannot be opened: {one_line(error)}") from error
    if not scheme(path):
        whole = Path(path).absolute()
        there = next(one for one in (whole, *whole.parents) if one.exists())
        if not there.is_dir():
            raise ConfigError(
                f"{flag} {path}: {'is' if there == whole else f'{there} is'} a file, not a folder"
            )
    return absolute(path)


def check_free(folder: str, *, overwrite: bool, kind: Kind = RUN) -> None:
    """Refuse a folder that a new run may not use, before anything expensive is done.

    Raises:
        ConfigError: if it holds a run and `overwrite` is not set, or things that no run of this kind wrote.
    """
    fs, inner = filesystem(folder)
    info = fs.get_file_info(inner)
    if info.type == pafs.FileType.File:
        raise ConfigError(f"--output_dir {folder}: is a file, not a folder")
    if info.type == pafs.FileType.NotFound:
        return
    names = {entry.base_name for entry in fs.get_file_info(pafs.FileSelector(inner))}
    if names and not names & set(kind.marks):
        raise ConfigError(
            f"--output_dir {folder}: is not empty and holds no run of vlmtune; choose another folder"
        )
    if foreign := sorted(
        name for name in names if kind.known is not None and name.removesuffix(PART) not in kind.known
    ):
        raise ConfigError(
            f"--output_dir {folder}: holds {foreign[0]}, which no run of vlmtune wrote; move it, or choose another folder"
        )
    if names and not overwrite:
        finished = bool(names & set(kind.finished))
        state = "holds a finished run" if finished else "holds an unfinished run"
        resume = "" if finished else kind.way_on.format(folder=folder)
        raise ConfigError(
            f"--output_dir {folder}: {state}; choose another folder, or replace it with --overwrite{resume}"
        )


def claim(folder: str, *, overwrite: bool, kind: Kind = RUN) -> None:
    """Make the folder ready and empty for a new run. Raises what `check_free` raises."""
    check_free(folder, overwrite=overwrite, kind=kind)
    fs, inner = filesystem(folder)
    try:
        fs.create_dir(inner, recursive=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be made: {one_line(error)}") from error
    fs.delete_dir_contents(inner)


def located(settings: Settings) -> Settings:
    """The settings with every local path in them made absolute: workers run in other directories, and so may
    who repeats the run."""
    paths = {"model_name_or_path": settings.model.base_model}
    paths |= {name: settings.value(name) for name in ("data_path", "eval_data_path", "image_root")}
    local = {
        name: str(Path(path).absolute())
        for name, path in paths.items()
        if path is not None and Path(path).exists()
    }
    return settings.replace(**local)


def cache_folder(settings: Settings) -> str:
    """Where prepared rows are kept, for this run and later ones on the same data."""
    if settings.data.cache_dir is not None:
        return place(settings.data.cache_dir, in_job=in_ray_job(), flag="--cache_dir")
    if settings.run.storage_path is not None:
        return f"{place(settings.run.storage_path, in_job=in_ray_job(), flag='--storage_path')}/prepared"
    return f"{os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache')}/vlmtune/prepared"
