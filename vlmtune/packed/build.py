"""Build the model of an engine: plan its memory for as many trials as fit, and load the frozen base."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.lengths import fitting_rows
from vlmtune.data.split import EVAL, TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import DoesNotFitError
from vlmtune.evaluation.check_step import CheckedRows, SelfCheck
from vlmtune.evaluation.try_row import try_row
from vlmtune.model.base import load_base_for
from vlmtune.model.choose_plan import halves
from vlmtune.model.memory import StepPlan
from vlmtune.model.step import AcceleratedStep
from vlmtune.model.vision_features import room_for_features
from vlmtune.packed.length_buckets import LengthBuckets, bucket_length
from vlmtune.packed.packed_batch import ROW_BUCKETS, batch_sizes, second_shape_fraction
from vlmtune.packed.packed_model import PackedModel
from vlmtune.packed.packed_result import packed_result, target_layers
from vlmtune.packed.row_features import PackedVisionFeatures
from vlmtune.training.adapted_model import adapter_config
from vlmtune.training.step_plan import can_capture, plan_step

# Tokens in a packed batch that keep the device busy. More tokens need more memory and are hardly faster.
EFFICIENT_TOKENS = {"cuda": 10240, "cpu": 2048}
MIN_TRIALS, MAX_TRIALS = 4, 16  # trials of an engine at once, if --max_concurrent_trials is not given


@dataclass(frozen=True)
class EnginePlan:
    """How an engine runs its packed batches.

    Attributes:
        step_plan: how the base is loaded, and how its steps run.
        trials: the number of trials that train at once.
        max_rows: the largest number of rows in a packed batch without a GPU. On a GPU, `step_plan` sets it.
        longest: the number of tokens of the longest row, padding included.
        train_rows: the number of rows that are trained on.
        buckets: the lengths that rows are padded to.
    """

    step_plan: StepPlan
    trials: int
    max_rows: int
    longest: int
    train_rows: int
    buckets: LengthBuckets


def build_model(
    settings: Settings,
    store: Store,
    trials: int,
    max_lora_rank: int,
    note: Callable[[str], None],
    most_demanding: Settings | None = None,
) -> tuple[PackedModel, int]:
    """Load the base of the settings on this process's device.

    Args:
        store: the prepared rows, with those of the other resolutions that trials may have.
        trials: the largest number of trials to train at once.
        max_lora_rank: the highest LoRA rank among them.
        most_demanding: settings of the trial that needs the most memory. The plan is for it if it fits.

    Returns:
        The model, and the number of trials that can train over it at once.

    Raises:
        DoesNotFitError: not even one row at a time would fit in the GPU's memory.
    """
    transformers_logging.disable_progress_bar()
    gpu = torch.cuda.is_available() and not settings.run.use_cpu
    device = torch.device("cuda" if gpu else "cpu")
    plan = _plan_largest(settings, most_demanding, store, trials, max_lora_rank, device, note)
    if plan.trials < trials:
        note(console_line("Memory", f"fits {plan.trials} of {trials} trials at once; the others wait"))
    base = load_base_for(settings, device, dequantized=plan.step_plan.dequantized)
    longest = settings.training.max_length
    usable_rows = fitting_rows(store, longest, "skip")
    try_row(base, store, usable_rows, longest)
    targets = adapter_config(settings, base)[0]
    layers = target_layers(base, targets)
    rows = CheckedRows.choose(store, usable_rows, longest, 1)
    self_check = SelfCheck.record_reference(
        settings, base, targets, rows, plan.step_plan, note, base.dtype, packed=True
    )
    if plan.step_plan.checkpointing:
        base.gradient_checkpointing_enable()
    accelerated_step = AcceleratedStep(base, plan.step_plan, note)
    features = PackedVisionFeatures(
        base,
        store.meta,
        total_rows=(plan.train_rows + len(store.rows_of(EVAL))) * len(store.resolutions),
        note=note,
        max_bytes=room_for_features(device, plan.step_plan.spare_bytes),
    )
    max_tokens = (plan.step_plan.micro_batch_size if gpu else plan.max_rows) * plan.longest
    model = PackedModel(accelerated_step, store.meta, max_tokens, plan.buckets, features)
    if gpu and can_capture(settings, packed=True) and not plan.step_plan.checkpointing:
        accelerated_step.install_capturing(model.adapters.trained_tensors)
    if self_check is not None:
        run = partial(packed_result, model, layers, self_check.initial_a, rows)
        self_check.compare_with_reference(accelerated_step.accelerations, run)
    model.adapters.start_at_rank(max_lora_rank)
    if not gpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    return model, plan.trials


def trials_at_once(settings: Settings, store: Store, device: str) -> int:
    """The number of trials that keep an engine on "cuda" or "cpu" busy.

    With more trials at once, more would start before the search has learnt from the others.
    """
    largest = store.largest
    rows = fitting_rows(largest, settings.training.max_length, "skip")
    longest = bucket_length(_longest(settings, largest, rows))
    trial_tokens = longest * settings.training.per_device_train_batch_size
    trials: int = -(-EFFICIENT_TOKENS[device] // trial_tokens)
    return min(max(trials, MIN_TRIALS), MAX_TRIALS)


def _plan_largest(
    settings: Settings,
    most_demanding: Settings | None,
    store: Store,
    trials: int,
    max_lora_rank: int,
    device: torch.device,
    note: Callable[[str], None],
) -> EnginePlan:
    """The plan for `most_demanding`; for `settings` if that trial does not fit in memory."""
    try:
        return _plan(most_demanding or settings, store, trials, max_lora_rank, device, note)
    except DoesNotFitError:
        if most_demanding is None:
            raise
    plan = _plan(settings, store, trials, settings.lora.r, device, note)
    reason = "the largest trial of the search space does not fit"
    note(console_line("", f"{reason}: trials that need more memory end as INFEASIBLE"))
    return plan


def _plan(
    settings: Settings,
    store: Store,
    trials: int,
    max_lora_rank: int,
    device: torch.device,
    note: Callable[[str], None],
) -> EnginePlan:
    """The plan for as many trials, at most `trials`, as there is memory for.

    Args:
        store: with those of the other resolutions that trials may have.

    Raises:
        DoesNotFitError: not even one row of one trial fits.
    """
    tokens = np.concatenate([one.column("tokens") for one in store.resolutions])
    store = store.at(settings.model.resolution)
    usable_rows = fitting_rows(store, settings.training.max_length, "skip")
    batch = settings.training.per_device_train_batch_size
    for count in halves(trials):
        buckets = LengthBuckets.of_rows(tokens, count * batch)
        longest = buckets(_longest(settings, store, usable_rows))
        most = min(ROW_BUCKETS[-1], max(1, EFFICIENT_TOKENS[device.type] // longest))
        sizes = batch_sizes(count * batch, most)
        load = {
            "packed_adapters": count,
            "lora_rank": max_lora_rank,
            "batch": sizes[0],
            "length": longest,
            "second_shape_fraction": second_shape_fraction(sizes[0], buckets),
        }
        try:
            step = plan_step(
                settings, store, usable_rows, 1, note, runs=settings.search.num_samples, sizes=sizes, **load
            )
        except DoesNotFitError:
            if count == 1:
                raise
        else:
            return EnginePlan(step, count, sizes[0], longest, len(usable_rows), buckets)
    raise AssertionError


def _longest(settings: Settings, store: Store, usable_rows: np.ndarray) -> int:
    """The number of tokens of the longest of `usable_rows`, after shortening to `max_length`.

    Args:
        usable_rows: indices among the training rows.
    """
    longest = int(store.column("tokens")[store.rows_of(TRAIN)[usable_rows]].max())
    limit: int | None = settings.training.max_length
    return longest if limit is None else min(longest, limit)
