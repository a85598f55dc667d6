"""Open or resume a run: its output folder, its settings, the Ray cluster and the prepared rows."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmtune import output, run_state
from vlmtune.cluster import Cluster, connect, in_ray_job
from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.cache import prepare_store
from vlmtune.data.chat_template import ChatTemplate
from vlmtune.data.lengths import fitting_rows
from vlmtune.data.notes import note_lines, unused_line
from vlmtune.data.serving_prompt import serving_notes
from vlmtune.data.source import DataSource
from vlmtune.data.split import NO_EVAL_ROWS, TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, DataError
from vlmtune.folder_lock import FolderLock
from vlmtune.folder_owner import check_owner
from vlmtune.model.base import check_model
from vlmtune.model.lora_targets import target_modules
from vlmtune.ray_watch import RayWatch
from vlmtune.run_state import RunKind
from vlmtune.storage import file_states
from vlmtune.trackers.check import check_services, make_experiment

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A training run or a search that is opened, with everything that it needs before it starts.

    Attributes:
        kind: TRAINING or SEARCH.
        folder: absolute path or URI of the output folder.
        settings: with absolute paths; those of the interrupted run if `resumed`.
        resumed: whether an interrupted run is resumed.
        cluster: the Ray cluster that this process is connected to.
        store: the prepared rows.
        data_files: (path, state) of every file that the rows were prepared from, where the state is type,
            size and time of the last change. `--resume` compares them.
        lock: the lock of the output folder, held until `close`.
        watch: ends the process with one line if Ray dies before `close`.
    """

    kind: RunKind
    folder: str
    settings: Settings
    resumed: bool
    cluster: Cluster
    store: Store
    data_files: list[tuple[str, str]]
    lock: FolderLock
    watch: RayWatch

    @classmethod
    def open(cls, settings: Settings, kind: RunKind, check: Callable[[Settings], object]) -> "Session":
        """Check settings, folder, model and data, connect to Ray, and prepare the rows.

        The output folder is not changed before `claim`.

        Args:
            settings: with `resume` set, the run in that folder is resumed with its own settings.
            check: a function that raises for settings that this kind of run cannot use. It is called early.

        Raises:
            UserError: something is wrong with the settings, the output folder, the model, the machine or the
                data.
        """
        resumed = settings.run.resume
        if resumed is None:
            folder = new_output_folder(settings)
        else:
            folder = output.resolve_folder(resumed, in_job=in_ray_job(), flag="--resume")
        if resumed is not None:
            run_state.check_is_there(folder, kind)  # before a lock makes the folder
            names = (kind.settings_file, kind.state_file, kind.state_file + run_state.COPY)
            check_owner(folder, "--resume", names, trusted=settings.run.trust_folder)
        lock = FolderLock(folder, "--output_dir" if resumed is None else "--resume")
        lock.acquire()
        try:
            return cls._open_locked(settings, kind, check, folder, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _open_locked(
        cls,
        settings: Settings,
        kind: RunKind,
        check: Callable[[Settings], object],
        folder: str,
        lock: FolderLock,
    ) -> "Session":
        resumed = settings.run.resume is not None
        if resumed:
            requested = with_absolute_paths(settings)
            settings = run_state.interrupted_settings(folder, kind, requested, settings.given_with_resume)
        settings = with_absolute_paths(settings)
        check(settings)
        check_services(settings.training.report_to, folder)
        check_base_and_targets(settings)
        if resumed:
            run_state.check_same_files(folder, kind, DataSource.from_settings(settings).given_paths)
        cluster = connect_for(settings)
        store, data_files = prepare_rows_and_files(settings)
        watch = RayWatch(resume_command(kind, folder) if resumed else None)
        session = cls(kind, folder, settings, resumed, cluster, store, data_files, lock, watch)
        if resumed:
            session._check_same_rows()
        watch.start()
        return session

    def close(self) -> None:
        """Stop watching Ray, and release the lock of the output folder."""
        self.watch.stop()
        self.lock.release()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def claim(self) -> None:
        """Prepare the output folder for this run: write settings and state, before training starts.

        A resumed run has its folder already. Its settings are written again, because `--resume` may have
        changed them, such as a larger `--num_samples`.

        Raises:
            ConfigError: the folder is not free any more, or cannot be created.
        """
        if not self.resumed:
            output.claim(self.folder, overwrite=self.settings.run.overwrite)
            run_state.write_files(self.folder, self.kind, self.data_files)
        run_state.write(self.folder, self.kind, self.settings, self.store.meta.key)
        make_experiment(self.settings.training.report_to, self.folder)
        self.watch.resume = resume_command(self.kind, self.folder)
        if not self.resumed and self.store.meta.bad_rows:
            self.store.copy_bad_rows(f"{self.folder}/bad_rows.jsonl")

    def finish(self) -> None:
        """Write into the run's state that it has finished; call this after its last file is written."""
        run_state.write(self.folder, self.kind, self.settings, self.store.meta.key, ended=True)

    def with_settings(self, settings: Settings) -> "Session":
        return replace(self, settings=settings)

    def _check_same_rows(self) -> None:
        """Raises DataError if the prepared rows changed since the run began: row numbers would be wrong."""
        key = run_state.read(self.folder, self.kind).get("key")
        if key != self.store.meta.key:
            raise DataError(
                f"--resume {self.folder}: the data's files are the same, but others were added, or the "
                f"model's processor has changed, since this {self.kind.noun} began; start a new "
                f"{self.kind.noun}"
            )


def resume_command(kind: RunKind, folder: str) -> str:
    """The command that resumes the run in a folder."""
    return f"python ray_jobs/{'tune' if kind is run_state.SEARCH else 'train'}.py --resume {folder}"


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
            f"--output_dir {folder}: --num_workers 0 writes to a local folder: give a local "
            "--output_dir, or --num_workers 1"
        )
    output.check_free(folder, overwrite=settings.run.overwrite)
    return folder


def with_absolute_paths(settings: Settings) -> Settings:
    """The settings with absolute paths, because workers run in other directories. URIs and names stay."""
    data = settings.data
    paths = {
        "model_name_or_path": settings.model.model_name_or_path,  # None where --resume is given alone
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
    meta_model = settings.model.ref.meta_model()
    target_modules(meta_model, settings.lora.target_modules, lora_vision=settings.lora.vision)


def connect_for(settings: Settings) -> Cluster:
    """Connect to Ray, or start it, and check that there are enough GPUs and CPUs for the workers of one run.

    Raises:
        ResourceError: there are too few GPUs or CPUs for `num_workers`.
        ConfigError: the cluster has several nodes and no `storage_path` is given.
    """
    cluster = connect().limited_to(settings.run.gpus)
    cluster.check_workers(settings.run.min_workers, settings.run.use_cpu)
    if cluster.nodes > 1 and settings.run.storage_path is None:
        raise ConfigError(
            f"this cluster has {cluster.nodes} nodes: give --storage_path, a folder or URI that all of them "
            "can reach"
        )
    return cluster


def prepare_rows(settings: Settings) -> Store:
    """The prepared rows of the settings' data. Raises as `prepare_rows_and_files`."""
    return prepare_rows_and_files(settings)[0]


def prepare_rows_and_files(settings: Settings) -> tuple[Store, list[tuple[str, str]]]:
    """Prepare the rows of the settings' data, or find them in the cache, and log a summary of them.

    Lines with the label "Serving" say what a serving program has to set so that its prompts equal those of
    training.

    Returns:
        The rows, and (path, state) of every file that they were prepared from.

    Raises:
        ConfigError: there would be no row to evaluate on.
        DataError: the data cannot be trained on.
    """
    data, source = settings.data, DataSource.from_settings(settings)
    if data.eval_data_path is None and data.eval_fraction == 0:
        raise ConfigError(NO_EVAL_ROWS)
    scanned = source.scan()
    store = prepare_store(source, cache_folder(settings), size_gb=data.cache_size_gb, scanned=scanned)
    for note in serving_notes(ChatTemplate(settings.model.ref.processor()), settings.model.resolution):
        logger.info(console_line("Serving", note))
    max_length = settings.training.max_length
    counts = ", ".join(f"{len(store.rows_of(split))} {split}" for split in ("train", "eval", "test"))
    skipped = f"; {store.meta.bad_rows} bad rows skipped (bad_rows.jsonl)" if store.meta.bad_rows else ""
    longest = store.column("tokens").max()
    rows = f"{store.meta.rows} rows ({counts}), up to {longest} tokens{skipped}"
    logger.info(console_line("Data", f"{data.shown_path}: {rows}"))
    if store.meta.unused:
        logger.info(console_line("Not used", unused_line(store.meta.unused)))
    for note in note_lines(store.meta.reading_notes):
        logger.info(console_line("Note", note))
    tokens = store.column("tokens")[store.rows_of(TRAIN)]
    if max_length is not None and (shortened := int((tokens > max_length).sum())):
        text = f"{shortened} of {len(tokens)} training rows are shortened to --max_length {max_length}"
        logger.info(console_line("", f"{text}; {tokens.max()} keeps all rows whole"))
    if left_out := len(tokens) - len(fitting_rows(store, max_length, data.on_long_row)):
        text = f"{left_out} training rows left out: their images do not fit --max_length {max_length}"
        logger.info(console_line("", text))
    files = file_states(sorted({fragment.path for fragment in scanned.fragments}))
    return store, sorted({*files, *store.image_states()})
