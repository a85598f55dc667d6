"""Trials that share a frozen base, against the same trials trained alone by TRL's SFTTrainer, and with other
neighbours."""

import gc
import json
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_kit import Packed, make_engine
from safetensors.torch import load_file
from training_kit import Run, difference, values_of

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, DoesNotFitError
from vlmtune.evaluation.metrics import METRICS
from vlmtune.evaluation.objective import Objective
from vlmtune.model.base import load_base
from vlmtune.model_ref import ModelRef
from vlmtune.packed import checkpoint_writer, packed_model
from vlmtune.packed.layers import AdapterLayout, RowAdapters
from vlmtune.packed.packable import not_packable
from vlmtune.packed.packed_model import PassResult
from vlmtune.packed.slot_adapter import SlotAdapter
from vlmtune.packed.trial_checkpoint import ADAPTER_FILE, OPTIMIZER_FILE, PEFT_PREFIX
from vlmtune.packed.worker_shard import WorkerShard

pytestmark = pytest.mark.timeout(200)

RunLoop = Callable[..., Run]
CLOSE = 1e-5  # relative norm of what two adapters differ by
# Ranks, factors, schedules, batch sizes, lengths, accumulation and losses that differ, of runs of different
# length.
TRIALS: dict[str, dict[str, Any]] = {
    "one": {"lora_r": 1, "lora_alpha": 2, "max_steps": 6},
    "three": {
        "lora_r": 3,
        "lora_alpha": 8,
        "per_device_train_batch_size": 1,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_steps": 8,
    },
    "eight": {
        "lora_r": 8,
        "lora_alpha": 16,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "max_length": 56,
        "num_train_epochs": 2,
        "loss_type": "dft",
        "max_steps": 4,
    },
    "large": {
        "lora_r": 64,
        "lora_alpha": 64,
        "use_rslora": True,
        "max_grad_norm": 0.1,
        "optim": "sgd",
        "max_steps": 3,
    },
}


def pack(store: Store, model: Path, folder: Path, trials: dict[str, dict[str, Any]], **shared: Any) -> Packed:
    packed = make_engine(values_of(store, model, **shared), store, folder)
    for name, trial in trials.items():
        packed.join(name, values_of(store, model, **shared, **trial))
    return packed


def assert_as_alone(packed: Packed, name: str, alone: Run, close: float = CLOSE) -> None:
    """Curve, reports and adapter of a packed trial are those of the run alone."""
    assert difference(packed.adapter(name), alone.adapter()) < close
    assert packed.losses(name) == pytest.approx(alone.losses(), rel=1e-4)
    found, expected = [report.metrics for report in packed.reports[name]], alone.reports
    assert [report["step"] for report in found] == [report["step"] for report in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
        assert mine["epoch"] == theirs["epoch"]
        assert mine.keys() - theirs.keys() == {"checkpoint_path", "evaluation"}
        assert theirs.keys() <= mine.keys()
    compared = ("learning_rate", "grad_norm", "mean_token_accuracy", "epoch")
    curves = [
        [{key: step[key] for key in compared} for step in steps if "loss" in step]
        for steps in (packed.steps[name], alone.steps)
    ]
    for step, expected_step in zip(*curves, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-3)


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


def test_adapters_of_cross_attention_alone_pass_over_steps_without_a_picture(
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


def test_a_trial_goes_on_from_its_checkpoint_in_another_engine(
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
    assert [folder.name for folder in (tmp_path / "eight").iterdir()] == ["checkpoint-8"], (
        "earlier checkpoints go"
    )


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
    assert found["nan"][2].last
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
        if leaves:  # five rows then are filled up to the six that there were
            packed.engine.leave("beside")
        packed.run()
        packed.close()
        found.append((packed.losses("mine"), packed.adapter("mine")))
    assert found[0][0] == found[1][0]
    assert difference(found[0][1], found[1][1]) == 0.0


def test_dropout_is_the_trials_own_whatever_its_neighbours(
    stores: dict[str, Store], models: Path, tmp_path: Path
):
    store, trial = stores["mall llava"], {"lora_r": 4, "lora_dropout": 0.3, "max_steps": 4}
    runs = {}
    neighbours = {"other": TRIALS["three"], "third": {**trial, "lora_dropout": 0.5}}
    for what, beside in {"alone": {}, "neighbours": neighbours, "none": None}.items():
        mine = trial if beside is not None else {**trial, "lora_dropout": 0.0}
        packed = pack(store, models / "llava", tmp_path / what, {"mine": mine, **(beside or {})})
        packed.run()
        packed.close()
        runs[what] = packed.adapter("mine")
    assert difference(runs["neighbours"], runs["alone"]) < CLOSE
    assert difference(runs["none"], runs["alone"]) > 1e-2


def test_a_pass_that_does_not_fit_is_the_same_step_in_halves(
    stores: dict[str, Store], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, trials = (
        stores["mall llava"],
        {"a": {"lora_r": 4, "max_steps": 3}, "b": {"lora_r": 8, "max_steps": 3}},
    )
    whole = pack(store, models / "llava", tmp_path / "whole", trials)
    whole.run()
    whole.close()
    gradients, asked = RowAdapters.gradients, []

    def full_above_three(self: RowAdapters) -> torch.Tensor:
        asked.append(len(self.flat))
        if len(self.flat) > 3:
            raise torch.OutOfMemoryError("injected after the backward pass")
        return gradients(self)

    monkeypatch.setattr(RowAdapters, "gradients", full_above_three)
    halved = pack(store, models / "llava", tmp_path / "halved", trials)
    halved.run()
    halved.close()
    assert max(asked) == 8
    assert max(asked[-4:]) <= 3, "it goes on with what fits"
    assert any("out of GPU memory with 8 rows" in note for note in halved.notes)
    for name in trials:
        assert difference(halved.adapter(name), whole.adapter(name)) < CLOSE
        assert halved.losses(name) == pytest.approx(whole.losses(name), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the memory is that of a GPU")
def test_a_gpu_that_is_too_small_for_a_pass(stores: dict[str, Store], models: Path, tmp_path: Path):
    shared = {
        "use_cpu": False,
        "dtype": "float32",
        "cuda_graphs": False,
        "torch_compile": False,
        "per_device_train_batch_size": 32,
    }
    trials = {name: {"lora_r": 8, "max_steps": 3, "learning_rate": 1e-3} for name in ("a", "b")}

    def idle() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def run(name: str) -> Packed:
        torch.cuda.reset_peak_memory_stats()
        packed = pack(stores["mall llava"], models / "llava", tmp_path / name, trials, **shared)
        packed.run()
        packed.close()
        return packed

    run("first")  # leaves what the libraries keep for themselves: more than this model takes
    kept = idle()
    roomy = run("roomy")
    taken = torch.cuda.max_memory_reserved() - kept
    assert not any("out of GPU memory" in note for note in roomy.notes)
    for share in (0.9, 0.8, 0.7, 0.6, 0.5):  # memory is taken in blocks, so not every cap is one
        limit = idle() + share * taken
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
        try:
            capped = run(f"capped {share}")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        if capped.notes != roomy.notes:
            break
    assert any(
        re.search(r"out of GPU memory with \d+ rows at a time: continuing with", note)
        for note in capped.notes
    ), capped.notes
    for name in trials:
        assert capped.losses(name) == pytest.approx(roomy.losses(name), rel=1e-4), (
            share,
            limit,
            kept,
            taken,
            capped.notes,
        )
        assert difference(capped.adapter(name), roomy.adapter(name)) < 1e-3
        assert len(capped.reports[name]) == len(roomy.reports[name])


def test_a_trial_of_which_no_row_fits_is_infeasible_and_the_others_go_on(
    run_loop: RunLoop, stores: dict[str, Store], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    forward = packed_model.PackedModel._forward

    def full_for_large(self: Any, part: Any, *, dropout: bool) -> Any:
        if any(row.owner.adapter.rank == 64 for row in part):
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
    assert last.last
    assert last.metrics["infeasible"]
    assert_as_alone(packed, "one", alone)


def test_a_trial_for_which_the_others_would_have_to_move_without_memory_leaves_them_as_they_were(
    stores: dict[str, Store], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, model = stores["mall llava"], models / "llava"
    values = values_of(store, model, max_steps=4, eval_steps=4, lora_target_modules=["q_proj"])
    alone = make_engine(values, store, tmp_path / "alone")
    alone.join("one", values)
    alone.join("two", values)
    alone.run()
    alone.close()
    packed = make_engine(values, store, tmp_path / "disturbed")
    packed.join("one", values)
    packed.join("two", values)
    packed.engine.train_round()
    lay_out, layout = SlotAdapter.lay_out, packed.engine.model.adapters.layout

    def full_for_two(self: SlotAdapter, new: AdapterLayout, device: torch.device) -> None:
        if self is packed.engine.slots["two"].adapter and new is not layout:
            raise torch.OutOfMemoryError("injected")
        lay_out(self, new, device)

    monkeypatch.setattr(SlotAdapter, "lay_out", full_for_two)
    packed.join("large", {**values, "lora_target_modules": "all-linear"})
    packed.run()
    packed.close()
    assert packed.reports["large"][-1].metrics["infeasible"]
    for name in ("one", "two"):
        assert packed.reports[name][-1].metrics["eval_loss"] == alone.reports[name][-1].metrics["eval_loss"]


def test_parked_trials_wait(stores: dict[str, Store], models: Path, tmp_path: Path):
    packed = pack(
        stores["mall llava"], models / "llava", tmp_path, {name: TRIALS[name] for name in ("one", "three")}
    )
    for _ in range(3):
        assert packed.engine.train_round(parked={"one"})
    assert [packed.engine.slots[name].progress.step for name in ("one", "three")] == [0, 3]
    assert not packed.engine.train_round(parked={"one", "three"})


def test_reports_do_not_wait_for_their_checkpoints_but_the_last(
    stores: dict[str, Store], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write, open_disk, waited = checkpoint_writer.write_checkpoint, threading.Event(), []

    def when_the_disk_is_open(*args: Any) -> None:
        waited.append(open_disk.wait(60))
        write(*args)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", when_the_disk_is_open)
    packed = pack(
        stores["mall llava"], models / "llava", tmp_path, {"one": {"max_steps": 4, "eval_steps": 1}}
    )
    packed.run(until=lambda: len(packed.reports.get("one", [])) == checkpoint_writer.MAX_UNWRITTEN)
    assert not list(tmp_path.rglob("report.json"))
    opening = threading.Timer(1.0, open_disk.set)
    opening.start()
    packed.run(until=lambda: len(packed.reports["one"]) > checkpoint_writer.MAX_UNWRITTEN)
    assert open_disk.is_set(), "a third copy of the adapter waited for the first to be written"
    packed.run()
    packed.close()
    assert [report.metrics["step"] for report in packed.reports["one"]] == [1, 2, 3, 4]
    assert [path.parent.name for path in tmp_path.rglob("report.json")] == ["checkpoint-4"]
    assert all(waited)


def test_a_checkpoint_keeps_its_numbers_until_it_is_written(
    stores: dict[str, Store], models: Path, tmp_path: Path
):
    packed = pack(
        stores["mall llava"],
        models / "llava",
        tmp_path,
        {"one": {"max_steps": 6, "learning_rate": 1e-2, "eval_strategy": "no"}},
    )
    slot = packed.engine.slots["one"]
    writes, expected = [], []
    for step in range(3):
        packed.engine.train_round()
        writes.append(slot.begin_checkpoint())
        expected.append(slot.adapter.flat.clone())
        if step == 1:  # the first is written while the second waits, and the third takes its place
            writes[0].write(made(tmp_path / "0"), lambda _: None)
    for step in (1, 2):
        writes[step].write(made(tmp_path / str(step)), lambda _: None)
    for step, flat in enumerate(expected):
        adapter = load_file(tmp_path / str(step) / ADAPTER_FILE)
        pairs = slot.adapter.layout.unpack(flat, slot.adapter.names, slot.adapter.rank)
        for name, pair in pairs.items():
            assert all(
                torch.equal(adapter[f"{PEFT_PREFIX}{name}.lora_{half}.weight"], one)
                for half, one in zip("AB", pair, strict=True)
            )
        averages = torch.load(tmp_path / str(step) / OPTIMIZER_FILE)["flat"]
        assert averages["exp_avg"].abs().sum() > 0
    assert not torch.equal(expected[0], expected[1])
    assert len(slot.adapter.host_memory.free) == 2, "memory for as many as there were at once"


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


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


REFUSED = {
    "use_dora": True,
    "lora_modules_to_save": ["lm_head"],
    "fp16": True,
    "optim": "adafactor",
    "neftune_noise_alpha": 5.0,
    "lora_vision": True,
    "num_workers": "1:2",
    "eval_on_start": True,
}


@pytest.mark.parametrize(("option", "value"), REFUSED.items())
def test_what_cannot_be_packed_is_refused_by_name(
    option: str, value: Any, stores: dict[str, Store], models: Path
):
    settings = Settings.from_flags(values_of(stores["mall llava"], models / "llava", **{option: value}))
    assert option in (not_packable(settings) or "")


def test_an_engine_refuses_such_a_trial(stores: dict[str, Store], models: Path, tmp_path: Path):
    packed = make_engine(values_of(stores["mall llava"], models / "llava"), stores["mall llava"], tmp_path)
    with pytest.raises(ConfigError, match="trial_runner packed: cannot train use_dora"):
        packed.join("dora", values_of(stores["mall llava"], models / "llava", use_dora=True))


@pytest.mark.parametrize("metric", ["token_f1", "mae"])
def test_a_metric_of_answers_is_the_same_in_both_runners(
    metric: str, run_loop: RunLoop, stores: dict[str, Store], models: Path, tmp_path: Path
):
    """On some evaluation rows at first, on all at the end."""
    shared = {"metric": metric, "mode": METRICS[metric].mode, "metric_rows": 2, "max_new_tokens": 4}
    trial = {"lora_r": 8, "lora_alpha": 32, "learning_rate": 1e-2, "max_steps": 8, "eval_steps": 4}
    alone = run_loop("mall llava", **shared, **trial)
    packed = pack(
        stores["mall llava"],
        models / "llava",
        tmp_path,
        {"mine": trial, "other": {**trial, "lora_r": 4}},
        **shared,
    )
    packed.run()
    packed.close()
    expected = [report[metric] for report in alone.reports]
    assert len(expected) == 2
    assert [report.metrics[metric] for report in packed.reports["mine"]] == pytest.approx(expected)
    assert_as_alone(packed, "mine", alone)


def test_an_objective_answers_a_fixed_sample_before_the_end(stores: dict[str, Store], models: Path):
    store, asked = stores["mall llava"], []
    settings = Settings.from_flags(
        values_of(store, models / "llava", metric="exact_match", mode="max", metric_rows=3, max_new_tokens=2)
    )
    objective = Objective.of(settings)
    assert objective is not None
    assert Objective.of(settings.replace(metric="eval_loss", mode="min")) is None
    base = load_base(
        ModelRef(str(models / "llava")), quantization="none", dtype=None, device=torch.device("cpu")
    )
    processor = ModelRef(str(models / "llava")).processor()

    def read(store: Store, rows: Any) -> Any:
        asked.append(list(rows))
        return store.read(rows)

    for last in (False, False, True):
        objective.measure(base, processor, store, read, last=last)
    sizes = [sum(map(len, asked[:2])), sum(map(len, asked[2:4]))]
    assert sizes == [6, 6], "three rows are answered, and read again for their references"
    assert asked[1] == asked[3], "the same ones each time"
    assert set(asked[-1]) == set(store.rows_of("eval").tolist())


def test_with_others_a_worker_without_memory_ends_the_run(
    stores: dict[str, Store], models: Path, tmp_path: Path
):
    """They would wait for its part of the step, so it is no trial that ends alone."""
    packed = pack(stores["mall llava"], models / "llava", tmp_path, {"one": TRIALS["one"]})
    packed.engine.shard = WorkerShard(rank=1, world=2)
    with pytest.raises(DoesNotFitError, match="out of GPU memory with one row"):
        packed.engine._end_too_large(PassResult({}, [packed.engine.slots["one"]]))
    assert "one" in packed.engine.slots
    assert packed.reports == {}
