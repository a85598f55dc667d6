"""What an engine needs before its first trial: whether these settings can be packed, the plan of its memory,
and the base made ready."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from vlmtune.config.settings import Settings
from vlmtune.console import labelled
from vlmtune.data.lengths import fitting_rows
from vlmtune.data.split import EVAL, TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, DoesNotFitError
from vlmtune.model.base import base_of
from vlmtune.model.memory import Plan, halves
from vlmtune.model.step import AcceleratedStep
from vlmtune.packed.optim import OPTIMIZERS
from vlmtune.packed.packed_model import PackedModel
from vlmtune.packed.passes import ROWS, bucket_length
from vlmtune.packed.vision_features import VisionFeatures
from vlmtune.training.needs import recordable
from vlmtune.training.setup import plan_step

# Tokens of a pass that keep the device busy; more cost memory and bring little.
GOOD_TOKENS = {"cuda": 10240, "cpu": 2048}
FEATURES = 2 * 2**30  # bytes that the pictures' features may take without a GPU
FEATURES_SHARE = 0.8  # on a GPU, of the memory that the plan leaves free
FEWEST_TRIALS, MOST_TRIALS = 4, 16  # at once in an engine, where nobody says otherwise


def not_packable(settings: Settings) -> str | None:
    """Which of the options keeps these settings from training packed, in a few words; None if none does."""
    model = settings.model
    reasons = {
        "use_dora": settings.lora.use_dora,
        "lora_modules_to_save": bool(settings.lora.modules_to_save),
        "lora_vision": settings.lora.vision,
        "llm_int8, with which a row's result depends on its neighbours": model.llm_int8,
        "fp16": bool(settings.training.fp16),
        "bf16 over a float32 base": bool(settings.training.bf16) and model.dtype == "float32",
        f"optim {settings.training.optim}": settings.training.optim not in OPTIMIZERS,
        "neftune_noise_alpha": settings.training.neftune_noise_alpha is not None,
        "gradient_checkpointing_kwargs": bool(settings.training.gradient_checkpointing_kwargs),
        "logging_nan_inf_filter": bool(settings.training.logging_nan_inf_filter),
        "eval_on_start": bool(settings.training.eval_on_start),
        f"num_workers {settings.run.num_workers}, whose number may change": isinstance(
            settings.run.workers, tuple
        ),
        "trust_remote_code, for a model whose layers are not known": bool(settings.model.trust_remote_code),
    }
    return next((reason for reason, there in reasons.items() if there), None)


def check_packable(settings: Settings) -> None:
    """Raises ConfigError for settings that cannot be trained packed."""
    if (reason := not_packable(settings)) is not None:
        raise ConfigError(f"--trial_runner packed: cannot train {reason}; use --trial_runner isolated")


@dataclass(frozen=True)
class Passes:
    """How an engine's passes are run: so many trials at once, at most `rows` rows of `longest` tokens, of
    `kept` training rows."""

    plan: Plan
    trials: int
    rows: int
    longest: int
    kept: int


def packed_model(
    settings: Settings,
    store: Store,
    trials: int,
    rank: int,
    note: Callable[[str], None],
    largest: Settings | None = None,
) -> tuple[PackedModel, int]:
    """The base of the settings on this process's device, and how many trials of at most `rank` can train
    over it at once, up to `trials`.

    Args:
        largest: what to plan the memory for, if a GPU has so much; otherwise it is planned for the settings
        themselves.

    Raises:
        DoesNotFitError: not even one row at a time would fit in the GPU's memory.
    """
    transformers_logging.disable_progress_bar()
    gpu = torch.cuda.is_available() and not settings.run.use_cpu
    device = torch.device("cuda" if gpu else "cpu")
    try:
        passes = _plan(largest or settings, store, trials, rank, device, note)
    except DoesNotFitError:
        if largest is None:
            raise
        passes = _plan(settings, store, trials, settings.lora.r, device, note)
        smaller = "and not for the largest trial of the search space"
        note(labelled("", f"{smaller}: trials that need more end as INFEASIBLE"))
    plan = passes.plan
    if passes.trials < trials:
        room = f"is there for {passes.trials} of {trials} trials at once"
        note(labelled("Memory", f"{room}; the others wait"))
    base = base_of(settings, device, resident=plan.resident)
    if plan.checkpointing:
        base.gradient_checkpointing_enable()
    step = AcceleratedStep(base, plan, note)
    every = passes.kept + len(store.rows_of(EVAL))
    features = VisionFeatures(
        base, store.meta, rows=every, limit=plan.spare * FEATURES_SHARE if gpu else FEATURES
    )
    model = PackedModel(
        step, store.meta, (plan.micro_batch if gpu else passes.rows) * passes.longest, features
    )
    if gpu and recordable(settings, packed=True) and not plan.checkpointing:
        step.capture(model.leaves)
    if not gpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    return model, passes.trials


def _plan(
    settings: Settings,
    store: Store,
    trials: int,
    rank: int,
    device: torch.device,
    note: Callable[[str], None],
) -> Passes:
    """Passes for as many trials as there is memory for.

    Raises:
        DoesNotFitError: there is none for one row of one trial.
    """
    kept = fitting_rows(store, settings.training.max_length, "skip")
    longest = bucket_length(_longest(settings, store, kept))
    for at_once in halves(trials):
        rows = min(
            ROWS[-1],
            max(
                1,
                min(
                    at_once * settings.training.per_device_train_batch_size,
                    GOOD_TOKENS[device.type] // longest,
                ),
            ),
        )
        load = {"packed": at_once, "rank": rank, "batch": rows, "length": longest}
        try:
            plan = plan_step(settings, store, kept, 1, note, runs=settings.search.num_samples, **load)
        except DoesNotFitError:
            if at_once == 1:
                raise
        else:
            return Passes(plan, at_once, rows, longest, len(kept))
    raise AssertionError


def trials_at_once(settings: Settings, store: Store, device: str) -> int:
    """How many trials keep an engine on "cuda" or "cpu" busy; more would only begin before the search has
    learnt from the others."""
    longest = bucket_length(
        _longest(settings, store, fitting_rows(store, settings.training.max_length, "skip"))
    )
    filling: int = -(-GOOD_TOKENS[device] // (longest * settings.training.per_device_train_batch_size))
    return min(max(filling, FEWEST_TRIALS), MOST_TRIALS)


def _longest(settings: Settings, store: Store, kept: np.ndarray) -> int:
    """Tokens of the longest row that is trained on."""
    longest = int(store.column("tokens")[store.rows_of(TRAIN)[kept]].max())
    limit: int | None = settings.training.max_length
    return longest if limit is None else min(longest, limit)
