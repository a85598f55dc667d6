"""The training loop in this process, on tiny models with real quantised layers: what it trains, on which
rows, and what it reports."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from training_kit import Run, difference

from vlmtune.data.order import Order
from vlmtune.data.store import Store
from vlmtune.data.stream import read_batches
from vlmtune.errors import DataError
from vlmtune.model.base import load_base
from vlmtune.model.head import log_probs_at_labels
from vlmtune.model.lora import load_adapter
from vlmtune.model_ref import ModelRef
from vlmtune.training import evaluator, trainer
from vlmtune.training.best_evaluation import LIVE_ANSWERS

RunLoop = Callable[..., Run]


def label_log_probs(
    store: Store, model: Path, quantization: str, split: str, adapter: Path | None = None
) -> Iterator[torch.Tensor]:
    """The log-probability of every labelled token of a split, row by row, from the full logits of a plain
    forward pass."""
    network = load_base(
        ModelRef(str(model)), quantization=quantization, dtype="float32", device=torch.device("cpu")
    )
    network = load_adapter(network, adapter) if adapter is not None else network.eval()
    order = Order(rows=len(store.rows_of(split)), per_device=1, accumulation=1, world_size=1, seed=0).epoch(
        0, 0
    )
    for batch in read_batches(store, split, order, None):
        inputs = store.meta.input_format.normalize(batch)
        labels = inputs.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = network(**inputs).logits[0, :-1].float()
        yield -cross_entropy(logits, labels, reduction="none", ignore_index=-100)[labels != -100]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_adapters_stay_in_fp32_and_small_updates_are_kept(run_loop: RunLoop, quantization: str):
    rate = 1.4e-5
    run = run_loop(
        "mixed llava",
        quantization=quantization,
        learning_rate=rate,
        adam_epsilon=1e-15,
        max_steps=2,
        eval_steps=1,
        max_grad_norm=0.0,
    )
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    first, last = run.adapter(1), run.adapter(2)
    assert {tensor.dtype for tensor in last.values()} == {torch.float32}
    for name in last:
        if "lora_B" in name:  # zero before; Adam's first step is the learning rate, whatever the gradient
            assert first[name].abs().median() == pytest.approx(rate, rel=1e-3)
        # A's first gradient g is in the second step, where Adam's averages are 0.1 g / (1 - 0.9²) and 0.001
        # g² / (1 - 0.999²)
        else:
            moved = (last[name] - first[name]).abs()
            assert moved.median() == pytest.approx(rate * (0.1 / 0.19) / (0.001 / 0.001999) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(("name", "quantization"), [("mixed llava", "nf4"), ("mixed mllama", "int8")])
def test_eval_loss_is_the_mean_over_all_labelled_tokens(
    run_loop: RunLoop, stores: dict[str, Store], models: Path, name: str, quantization: str
):
    losses = []
    for batch, length in ((1, None), (2, 48), (5, 64)):
        run = run_loop(
            name,
            quantization=quantization,
            learning_rate=1e-30,
            max_steps=1,
            per_device_eval_batch_size=batch,
            max_length=length,
            pad_to_multiple_of=None,
        )
        losses.append(run.reports[-1]["eval_loss"])
        assert {limit for split, _, limit in run.requests if split == "eval"} == {None}
        assert {limit for split, _, limit in run.requests if split == "train"} == {length}
    expected = torch.cat(
        list(label_log_probs(stores[name], models / name.split()[1], quantization, "eval", run.checkpoint()))
    )
    assert losses == pytest.approx([-expected.double().mean().item()] * 3, rel=1e-5)


def test_eval_loss_is_that_of_the_trained_adapter(run_loop: RunLoop, stores: dict[str, Store], models: Path):
    run = run_loop("mall llava", learning_rate=5e-3, max_steps=3, eval_steps=1)
    before, after = run.reports[0]["eval_loss"], run.reports[-1]["eval_loss"]
    expected = torch.cat(
        list(label_log_probs(stores["mall llava"], models / "llava", "nf4", "eval", run.checkpoint()))
    )
    assert after == pytest.approx(-expected.double().mean().item(), rel=1e-5)
    assert abs(after - before) > 1e-3


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_training_loss_is_that_of_its_type(
    run_loop: RunLoop, stores: dict[str, Store], models: Path, loss_type: str
):
    run = run_loop(
        "mixed llava",
        loss_type=loss_type,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=6,
    )
    token = torch.cat(list(label_log_probs(stores["mixed llava"], models / "llava", "nf4", "train"))).double()
    expected = -token.mean() if loss_type == "nll" else -(token.exp() * token).mean()
    assert run.losses() == pytest.approx([expected.item()], rel=1e-4)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_is_logged_once_with_its_own_numbers(
    run_loop: RunLoop, ahead: bool, monkeypatch: pytest.MonkeyPatch
):
    for module in ("trainer", "step_log"):
        monkeypatch.setattr(f"vlmtune.training.{module}.is_asynchronous", lambda device: ahead)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    options = {"max_steps": 5, "eval_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    each, pairs = (run_loop("mixed llava", logging_steps=steps, **options) for steps in (1, 2))
    assert [
        (log["step"], "eval_loss" in log) for log in each.steps if {"loss", "eval_loss"} & log.keys()
    ] == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True), (5, False), (5, True)]
    logs = [log for log in each.steps if "loss" in log]
    assert [log["learning_rate"] for log in logs] == pytest.approx(
        [1e-2 * (1 - step / 5) for step in range(5)]
    )
    assert len({log["grad_norm"] for log in logs}) == 5 and all(
        0 <= log["mean_token_accuracy"] <= 1 for log in logs
    )
    losses = each.losses()
    assert [log["step"] for log in pairs.steps if "loss" in log] == [2, 4]
    assert pairs.losses() == pytest.approx(
        [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2], rel=1e-5
    )


def test_accumulated_steps_equal_large_ones(run_loop: RunLoop):
    small = run_loop(
        "mixed llava", per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=2
    )
    large = run_loop("mixed llava", per_device_train_batch_size=8, num_train_epochs=2)
    assert difference(small.adapter(), large.adapter()) < 1e-5
    assert small.reports[-1]["max_steps"] == large.reports[-1]["max_steps"] == 4


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_base_is_not_touched_and_the_vision_tower_has_no_adapter(
    run_loop: RunLoop, models: Path, quantization: str
):
    run = run_loop("mall llava", quantization=quantization, learning_rate=1e-2, max_steps=2)
    fresh = load_base(
        ModelRef(str(models / "llava")),
        quantization=quantization,
        dtype="float32",
        device=torch.device("cpu"),
    ).state_dict()
    trained = {
        name.replace(".base_layer", ""): value
        for name, value in run.model.get_base_model().state_dict().items()
    }
    assert {name for name in trained if "lora_" not in name} == set(fresh)
    assert all(torch.equal(trained[name], value) for name, value in fresh.items())
    assert all(".language_model." in name for name in run.adapter())


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_resumed_run_reads_the_rest_and_ends_with_the_same_adapter(run_loop: RunLoop, steps: int):
    # 11 rows by 4: the third step of an epoch has 3 rows in 2 of its batches. Dropout: random states
    # continue as well.
    options = {
        "num_train_epochs": 2,
        "eval_steps": 1,
        "lora_dropout": 0.2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 2,
    }
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = run_loop("mixed llava", **options)
    first = run_loop("mixed llava", interrupt=steps, **options)
    rest = run_loop("mixed llava", go_on=first.checkpoint(steps), **options)
    assert difference(rest.adapter(), whole.adapter()) == 0
    order = Order(rows=11, per_device=2, accumulation=2, world_size=1, seed=42)
    assert whole.trained_on() == order.epoch(0, 0) + order.epoch(1, 0)
    assert rest.trained_on() == [
        batch for step in range(steps, 6) for batch in order.step(step // 3, step % 3, 0)
    ]
    assert [report["step"] for report in rest.reports] == list(range(steps + 1, 7))
    assert rest.reports[-1]["eval_loss"] == whole.reports[-1]["eval_loss"]
    assert rest.reports[-1]["epoch"] == whole.reports[-1]["epoch"] == 2.0


def test_an_elastic_run_that_lacks_a_worker_makes_the_steps_of_all(run_loop: RunLoop):
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 2}
    alone = run_loop("mixed llava", num_workers="1:2", **options)
    both = run_loop("mixed llava", gradient_accumulation_steps=2, **options)
    assert difference(alone.adapter(), both.adapter()) == 0
    assert [report["step"] for report in alone.reports] == [report["step"] for report in both.reports]


def test_a_run_that_had_done_all_its_steps_trains_no_more(run_loop: RunLoop):
    run = run_loop("mixed llava", max_steps=2)
    again = run_loop("mixed llava", max_steps=2, go_on=run.checkpoint())
    assert (again.model, again.reports, again.requests) == (None, [], [])


def test_dropout_follows_the_seed(run_loop: RunLoop):
    adapters = [
        run_loop("mixed llava", max_steps=3, lora_dropout=dropout).adapter() for dropout in (0.3, 0.3, 0.0)
    ]
    assert difference(adapters[0], adapters[1]) == 0
    assert difference(adapters[0], adapters[2]) > 1e-4


def test_all_modules_train_in_a_step_and_none_in_an_evaluation(
    run_loop: RunLoop, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[bool, set[bool]]] = []  # by whether gradients are wanted

    def scores(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        seen.append((torch.is_grad_enabled(), {module.training for module in model.modules()}))
        return log_probs_at_labels(model, batch)

    for module in (trainer, evaluator):
        monkeypatch.setattr(module, "log_probs_at_labels", scores)
    run_loop("mixed llava", max_steps=3, eval_steps=1)
    assert [modes for wanted, modes in seen if wanted] == [{True}] * 3
    assert {wanted for wanted, _ in seen} == {True, False}
    assert all(modes == {wanted} for wanted, modes in seen)


def test_every_epoch_has_each_row_once(run_loop: RunLoop):
    run = run_loop("mixed llava", num_train_epochs=3)
    rows = [row for batch in run.trained_on() for row in batch.rows]
    epochs = [rows[start : start + 11] for start in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert run.reports[-1]["step"] == run.reports[-1]["max_steps"] == 9
    evaluated = Counter(row for split, batch, _ in run.requests if split == "eval" for row in batch.rows)
    assert evaluated == dict.fromkeys(range(5), len(run.reports))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"eval_strategy": "no"}, [6]),
        ({"eval_strategy": "epoch"}, [3, 6]),
        ({"eval_strategy": "epoch", "max_steps": 4}, [3, 4]),
        ({"eval_strategy": "epoch", "num_train_epochs": 1.5}, [3, 5]),
        ({"eval_steps": 0.5}, [3, 6]),
        ({"eval_steps": 4}, [4, 6]),
        ({"eval_steps": 4, "max_steps": 4}, [4]),
        ({"eval_steps": 100}, [6]),
    ],
)
def test_it_reports_at_evaluations_and_once_at_the_end(
    run_loop: RunLoop, options: dict[str, object], steps: list[int]
):
    run = run_loop("mixed llava", **{"num_train_epochs": 2, **options})
    assert [report["step"] for report in run.reports] == steps
    assert all(report["eval_loss"] > 0 and report["train_loss"] > 0 for report in run.reports)
    assert all(run.checkpoint(step).is_dir() for step in steps)


@pytest.mark.parametrize(
    ("name", "quantization", "rate"), [("mall llava", "nf4", 3e-3), ("mall mllama", "int8", 1e-2)]
)
def test_images_teach(run_loop: RunLoop, name: str, quantization: str, rate: float):
    options = {
        "quantization": quantization,
        "learning_rate": rate,
        "lora_r": 16,
        "lora_target_modules": "all-linear",
    }
    options |= {"num_train_epochs": 16, "per_device_train_batch_size": 8, "eval_strategy": "no"}
    seen = run_loop(name, **options).losses()
    blank = run_loop(name, blank=True, **options).losses()
    assert sum(seen[-5:]) < 0.5 * sum(seen[:5])
    assert sum(seen[-5:]) < 0.85 * sum(blank[-5:])


def test_text_alone_teaches_a_model_that_reads_images_by_cross_attention(run_loop: RunLoop):
    options = {
        "quantization": "int8",
        "learning_rate": 1e-2,
        "num_train_epochs": 8,
        "max_length": 64,
        "eval_strategy": "no",
    }
    losses = run_loop(
        "mixed mllama", per_device_train_batch_size=1, **options
    ).losses()  # one row a step: most have no image
    assert sum(losses[-11:]) < 0.8 * sum(losses[:11])


def test_a_batch_without_an_image_leaves_adapters_of_cross_attention_alone(
    run_loop: RunLoop, stores: dict[str, Store]
):
    options = {
        "lora_target_modules": r".*language_model.*cross_attn\.(q_proj|o_proj)",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
    }
    run = run_loop("mixed mllama", per_device_train_batch_size=1, max_steps=11, eval_steps=1, **options)
    has_image = stores["mixed mllama"].column("image_tokens")[stores["mixed mllama"].rows_of("train")] > 0
    seen = [bool(has_image[batch.rows[0]]) for batch in run.trained_on()[-11:]]
    assert 0 < sum(seen) < 11
    for step in range(2, 12):
        assert (difference(run.adapter(step), run.adapter(step - 1)) > 0) == seen[step - 1]


def test_long_rows_are_refused_or_left_out(run_loop: RunLoop, stores: dict[str, Store]):
    store = stores["mixed llava"]
    train = store.rows_of("train")
    required = store.column("required")[train]
    assert len(set(required)) > 1
    limit = int(required.max()) - 1
    fitting = [row for row in range(11) if required[row] <= limit]
    with pytest.raises(
        DataError,
        match=rf"max_length {limit} .*train\.jsonl:2 .*{required.max()} keeps a word of each answer",
    ):
        run_loop("mixed llava", max_length=limit)
    run = run_loop("mixed llava", max_length=limit, on_long_row="skip", num_train_epochs=1)
    assert sorted(row for batch in run.trained_on() for row in batch.rows) == fitting
    assert sorted(row for split, batch, _ in run.requests if split == "eval" for row in batch.rows)[
        :: len(run.reports)
    ] == list(range(5))
    assert run.reports[-1]["max_steps"] == -(-len(fitting) // 4)


def test_live_answers_change_no_result(run_loop: RunLoop):
    """To the last bit, with dropout: they use no random numbers."""
    options = {"search_space": {"lora_r": {"choice": [4, 8]}}, "lora_dropout": 0.1, "learning_rate": 1e-2}
    options |= {"max_steps": 4, "eval_steps": 2, "max_new_tokens": 4}
    without, run = (run_loop("mall llava", live_answers=rows, **options) for rows in (0, 2))
    first = run.reports[0].pop(LIVE_ANSWERS)  # later ones only if there was time
    assert len(first) == 2 and all(row["question"] and row["reference"] for row in first)
    run.reports[1].pop(LIVE_ANSWERS, None)
    assert [report.keys() for report in run.reports] == [report.keys() for report in without.reports]
    assert run.losses() == without.losses()
    assert [report["eval_loss"] for report in run.reports] == [one["eval_loss"] for one in without.reports]
    assert difference(run.adapter(), without.adapter()) == 0
