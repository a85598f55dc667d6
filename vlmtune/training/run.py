"""From settings to a finished adapter: what `ray_jobs/train.py` calls, and the steps that a search shares with it."""

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.util.queue import Empty, Queue

from vlmtune import output, yaml12
from vlmtune.cluster import Cluster, connect, in_ray_job
from vlmtune.config import Settings
from vlmtune.console import StepPrinter, say
from vlmtune.data.prepare import Source, prepare
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError
from vlmtune.model.base import check_model
from vlmtune.training.launch import Outcome, run_in_process, run_on_ray
from vlmtune.training.save import save_adapter_folder


def train_adapter(settings: Settings) -> str:
    """Train one adapter; returns the absolute path or URI of its folder.

    Raises:
        UserError: for whatever is wrong with the settings, the data, the model or the machine, before anything is written.
    """
    settings = located(settings)
    folder = output_folder(settings)
    output.check_free(folder, overwrite=settings.data.overwrite)
    cluster = start(settings)
    store = prepared(settings)
    claim_for(settings, folder, store, "config.yaml")
    values = settings.to_dict()
    printer = StepPrinter()
    if settings.data.workers == 0:
        outcome = run_in_process(values, store, folder, progress=printer)
    else:
        outcome = _run_and_watch(settings, store, folder, cluster, printer)
    save_adapter_folder(outcome.checkpoint, folder, settings, outcome.metrics, store)
    return folder


def located(settings: Settings) -> Settings:
    """The settings with a model folder's path made absolute: workers run in other directories."""
    name = settings.model.base_model
    return settings.replace(model_name_or_path=str(Path(name).absolute())) if Path(name).is_dir() else settings


def start(settings: Settings) -> Cluster:
    """Check model and machine, and connect to Ray."""
    check_model(
        settings.model.base_model,
        revision=settings.model.model_revision,
        trust_remote_code=settings.get("trust_remote_code"),
    )
    cluster = connect()
    workers = settings.data.workers
    cluster.check_workers(workers if isinstance(workers, int) else workers[0], settings.get("use_cpu"))
    if cluster.nodes > 1 and settings.data.storage_path is None:
        raise ConfigError(f"this cluster has {cluster.nodes} nodes: give --storage_path, a folder or URI that all of them can reach")
    return cluster


def output_folder(settings: Settings) -> str:
    """Where the run's output goes: `output_dir`, below `storage_path` where that is given and `output_dir` is relative."""
    name, storage = settings.get("output_dir"), settings.data.storage_path
    if storage is not None and "://" not in name and not Path(name).is_absolute():
        return f"{output.place(storage, in_job=in_ray_job(), flag='--storage_path')}/{name}"
    return output.place(name, in_job=in_ray_job())


def cache_folder(settings: Settings) -> str:
    """Where prepared rows are kept, for this run and later ones on the same data."""
    if settings.data.storage_path is not None:
        return f"{output.place(settings.data.storage_path, in_job=in_ray_job(), flag='--storage_path')}/prepared"
    return f"{os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache')}/vlmtune/prepared"


def prepared(settings: Settings) -> Store:
    """The prepared rows of the settings' data, with a line on what they are."""
    data = settings.data
    if data.data_path is None:
        raise ConfigError("--data_path is missing: give a file, a folder or a dataset's name")
    source = Source(
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
    )
    store = prepare(source, cache_folder(settings))
    counts = ", ".join(f"{len(store.rows_of(split))} {split}" for split in ("train", "eval", "test"))
    skipped = f"; {store.meta.bad_rows} bad rows skipped (bad_rows.jsonl)" if store.meta.bad_rows else ""
    say(f"Data      {data.data_path}: {store.meta.rows} rows ({counts}), up to {store.column('tokens').max()} tokens{skipped}")
    return store


def claim_for(settings: Settings, folder: str, store: Store, name: str) -> None:
    """Take the output folder, and write the settings and the bad rows that were skipped into it."""
    output.claim(folder, overwrite=settings.data.overwrite)
    output.write_text(f"{folder}/{name}", yaml12.dump(settings.to_dict()))
    if store.meta.bad_rows:
        store.copy_bad_rows(f"{folder}/bad_rows.jsonl")


def _run_and_watch(settings: Settings, store: Store, folder: str, cluster: Cluster, show: Callable[[dict[str, float]], None]) -> Outcome:
    """Train on Ray in a thread and show here what the first worker logs."""
    logged = Queue(actor_options={"num_cpus": 0})
    done: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            outcome = run_on_ray(
                settings.to_dict(),
                store,
                workers=settings.data.workers,
                use_gpu=cluster.workers_use_gpu(settings.get("use_cpu")),
                storage_path=f"{folder}/checkpoints",
                name="train",
                runs_dir=f"{folder}/runs",
                progress=logged.put,
            )
        except BaseException as error:  # handed to the main thread, which raises it  # noqa: BLE001
            done.put(error)
        else:
            done.put(outcome)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() or not logged.empty():
        try:
            show(logged.get(timeout=0.5))
        except Empty:
            continue
    logged.shutdown()
    outcome = done.get()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome  # type: ignore[no-any-return]
