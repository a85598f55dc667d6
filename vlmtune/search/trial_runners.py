"""How the trials of a search run.

Packed trials train together over one frozen base on each GPU. Isolated trials have training workers of their
own.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
from ray import tune

from vlmtune.cluster import Cluster
from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, ModelError
from vlmtune.search.first_points import recipe_outside_space, trial_count
from vlmtune.search.isolated_trial import run_trial
from vlmtune.search.resolutions import at_resolution_of
from vlmtune.search.space import Space

# How often Ray Tune restarts a packed trial's process that died, for example because memory ran out. Its slot
# in the engine stays.
PACKED_FAILURES = 3
TRIALS_PER_CPU_ENGINE = 8  # on a CPU; to start one more engine costs ten seconds and a gigabyte


@dataclass(frozen=True)
class TrialRunner:
    """What Ray Tune runs as a trial, and how.

    Attributes:
        kind: the value of the option `trial_runner` that chooses it.
        trainable: the function or class that Tune runs.
        max_concurrent_trials: number of trials that run at the same time.
        description: how the trials run and why, for the console.
        notes: lines for the console, from engines that have started.
        reuse_actors: whether a process runs one trial after another.
        max_failures: how often Ray Tune restarts a trial's process that died.
        engines: the engine actors of packed trials.
    """

    kind: Literal["packed", "isolated"]
    trainable: Any
    max_concurrent_trials: int
    description: str
    notes: tuple[str, ...] = ()
    reuse_actors: bool = False
    max_failures: int = 0
    engines: tuple[Any, ...] = ()

    @property
    def side_by_side(self) -> int:
        """How many engines, or isolated trials, train at the same time."""
        return len(self.engines) or self.max_concurrent_trials

    def close(self) -> None:
        """End the engines, which frees their GPUs."""
        if self.engines:
            from vlmtune.packed.engine_pool import wait_for_trackers

            wait_for_trackers(self.engines)
        for engine in self.engines:
            ray.kill(engine, no_restart=True)


def make_runner(
    settings: Settings, space: Space, store: Store, output_dir: str, cluster: Cluster
) -> TrialRunner:
    """The runner that `trial_runner` names; for "auto", packed if every trial of the space can be packed.

    Raises:
        ConfigError: `trial_runner` is packed, and an option of some trial does not allow it.
        DoesNotFitError: the trials are packed, and the base does not fit in a GPU's memory.
    """
    requested = settings.search.trial_runner
    reason = None if requested == "isolated" else unpackable_reason(settings, space)
    if requested == "packed" and reason is not None:
        raise ConfigError(f"--trial_runner packed: cannot train {reason}; use --trial_runner isolated")
    if requested == "isolated" or reason is not None:
        return make_isolated_runner(settings, store, output_dir, cluster, reason)
    return make_packed_runner(settings, space, store, output_dir, cluster)


def runner_kind(settings: Settings, space: Space) -> Literal["packed", "isolated"]:
    """The kind of runner that `make_runner` would make. Starts nothing."""
    if settings.search.trial_runner != "auto":
        return settings.search.trial_runner
    return "packed" if unpackable_reason(settings, space) is None else "isolated"


def unpackable_reason(settings: Settings, space: Space) -> str | None:
    """Which option of some trial does not allow packing, in a few words; None if all do."""
    from vlmtune.packed.packable import not_packable

    if "peak_memory" in (settings.search.metric, *(settings.search.more_metrics or ())):
        return "for peak_memory, which packed trials share"
    if settings.run.workers != 1:
        return f"num_workers {settings.run.num_workers}: all trials of a GPU share one"
    reasons = map(not_packable, extreme_settings(settings, space))
    return next((reason for reason in reasons if reason is not None), None)


def make_isolated_runner(
    settings: Settings, store: Store, output_dir: str, cluster: Cluster, unpackable: str | None
) -> TrialRunner:
    """Each trial is a Ray Train run in workers of its own.

    Args:
        unpackable: why the trials are not packed, if "auto" chose so.
    """
    run, training = settings.run, settings.training
    trainable = partial(
        run_trial,
        settings=settings,
        store=store,
        output_dir=output_dir,
        workers=run.workers,
        use_gpu=cluster.workers_use_gpu(run.use_cpu),
        eval_steps=None if training.eval_strategy == "epoch" else training.eval_steps,
    )
    fitting = cluster.fitting_trials(run.max_workers, run.use_cpu)
    at_once = settings.search.max_concurrent_trials or fitting
    because = f": packed cannot train {unpackable}" if unpackable else ""
    description = f"isolated, {at_once} at once, each in workers of its own{because}"
    return TrialRunner("isolated", trainable, at_once, description)


def make_packed_runner(
    settings: Settings, space: Space, store: Store, output_dir: str, cluster: Cluster
) -> TrialRunner:
    """All trials train over one base on each GPU, or on the CPU. Starts the engines."""
    from vlmtune.packed.build import trials_at_once
    from vlmtune.packed.engine_pool import start_engines
    from vlmtune.packed.packed_trial import PackedTrial

    search = settings.search
    gpu = cluster.workers_use_gpu(settings.run.use_cpu)
    per_engine = trials_at_once(settings, store, "cuda" if gpu else "cpu")
    total = trial_count(space)
    engine_count = (
        int(cluster.gpus) if gpu else max(1, min(int(cluster.cpus), total // TRIALS_PER_CPU_ENGINE))
    )
    at_once = min(total, search.max_concurrent_trials or per_engine * engine_count)
    engine_count = min(engine_count, at_once)
    per_engine = -(-at_once // engine_count)
    most_demanding = at_resolution_of(store.largest, most_demanding_settings(settings, space))
    engines, notes = start_engines(
        settings,
        store,
        count=engine_count,
        trials=per_engine,
        max_lora_rank=most_demanding.lora.r,
        gpu=gpu,
        most_demanding=most_demanding,
    )
    trainable = tune.with_parameters(
        PackedTrial,
        settings=settings,
        engines=engines,
        output_dir=output_dir,
    )
    return TrialRunner(
        "packed",
        trainable,
        at_once,
        _packed_description(at_once, engine_count, per_engine, "GPU" if gpu else "CPU"),
        tuple(notes),
        reuse_actors=True,
        max_failures=PACKED_FAILURES,
        engines=tuple(engines),
    )


def _packed_description(at_once: int, engines: int, per_engine: int, device: str) -> str:
    if engines == 1:
        return f"packed, {at_once} at once over one frozen base on 1 {device}"
    each = f"up to {per_engine} of them over one frozen base on each of {engines} {device}s"
    return f"packed, {at_once} at once, {each}"


def most_demanding_settings(settings: Settings, space: Space) -> Settings:
    """The settings with the extreme values of the space that need the most memory, for which engines plan."""
    from vlmtune.model.lora_targets import target_modules

    extremes = list(extreme_settings(settings, space))
    lengths = [extreme.training.max_length for extreme in extremes]
    by_targets = {json.dumps(extreme.lora.target_modules): extreme for extreme in extremes}
    widest = settings
    if len(by_targets) > 1:
        meta_model = settings.model.ref.meta_model()

        def adapted_width(extreme: Settings) -> int:
            try:
                names = target_modules(
                    meta_model, extreme.lora.target_modules, lora_vision=extreme.lora.vision
                )
            except ModelError:  # its trial fails with this error
                return 0
            return sum(
                layer.in_features + layer.out_features for layer in map(meta_model.get_submodule, names)
            )

        widest = max(by_targets.values(), key=adapted_width)
    return settings.replace(
        lora_r=max(extreme.lora.r for extreme in extremes),
        lora_dropout=max(extreme.lora.dropout for extreme in extremes),
        lora_target_modules=widest.lora.target_modules,
        max_length=None if None in lengths else max(length for length in lengths if length is not None),
        per_device_train_batch_size=max(extreme.training.per_device_train_batch_size for extreme in extremes),
    )


def extreme_settings(settings: Settings, space: Space) -> Iterator[Settings]:
    """The settings of the baseline, of the recipe if it is run, and of the extreme values of the space."""
    yield settings
    if (recipe := recipe_outside_space(space)) is not None:
        yield settings.replace(**recipe)
    for values in space.corners():
        yield settings.replace(**values)
