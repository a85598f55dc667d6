"""Open or resume a run: its output folder, its settings, the Ray cluster and the prepared rows."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune import output, storage
from vlmtune.cluster import Cluster, connect, in_ray_job
from vlmtune.config import yaml12
from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.cache import prepare_store
from vlmtune.data.chat_template import ChatTemplate
from vlmtune.data.lengths import fitting_rows
from vlmtune.data.notes import note_lines, unused_line
from vlmtune.data.serving_prompt import serving_notes
from vlmtune.data.source import DataSource
from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, DataError
from vlmtune.model.base import check_model
from vlmtune.model.lora import target_modules

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunKind:
    """The files by which a run of one command is recognised and resumed.

    Attributes:
        noun: what the run is called in messages.
        settings_file: the settings that it was started with.
        state_file: which prepared rows its checkpoints were trained on, and `state_format`.
        finished_file: written last, so that it marks a finished run.
        state_format: version of the checkpoints and of Ray Tune's state; raised when older ones cannot be
            resumed.
    """

    noun: str
    settings_file: str
    state_file: str
    finished_file: str
    state_format: int


TRAINING = RunKind(
    noun="run",
    settings_file="config.yaml",
    state_file="checkpoints/data.json",
    finished_file="metrics.json",
    state_format=1,
)
# Ray Tune pickles objects of vlmtune's classes into its state. Format 2: the nested `Settings`.
SEARCH = RunKind(
    noun="search",
    settings_file="search.yaml",
    state_file="tune/data.json",
    finished_file="trials.parquet",
    state_format=3,
)


@dataclass(frozen=True)
class Session:
    """An opened run: everything that training or a search needs before it starts.

    Attributes:
        kind: TRAINING or SEARCH.
        folder: absolute path or URI of the output folder.
        settings: with absolute paths; those of the interrupted run if `resumed`.
        resumed: whether an interrupted run is resumed.
        cluster: the Ray cluster that this process is connected to.
        store: the prepared rows.
    """

    kind: RunKind
    folder: str
    settings: Settings
    resumed: bool
    cluster: Cluster
    store: Store

    @classmethod
    def open(cls, settings: Settings, kind: RunKind, check: Callable[[Settings], object]) -> "Session":
        """Check everything that can be wrong, connect to Ray, and prepare the rows.

        The output folder is not changed, see `claim`.

        Args:
            settings: with `resume` set, the run in that folder is resumed with its own settings.
            check: raises for settings that this kind of run cannot use; called before anything expensive.

        Raises:
            UserError: something is wrong with the settings, the output folder, the model, the machine or the
                data.
        """
        resumed = settings.run.resume
        if resumed is None:
            folder = new_output_folder(settings)
        else:
            folder, settings = interrupted_run(resumed, kind)
        settings = with_absolute_paths(settings)
        check(settings)
        check_base_and_targets(settings)
        cluster = connect_for(settings)
        store = prepare_rows(settings)
        session = cls(kind, folder, settings, resumed is not None, cluster, store)
        if session.resumed:
            session._check_same_rows()
        return session

    def claim(self) -> None:
        """Take the output folder of a new run and write its settings; does nothing for a resumed run.

        Raises:
            ConfigError: the folder is not free any more, or cannot be created.
        """
        if self.resumed:
            return
        output.claim(self.folder, overwrite=self.settings.run.overwrite)
        storage.write_text(f"{self.folder}/{self.kind.settings_file}", output.settings_yaml(self.settings))
        state = {"key": self.store.meta.key, "format": self.kind.state_format}
        storage.write_json(f"{self.folder}/{self.kind.state_file}", state)
        if self.store.meta.bad_rows:
            self.store.copy_bad_rows(f"{self.folder}/bad_rows.jsonl")

    def _check_same_rows(self) -> None:
        """Raises DataError if the prepared rows changed since the run began: row numbers would be wrong."""
        state = json.loads(storage.read_text(f"{self.folder}/{self.kind.state_file}"))
        if state["key"] != self.store.meta.key:
            raise DataError(
                f"--resume {self.folder}: the data or the model's processor has changed since this "
                f"{self.kind.noun} began; start a new {self.kind.noun}"
            )


def interrupted_run(resumed: str, kind: RunKind) -> tuple[str, Settings]:
    """The folder that `--resume` names, and the settings of the interrupted run in it.

    Raises:
        ConfigError: there is no run, it has finished, or an older vlmtune started it.
    """
    noun = kind.noun
    folder = output.resolve_folder(resumed, in_job=in_ray_job(), flag="--resume")
    if not storage.exists(f"{folder}/{kind.settings_file}"):
        raise ConfigError(
            f"--resume {folder}: no {noun} is there ({kind.settings_file} is missing); name the --output_dir "
            f"of an interrupted {noun}"
        )
    if storage.exists(f"{folder}/{kind.finished_file}"):
        raise ConfigError(f"--resume {folder}: this {noun} has ended, nothing is left to do")
    options = yaml12.load_options(storage.read_text(f"{folder}/{kind.settings_file}"))
    if options is None:
        raise ConfigError(f"--resume {folder}: {kind.settings_file} is damaged; start a new {noun}")
    state = json.loads(storage.read_text(f"{folder}/{kind.state_file}"))
    if state.get("format", 1) != kind.state_format:
        raise ConfigError(
            f"--resume {folder}: this {noun} was started by an older vlmtune, whose state this one cannot "
            f"read; start a new {noun}, or resume with the version that started it"
        )
    return folder, Settings.from_flags(options)


def new_output_folder(settings: Settings) -> str:
    """The absolute path or URI of `output_dir`, which lies in `storage_path` if it is relative.

    Raises:
        ConfigError: the folder is not free, or cannot be used.
    """
    name, storage_path = settings.run.output_dir, settings.run.storage_path
    if storage_path is not None and "://" not in name and not Path(name).is_absolute():
        parent = output.resolve_folder(storage_path, in_job=in_ray_job(), flag="--storage_path")
        folder = f"{parent}/{name}"
    else:
        folder = output.resolve_folder(name, in_job=in_ray_job())
    if settings.run.workers == 0 and "://" in folder:
        raise ConfigError(
            f"--output_dir {folder}: --num_workers 0 writes to a local folder; give one, or --num_workers 1"
        )
    output.check_free(folder, overwrite=settings.run.overwrite)
    return folder


def with_absolute_paths(settings: Settings) -> Settings:
    """The settings with every existing local path made absolute, because workers run in other directories."""
    data = settings.data
    paths = {
        "model_name_or_path": settings.model.base_model,
        "eval_data_path": data.eval_data_path,
        "image_root": data.image_root,
    }
    local: dict[str, Any] = {
        name: _absolute(path) for name, path in paths.items() if path is not None and Path(path).exists()
    }
    if data.paths:
        local["data_path"] = [_absolute(path) for path in data.paths]
    return settings.replace(**local)


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path


def cache_folder(settings: Settings) -> str:
    """The folder of prepared rows, which later runs on the same data use again."""
    if settings.data.cache_dir is not None:
        return output.resolve_folder(settings.data.cache_dir, in_job=in_ray_job(), flag="--cache_dir")
    if settings.run.storage_path is not None:
        parent = output.resolve_folder(settings.run.storage_path, in_job=in_ray_job(), flag="--storage_path")
        return f"{parent}/prepared"
    return f"{os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache')}/vlmtune/prepared"


def check_base_and_targets(settings: Settings) -> None:
    """Check the base model's files and that the adapter's target modules exist, without reading weights.

    Raises:
        ModelError: the base cannot be loaded, or no layer matches.
    """
    check_model(settings.model.ref)
    outline = settings.model.ref.outline()
    target_modules(outline, settings.lora.target_modules, lora_vision=settings.lora.vision)


def connect_for(settings: Settings) -> Cluster:
    """Connect to Ray, or start it, and check that the workers of one run fit.

    Raises:
        ResourceError: there are too few GPUs or CPUs for `num_workers`.
        ConfigError: the cluster has several nodes and no `storage_path` is given.
    """
    cluster = connect()
    workers = settings.run.workers
    cluster.check_workers(workers if isinstance(workers, int) else workers[0], settings.run.use_cpu)
    if cluster.nodes > 1 and settings.run.storage_path is None:
        raise ConfigError(
            f"this cluster has {cluster.nodes} nodes: give --storage_path, a folder or URI that all of them "
            "can reach"
        )
    return cluster


def prepare_rows(settings: Settings) -> Store:
    """Prepare the rows of the settings' data, or find them in the cache, and log what they are.

    Raises:
        ConfigError: there would be no row to evaluate on.
        DataError: the data cannot be trained on.
    """
    data, source = settings.data, DataSource.from_settings(settings)
    if data.eval_data_path is None and data.eval_fraction == 0:
        raise ConfigError(
            "--eval_fraction 0 leaves no row to evaluate on: give a share of the data, or --eval_data_path"
        )
    store = prepare_store(source, cache_folder(settings), size_gb=data.cache_size_gb)
    for note in serving_notes(ChatTemplate(settings.model.ref.processor())):
        logger.info(console_line("Serving", note))
    max_length = settings.training.max_length
    counts = ", ".join(f"{len(store.rows_of(split))} {split}" for split in ("train", "eval", "test"))
    skipped = f"; {store.meta.bad_rows} bad rows skipped (bad_rows.jsonl)" if store.meta.bad_rows else ""
    longest = store.column("tokens").max()
    rows = f"{store.meta.rows} rows ({counts}), up to {longest} tokens{skipped}"
    logger.info(console_line("Data", f"{data.shown_path}: {rows}"))
    if store.meta.unused:
        logger.info(console_line("Not used", unused_line(store.meta.unused)))
    for note in note_lines(store.meta.notes):
        logger.info(console_line("Note", note))
    tokens = store.column("tokens")[store.rows_of(TRAIN)]
    if max_length is not None and (shortened := int((tokens > max_length).sum())):
        text = f"{shortened} of {len(tokens)} training rows are shortened to --max_length {max_length}"
        logger.info(console_line("", f"{text}; {tokens.max()} keeps all rows whole"))
    if left_out := len(tokens) - len(fitting_rows(store, max_length, data.on_long_row)):
        text = f"{left_out} training rows left out: their images do not fit --max_length {max_length}"
        logger.info(console_line("", text))
    return store
