"""How the trials of a search run: packed, many over one frozen base on each GPU, or isolated, each in
training workers of its own."""

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
from vlmtune.search.space import Space
from vlmtune.search.trial import POINT, run_trial

# times that a trial's process may end early, killed for want of memory for example; it goes on where its
# slot is
PACKED_FAILURES = 3
TRIALS_WORTH_A_CPU = 8  # an engine without a GPU takes one; starting it costs ten seconds and a gigabyte


@dataclass(frozen=True)
class Runner:
    """What Tune runs as a trial, how many at once, and why so, in a few words."""

    kind: Literal["packed", "isolated"]
    trainable: Any
    at_once: int
    text: str
    notes: tuple[str, ...] = ()
    reuse_processes: bool = False
    max_failures: int = 0
    engines: tuple[Any, ...] = ()

    def close(self) -> None:
        """Give back what the trials have held between them."""
        for engine in self.engines:
            ray.kill(engine, no_restart=True)


def make_runner(settings: Settings, space: Space, store: Store, output_dir: str, cluster: Cluster) -> Runner:
    """The runner that `trial_runner` names, or with "auto" the packed one where every trial of the space can
    be trained so.

    Raises:
        ConfigError: packed is asked for, and an option of some trial keeps it from that.
        DoesNotFitError: packed, and the base does not fit in a GPU's memory.
    """
    wanted = settings.search.trial_runner
    reason = None if wanted == "isolated" else unpackable(settings, space)
    if wanted == "packed" and reason is not None:
        raise ConfigError(f"--trial_runner packed: cannot train {reason}; use --trial_runner isolated")
    if wanted == "isolated" or reason is not None:
        return isolated(settings, store, output_dir, cluster, reason)
    return packed(settings, space, store, output_dir, cluster)


def unpackable(settings: Settings, space: Space) -> str | None:
    """Which option of some trial cannot be trained packed; None if none."""
    from vlmtune.packed.packable import not_packable

    if "peak_memory" in (settings.search.metric, *(settings.search.more_metrics or ())):
        return "for peak_memory, which packed trials share"
    if settings.run.workers != 1:
        return f"num_workers {settings.run.num_workers}: all trials of a GPU share one"
    return next(
        (reason for one in _corners(settings, space) if (reason := not_packable(one)) is not None), None
    )


def isolated(
    settings: Settings, store: Store, output_dir: str, cluster: Cluster, reason: str | None
) -> Runner:
    """Each trial a Ray Train run in workers of its own."""
    search, use_cpu = settings.search, settings.run.use_cpu
    workers = settings.run.workers
    trainable = partial(
        run_trial,
        values=settings.to_flags(),
        store=store,
        output_dir=output_dir,
        workers=workers,
        use_gpu=cluster.workers_use_gpu(use_cpu),
        metric=search.metric,
        eval_steps=None if settings.training.eval_strategy == "epoch" else settings.training.eval_steps,
    )
    at_once = search.max_concurrent_trials or cluster.fitting_trials(settings.run.max_workers, use_cpu)
    because = f": packed cannot train {reason}" if reason else ""
    return Runner(
        "isolated", trainable, at_once, f"isolated, {at_once} at once, each in workers of its own{because}"
    )


def packed(settings: Settings, space: Space, store: Store, output_dir: str, cluster: Cluster) -> Runner:
    """All trials over one base on each GPU, or on the CPU."""
    from vlmtune.packed.build import trials_at_once
    from vlmtune.packed.engine_pool import start_engines
    from vlmtune.packed.packed_trial import PackedTrial

    search = settings.search
    gpu = cluster.workers_use_gpu(settings.run.use_cpu)
    each = trials_at_once(settings, store, "cuda" if gpu else "cpu")
    total = len(space) if space.is_grid else search.num_samples
    count = int(cluster.gpus) if gpu else max(1, min(int(cluster.cpus), total // TRIALS_WORTH_A_CPU))
    at_once = min(total, search.max_concurrent_trials or each * count)
    count = min(count, at_once)
    each = -(-at_once // count)
    largest = most_demanding(settings, space)
    engines, notes = start_engines(
        settings,
        store,
        count=count,
        trials=each,
        rank=largest.lora.r,
        gpu=gpu,
        largest=largest,
    )
    trainable = tune.with_parameters(
        PackedTrial, settings=settings, engines=engines, output_dir=output_dir, point_key=POINT
    )
    where = f"{count} {'GPU' if gpu else 'CPU'}{'s' if count > 1 else ''}"
    share = f", up to {each} of them" if count > 1 else ""
    text = f"packed, {at_once} at once{share} over one frozen base on {where if count == 1 else f'each of {where}'}"
    return Runner(
        "packed",
        trainable,
        at_once,
        text,
        tuple(notes),
        reuse_processes=True,
        max_failures=PACKED_FAILURES,
        engines=tuple(engines),
    )


def most_demanding(settings: Settings, space: Space) -> Settings:
    """The settings, with the values of the space's ends that ask for the most memory: what engines plan
    theirs for."""
    from vlmtune.model.lora import target_modules

    every = list(_corners(settings, space))
    lengths = [one.training.max_length for one in every if one.training.max_length is not None]
    targets = {json.dumps(one.lora.target_modules): one for one in every}
    widest = settings
    if len(targets) > 1:
        empty = settings.model.ref.outline()

        def adapted(one: Settings) -> int:
            try:
                names = target_modules(empty, one.lora.target_modules, lora_vision=one.lora.vision)
            except ModelError:  # its trial says so
                return 0
            return sum(layer.in_features + layer.out_features for layer in map(empty.get_submodule, names))

        widest = max(targets.values(), key=adapted)
    return settings.replace(
        lora_r=max(one.lora.r for one in every),
        lora_dropout=max(one.lora.dropout for one in every),
        lora_target_modules=widest.lora.target_modules,
        max_length=max(lengths) if len(lengths) == len(every) else None,
        per_device_train_batch_size=max(one.training.per_device_train_batch_size for one in every),
    )


def _corners(settings: Settings, space: Space) -> Iterator[Settings]:
    """The config's own settings and those at the ends of the space."""
    yield settings
    for values in space.corners():
        yield settings.replace(**values)
