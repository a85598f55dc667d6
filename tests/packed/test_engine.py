"""Trials that share a frozen base, against the same trials trained alone by TRL's SFTTrainer."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_kit import CLOSE, TRIALS, Packed, assert_as_alone, make_engine, pack
from training_kit import Run, difference, values_of

from vlmtune.data.store import Store
from vlmtune.errors import DoesNotFitError
from vlmtune.packed import packed_model
from vlmtune.packed.packed_model import PassResult
from vlmtune.packed.worker_shard import WorkerShard

pytestmark = pytest.mark.timeout(200)

RunLoop = Callable[..., Run]


@pytest.mark.parametrize(
    ("rows", "quantization", "checkpointing"),
    [
        ("mixed llava", "nf4", False),
        ("mixed mllama", "int8", False),
        ("mall llava", "none", True),
        ("mall mllama", "nf4", True),
    ],
)
def test_every_trial_is_what_it_would_be_alone(
    rows: str,
    quantization: str,
    checkpointing: bool,
    run_loop: RunLoop,
    stores: dict[str, Store],
    models: Path,
    tmp_path: Path,
):
    shared = {"quantization": quantization}
    alone = {name: run_loop(rows, **shared, **trial) for name, trial in TRIALS.items()}
    packed = make_engine(
        values_of(stores[rows], models / rows.split()[1], **shared)
        | {"gradient_checkpointing": checkpointing},
        stores[rows],
        tmp_path,
    )
    for name, trial in TRIALS.items():
        packed.join(name, values_of(stores[rows], models / rows.split()[1], **shared, **trial))
    packed.run()
    packed.close()
    for name, run in alone.items():
        assert_as_alone(packed, name, run)
    folders = [alone["one"].checkpoint(), Path(packed.reports["one"][-1].metrics["checkpoint_path"])]
    theirs, mine = (json.loads((folder / "adapter_config.json").read_text()) for folder in folders)
    assert mine == theirs


def test_adapters_of_cross_attention_alone_skip_steps_without_an_image(
    run_loop: RunLoop, stores: dict[str, Store], models: Path, tmp_path: Path
):
    options = {
        "lora_target_modules": r".*language_model.*cross_attn\.(q_proj|o_proj)",
        "quantization": "int8",
        "weight_decay": 0.1,
    }
    options |= {"per_device_train_batch_size": 1, "max_steps": 11}
    values = values_of(stores["mixed mllama"], models / "mllama", **options)
    packed = make_engine(values, stores["mixed mllama"], tmp_path)
    packed.join("one", values)
    packed.run()
    packed.close()
    assert_as_alone(packed, "one", run_loop("mixed mllama", **options))


def test_one_joins_late_one_leaves_early_and_the_others_do_not_notice(
    run_loop: RunLoop, stores: dict[str, Store], models: Path, tmp_path: Path
):
    rows = "mixed llava"
    alone = {name: run_loop(rows, **TRIALS[name]) for name in ("three", "eight")}
    packed = pack(stores[rows], models / "llava", tmp_path, {name: TRIALS[name] for name in ("one", "three")})
    packed.run(until=lambda: packed.engine.slots["three"].progress.step == 2)
    packed.engine.leave("one")
    packed.join("eight", values_of(stores[rows], models / "llava", **TRIALS["eight"]))
    packed.run(until=lambda: packed.engine.slots["three"].progress.step == 4)
    packed.join(
        "large", values_of(stores[rows], models / "llava", **TRIALS["large"])
    )  # of a rank that needs another layout
    packed.run()
    packed.close()
    for name, run in alone.items():
        assert_as_alone(packed, name, run)


def test_a_trial_resumes_from_its_checkpoint_in_another_engine(
    run_loop: RunLoop, stores: dict[str, Store], models: Path, tmp_path: Path
):
    rows, trial = "mixed llava", {**TRIALS["eight"], "max_steps": 8, "eval_steps": 3, "optim": "adamw_torch"}
    alone = run_loop(rows, **trial)
    first = pack(stores[rows], models / "llava", tmp_path, {"eight": trial, "one": TRIALS["one"]})
    first.run(until=lambda: first.engine.slots["eight"].progress.step == 4)  # the checkpoint is of step 3
    first.close()
    second = pack(stores[rows], models / "llava", tmp_path, {"large": TRIALS["large"], "eight": trial})
    second.run()
    second.close()
    assert difference(second.adapter("eight"), alone.adapter()) < CLOSE
    assert [report.metrics["step"] for report in second.reports["eight"]] == [6, 8]
    kept = {folder.name for folder in (tmp_path / "eight").iterdir()}
    assert kept == {"checkpoint-6", "checkpoint-8"}, "earlier checkpoints go, but for the one before"


# A rate at which a difference in the last bit grows to 76 % of the adapter within 24 steps.
WILD = {
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "learning_rate": 0.3,
    "per_device_train_batch_size": 4,
    "max_steps": 24,
    "eval_steps": 4,
}
BESIDE = {"per_device_train_batch_size": 3, "max_steps": 24, "eval_steps": 4, "learning_rate": 1e-4}


def test_a_killed_trial_goes_on_beside_others_to_the_same_bits(
    stores: dict[str, Store], models: Path, tmp_path: Path, one_thread: None
) -> None:
    """Neighbours of other ranks and numbers, rows divided otherwise, and kills change no bit."""
    store, model = stores["mall llava"], models / "llava"
    undisturbed = pack(store, model, tmp_path / "undisturbed", {"wild": WILD})
    undisturbed.run()
    undisturbed.close()
    folder = tmp_path / "killed"
    # Before the first checkpoint, between two, right after one, and once more.
    neighbours: list[dict[str, dict[str, Any]]] = [
        {"a": {"lora_r": 2, **BESIDE}},
        {"b": {"lora_r": 8, **BESIDE}, "c": {"lora_r": 1, **BESIDE}},
        {},
        {"d": {"lora_r": 8, **BESIDE}},
    ]
    losses: dict[int, float] = {}
    for number, step in enumerate((3, 10, 16, 24)):
        engine = pack(store, model, folder / str(number), {})
        engine.folder = folder
        engine.engine.model.max_tokens = 100 * (number + 1)  # divides the rows otherwise in each engine
        for name, trial in {**neighbours[number], "wild": WILD}.items():
            engine.join(name, values_of(store, model, **trial))
        engine.run(until=lambda engine=engine, step=step: wild_steps(engine) == step)
        engine.close()
        losses |= losses_of(engine)
    assert difference(engine.adapter("wild"), undisturbed.adapter("wild")) == 0.0
    assert losses == losses_of(undisturbed)


def losses_of(packed: Packed) -> dict[int, float]:
    reports = packed.reports.get("wild", [])  # none before its first evaluation
    return {report.metrics["step"]: report.metrics["eval_loss"] for report in reports}


def wild_steps(packed: Packed) -> int:
    return packed.engine.slots["wild"].progress.step if "wild" in packed.engine.slots else 24


NEIGHBOURS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "other values": {"learning_rate": 1.0, "lora_alpha": 128},
    "nan": {"learning_rate": 1e30},
}


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_neighbours_values_and_nans_change_no_bit(
    quantization: str, stores: dict[str, Store], models: Path, tmp_path: Path, one_thread: None
):
    store, trial = (
        stores["mall llava"],
        {"lora_r": 4, "per_device_train_batch_size": 4, "max_steps": 4, "lora_dropout": 0.1},
    )
    found = {}
    for what, changes in NEIGHBOURS.items():
        beside = {
            "lora_r": 4,
            "per_device_train_batch_size": 1,
            "max_steps": 4,
            "max_grad_norm": 0.0,
            "optim": "sgd",
            **changes,
        }
        packed = pack(
            store,
            models / "llava",
            tmp_path / what,
            {"mine": trial, "beside": beside},
            quantization=quantization,
        )
        packed.run()
        packed.close()
        found[what] = packed.losses("mine"), packed.adapter("mine"), packed.reports["beside"][-1]
    losses, adapter, _ = found["as it is"]
    for what in ("other values", "nan"):
        assert found[what][0] == losses
        assert difference(found[what][1], adapter) == 0.0
    assert not math.isfinite(found["nan"][2].metrics["eval_loss"])
    assert found["nan"][2].final
    assert found["nan"][2].metrics["step"] < 4, "it was evicted as soon as its numbers were none"


def test_a_trial_that_leaves_changes_no_bit_within_a_shape(
    stores: dict[str, Store], models: Path, tmp_path: Path, one_thread: None
):
    store = stores["mall llava"]
    trial = {"lora_r": 4, "per_device_train_batch_size": 4, "max_steps": 4}
    beside = {"lora_r": 4, "per_device_train_batch_size": 1, "max_steps": 4}
    found = []
    for leaves in (False, True):
        packed = pack(
            store,
            models / "llava",
            tmp_path / str(leaves),
            {"mine": trial, "beside": beside, "third": beside},
        )
        packed.run(until=lambda packed=packed: packed.engine.slots["mine"].progress.step == 2)
        if leaves:  # the five rows that are left are padded to six, as many as before
            packed.engine.leave("beside")
        packed.run()
        packed.close()
        found.append((packed.losses("mine"), packed.adapter("mine")))
    assert found[0][0] == found[1][0]
    assert difference(found[0][1], found[1][1]) == 0.0


def test_a_trial_of_which_no_row_fits_is_infeasible_and_the_others_go_on(
    run_loop: RunLoop, stores: dict[str, Store], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    forward = packed_model.PackedModel._forward

    def full_for_large(self: Any, part: Any, *, dropout: bool) -> Any:
        if any(row.slot.adapter.lora_rank == 64 for row in part):
            raise torch.OutOfMemoryError("injected")
        return forward(self, part, dropout=dropout)

    alone = run_loop("mall llava", **TRIALS["one"])
    monkeypatch.setattr(packed_model.PackedModel, "_forward", full_for_large)
    packed = pack(
        stores["mall llava"], models / "llava", tmp_path, {name: TRIALS[name] for name in ("one", "large")}
    )
    packed.run()
    packed.close()
    (last,) = packed.reports["large"]
    assert last.final
    assert last.metrics["infeasible"]
    assert_as_alone(packed, "one", alone)


def test_waiting_trials_do_not_train(stores: dict[str, Store], models: Path, tmp_path: Path):
    packed = pack(
        stores["mall llava"], models / "llava", tmp_path, {name: TRIALS[name] for name in ("one", "three")}
    )
    for _ in range(3):
        assert packed.engine.train_round(paused={"one"})
    assert [packed.engine.slots[name].progress.step for name in ("one", "three")] == [0, 3]
    assert not packed.engine.train_round(paused={"one", "three"})


def test_seconds_of_all_trials_add_up(stores: dict[str, Store], models: Path, tmp_path: Path):
    trials = {
        name: {"lora_r": 4, "max_steps": 4, "per_device_train_batch_size": size}
        for name, size in (("small", 1), ("large", 4))
    }
    packed = pack(stores["mall llava"], models / "llava", tmp_path, trials)
    packed.run()
    packed.close()
    seconds = {name: packed.reports[name][-1].metrics["seconds"] for name in trials}
    assert seconds["large"] > 2 * seconds["small"] > 0
    rates = {name: packed.reports[name][-1].metrics["rows_per_second"] for name in trials}
    assert rates["large"] == pytest.approx(rates["small"], rel=0.3), (
        "a row costs what a row costs, whose ever it is"
    )


def test_with_others_a_worker_without_memory_ends_the_run(
    stores: dict[str, Store], models: Path, tmp_path: Path
):
    """They would wait for its part of the step, so it is no trial that ends alone."""
    packed = pack(stores["mall llava"], models / "llava", tmp_path, {"one": TRIALS["one"]})
    packed.engine.shard = WorkerShard(rank=1, world_size=2)
    with pytest.raises(DoesNotFitError, match="out of GPU memory with the adapter and one row"):
        packed.engine._end_trials_that_do_not_fit(PassResult({}, [packed.engine.slots["one"]], [""]))
    assert "one" in packed.engine.slots
    assert packed.reports == {}


def test_a_trial_judged_by_its_best_evaluation_is_what_it_would_be_alone(
    run_loop: RunLoop, stores: dict[str, Store], models: Path, tmp_path: Path
):
    # The rate is so high that the loss rises once; the trial's patience ends it there.
    trial = {"learning_rate": 0.02, "max_steps": 16, "eval_steps": 2, "lora_r": 8}
    trial |= {"load_best_model_at_end": True, "early_stopping_patience": 1}
    alone = run_loop("mall llava", **trial)
    packed = pack(stores["mall llava"], models / "llava", tmp_path, {"mine": trial, "other": TRIALS["one"]})
    packed.run()
    packed.close()
    mine, theirs = packed.reports["mine"][-1], alone.reports[-1]
    assert mine.final and mine.metrics["step"] == theirs["step"] < trial["max_steps"]
    for name in ("best_step", "out_of_patience"):
        assert mine.metrics.get(name) == theirs.get(name)
    assert 0 < mine.metrics["best_step"] < mine.metrics["step"]
    for name in ("eval_loss", "last_eval_loss"):
        assert mine.metrics[name] == pytest.approx(theirs[name], rel=1e-3)
    kept = sorted(path.name for path in (tmp_path / "mine").iterdir())
    best, last = (f"checkpoint-{mine.metrics[name]}" for name in ("best_step", "step"))
    assert kept == sorted([best, last])
    assert mine.metrics["checkpoint_path"].endswith(best)
    assert mine.metrics["last_checkpoint_path"].endswith(last)
