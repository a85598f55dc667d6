"""From settings to a finished adapter: what `ray_jobs/train.py` calls, and the steps that a search shares
with it."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.util.queue import Empty, Queue

from vlmtune import output, storage
from vlmtune.background import in_background
from vlmtune.cluster import Cluster, connect, in_ray_job
from vlmtune.config import yaml12
from vlmtune.config.settings import Settings
from vlmtune.console import StepPrinter, labelled
from vlmtune.data.cache import prepare_store
from vlmtune.data.lengths import fitting_rows
from vlmtune.data.source import DataSource
from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, DataError
from vlmtune.model.base import check_model
from vlmtune.model.lora import target_modules
from vlmtune.model_ref import outline
from vlmtune.output import cache_folder, located
from vlmtune.training.launch import Outcome, Progress, run_in_process, run_on_ray
from vlmtune.training.save import repeatable, save_adapter_folder

logger = logging.getLogger(__name__)

# In an output folder, by the name of its settings' file: which prepared rows the checkpoints beside it were
# trained on.
DATA_KEYS = {"config.yaml": "checkpoints/data.json", "search.yaml": "tune/data.json"}


# Trains with settings on prepared rows, into an output folder, on a cluster; hands each logged step on.
Run = Callable[[Settings, Store, str, Cluster, Progress], Outcome]


def train_adapter(settings: Settings, runners: Mapping[str, Run] | None = None) -> str:
    """Train one adapter, or go on with an interrupted run; returns the absolute path or URI of its folder.

    Args:
        runners: how, by `trial_runner`; where it is not among them, `run_isolated`.

    Raises:
        UserError: for whatever is wrong with the settings, the data, the model or the machine, before
        anything is written.
    """
    resumed = settings.run.resume
    if resumed is not None:
        folder, settings = interrupted_run(resumed)
    else:
        folder = output_folder(settings)
        if settings.run.workers == 0 and "://" in folder:
            raise ConfigError(
                f"--output_dir {folder}: --num_workers 0 writes to a local folder; give one, or --num_workers 1"
            )
        output.check_free(folder, overwrite=settings.run.overwrite)
    settings = located(settings)
    cluster = start(settings)
    store = prepared(settings)
    if resumed is None:
        claim_for(settings, folder, store, "config.yaml")
    else:
        check_same_data(folder, store)
    run = (runners or {}).get(settings.search.trial_runner, run_isolated)
    outcome = run(settings, store, folder, cluster, StepPrinter())
    save_adapter_folder(outcome.checkpoint, folder, settings, outcome.metrics, store)
    return folder


def interrupted_run(resumed: str) -> tuple[str, Settings]:
    """The folder of the run that `--resume` names, and the settings that it was started with.

    Raises:
        ConfigError: no run is there, or one that has ended.
    """
    folder = output.place(resumed, in_job=in_ray_job(), flag="--resume")
    if not storage.exists(f"{folder}/config.yaml"):
        raise ConfigError(
            f"--resume {folder}: no run is there (config.yaml is missing); name the --output_dir of an interrupted run"
        )
    if storage.exists(f"{folder}/metrics.json"):
        raise ConfigError(f"--resume {folder}: this run has ended, nothing is left to do")
    options = yaml12.load_options(storage.read_text(f"{folder}/config.yaml"))
    if options is None:
        raise ConfigError(f"--resume {folder}: config.yaml is damaged; start a new run")
    return folder, Settings.from_flags(options)


def start(settings: Settings) -> Cluster:
    """Check model, adapter and machine, and connect to Ray."""
    config = check_model(settings.model.ref)
    check_targets(settings, config)
    cluster = connect()
    workers = settings.run.workers
    cluster.check_workers(workers if isinstance(workers, int) else workers[0], settings.run.use_cpu)
    if cluster.nodes > 1 and settings.run.storage_path is None:
        raise ConfigError(
            f"this cluster has {cluster.nodes} nodes: give --storage_path, a folder or URI that all of them can reach"
        )
    return cluster


def check_targets(settings: Settings, config: Any) -> None:
    """Find the layers that get adapters in the model's outline.

    Raises:
        ModelError: there are none.
    """
    model = outline(config, trust_remote_code=settings.model.trust_remote_code)
    target_modules(model, settings.lora.target_modules, lora_vision=settings.lora.vision)


def output_folder(settings: Settings) -> str:
    """Where the run's output goes: `output_dir`, below `storage_path` where that is given and `output_dir`
    is relative."""
    name, storage = settings.run.output_dir, settings.run.storage_path
    if storage is not None and "://" not in name and not Path(name).is_absolute():
        return f"{output.place(storage, in_job=in_ray_job(), flag='--storage_path')}/{name}"
    return output.place(name, in_job=in_ray_job())


def prepared(settings: Settings) -> Store:
    """The prepared rows of the settings' data, with a line on what they are."""
    data, source = settings.data, DataSource.from_settings(settings)
    if data.eval_data_path is None and data.eval_fraction == 0:
        raise ConfigError(
            "--eval_fraction 0 leaves no row to evaluate on: give a share of the data, or --eval_data_path"
        )
    store = prepare_store(source, cache_folder(settings), size_gb=data.cache_size_gb)
    counts = ", ".join(f"{len(store.rows_of(split))} {split}" for split in ("train", "eval", "test"))
    skipped = f"; {store.meta.bad_rows} bad rows skipped (bad_rows.jsonl)" if store.meta.bad_rows else ""
    rows = f"{store.meta.rows} rows ({counts}), up to {store.column('tokens').max()} tokens{skipped}"
    logger.info(labelled("Data", f"{data.data_path}: {rows}"))
    max_length = settings.training.max_length
    tokens = store.column("tokens")[store.rows_of(TRAIN)]
    if max_length is not None and (cut := int((tokens > max_length).sum())):
        shortened = f"{cut} of {len(tokens)} training rows are shortened to --max_length {max_length}"
        logger.info(labelled("", f"{shortened}; {tokens.max()} cuts nothing"))
    if left_out := len(store.rows_of(TRAIN)) - len(fitting_rows(store, max_length, data.on_long_row)):
        reason = f"their images do not fit --max_length {max_length}"
        logger.info(labelled("", f"{left_out} training rows left out: {reason}"))
    return store


def claim_for(settings: Settings, folder: str, store: Store, name: str) -> None:
    """Take the output folder, and write the settings, the data's key and the bad rows that were skipped into
    it."""
    output.claim(folder, overwrite=settings.run.overwrite)
    storage.write_text(f"{folder}/{name}", yaml12.dump(repeatable(settings).to_flags()))
    storage.write_json(f"{folder}/{DATA_KEYS[name]}", {"key": store.meta.key})
    if store.meta.bad_rows:
        store.copy_bad_rows(f"{folder}/bad_rows.jsonl")


def check_same_data(folder: str, store: Store, name: str = "config.yaml") -> None:
    """Raises DataError where the prepared rows are not those that the run in `folder` began with: its order
    would mean others."""
    if json.loads(storage.read_text(f"{folder}/{DATA_KEYS[name]}"))["key"] != store.meta.key:
        raise DataError(
            f"--resume {folder}: the data or the model's processor has changed since this run began; start a new run"
        )


def run_isolated(settings: Settings, store: Store, folder: str, cluster: Cluster, show: Progress) -> Outcome:
    """TRL's loop, in this process or in Ray Train workers."""
    if settings.run.workers == 0:
        return run_in_process(settings.to_flags(), store, folder, progress=show)

    def on_ray(progress: Progress) -> Outcome:
        return run_on_ray(
            settings.to_flags(),
            store,
            workers=settings.run.workers,
            use_gpu=cluster.workers_use_gpu(settings.run.use_cpu),
            storage_path=f"{folder}/checkpoints",
            name="train",
            runs_dir=f"{folder}/runs",
            progress=progress,
        )

    return watched(on_ray, show)


def watched(run: Callable[[Progress], Outcome], show: Progress) -> Outcome:
    """Run in a thread, with a progress that may be called in other processes, and show here what it is
    told."""
    logged = Queue(actor_options={"num_cpus": 0})
    outcome = in_background(lambda: run(logged.put), "run")
    while not (outcome.done() and logged.empty()):
        try:
            show(logged.get(timeout=0.5))
        except Empty:
            continue
    logged.shutdown()
    return outcome.result()
