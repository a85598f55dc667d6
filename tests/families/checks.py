"""What is checked of one family: each check returns an `Outcome`, so that a table of all can be made."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, PrinterCallback
from trl import SFTConfig, SFTTrainer

from families.cases import CASES, official, processed, row_losses
from families.common import Family
from families.kit import DATE, PLAIN, STEPS, Subject, Trained, difference

LOSS_TOLERANCE = 1e-4
ADAPTER_TOLERANCE = 1e-3


@dataclass
class Outcome:
    """How a check ended: `ok`, `wrong`, `refused` (one plain line), `traceback` or `skipped`."""

    state: str
    detail: str = ""

    @property
    def mark(self) -> str:
        return {"ok": "yes", "wrong": "WRONG", "refused": "p", "traceback": "T", "skipped": "–"}[self.state]


@dataclass
class Trial:
    """A family under test, with what its checks found so far."""

    family: Family
    subject: Subject
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # cases that are refused plainly, and why
    trained: Trained | None = None

    def check(self, name: str, run: Callable[["Trial"], Outcome]) -> Outcome:
        try:
            outcome = run(self)
        except PLAIN as error:
            outcome = Outcome("refused", str(error))
        except AssertionError as error:
            outcome = Outcome("wrong", str(error))
        except Exception as error:  # noqa: BLE001  any family may fail in any way; the table says where
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = next(
                (f for f in reversed(traceback.extract_tb(error.__traceback__)) if "/vlmtune/" in f.filename),
                last,
            )
            place = f"{Path(where.filename).name}:{where.lineno}"
            outcome = Outcome("traceback", f"{place} {type(error).__name__}: {str(error)[:200]}")
        self.outcomes[name] = outcome
        return outcome

    @property
    def usable(self) -> list[str]:
        """The cases that are not refused."""
        return [name for name in CASES if name not in self.refused]


def inspect(trial: Trial) -> Outcome:
    summary, memory = trial.subject.inspect()
    if not summary.ready:
        problems = "; ".join(str(problem) for problem in summary.problems)
        return Outcome("refused", problems)
    return Outcome("ok", memory)


def labels(trial: Trial) -> Outcome:
    """The labelled tokens of every row are its answers, each with the end token."""
    subject, tokenizer = trial.subject, trial.subject.processor.tokenizer
    wrong = []
    for name, case in CASES.items():
        try:
            example = subject.encode(case)
        except PLAIN as error:
            trial.refused[name] = str(error)
            continue
        found = [tokenizer.decode(run, skip_special_tokens=False) for run in runs(example.labels.tolist())]
        ends = {trial.family.end, tokenizer.eos_token}
        good = len(found) == len(case.answers) and all(
            any(text.strip() == f"{answer}{end}" for end in ends)
            for text, answer in zip(found, case.answers, strict=True)
        )
        if not good:
            wrong.append(f"{name}: {found} for {case.answers}")
    if wrong:
        return Outcome("wrong", "; ".join(wrong))
    if not trial.usable:
        return Outcome("refused", next(iter(trial.refused.values())))
    return Outcome("ok", "; ".join(f"{name} refused: {why}" for name, why in trial.refused.items()))


def runs(values: Sequence[int]) -> list[list[int]]:
    """The runs of values that are not -100."""
    out: list[list[int]] = [[]]
    for value in values:
        if value >= 0:
            out[-1].append(value)
        elif out[-1]:
            out.append([])
    return [run for run in out if run]


def loss(trial: Trial) -> Outcome:
    """Every row's loss, alone and in a batch, is the transformers class's on the processor's own encoding."""
    subject = trial.subject
    model = AutoModelForImageTextToText.from_pretrained(subject.model, dtype=torch.float32).eval()
    examples = {name: subject.encode(CASES[name]) for name in trial.usable}
    wrong, alone = [], {}
    for name in examples:
        alone[name] = row_losses(model, *reference(subject, [name], examples))[0]
    for group in [*([name] for name in examples), list(examples)]:
        found = subject.losses([examples[name] for name in group])
        expected = [alone[name] for name in group]
        if not all(near(value, *other) for value, other in zip(found, expected, strict=True)):
            # Rows of a batch may change each other's losses in transformers too.
            expected = row_losses(model, *reference(subject, group, examples))
        for name, value, (total, count) in zip(group, found, expected, strict=True):
            if not near(value, total, count):
                place = "alone" if len(group) == 1 else "in a batch"
                wrong.append(f"{name} {place}: {value / count:.5f}, transformers {total / count:.5f}")
    return Outcome("wrong", "; ".join(wrong)) if wrong else Outcome("ok")


def near(value: float, total: float, count: int) -> bool:
    """Whether a row's summed losses agree for each of its `count` tokens."""
    return abs(value - total) / count <= LOSS_TOLERANCE * max(1.0, total / count)


def reference(
    subject: Subject, names: Sequence[str], examples: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The processor's own batch of these rows, and their labels; its tokens must be those of the examples."""
    cases, rows = [CASES[name] for name in names], [examples[name] for name in names]
    try:
        batch = official(subject.processor, cases) if subject.has_template else None
    except (ValueError, TypeError):  # what it takes of a row is not what its chat path gives it
        batch = None
    if batch is None or not same_tokens(batch, rows):
        texts = [subject.encoder.chat_text(case.messages()) for case in cases]
        nested = subject.batches.input_format.nested_images
        try:
            batch = processed(subject.processor, texts, [case.pixels() for case in cases], nested=nested)
        except ValueError:  # the items of these rows make no tensor of the processor's: take ours
            batch = subject.batch(rows)
        batch = ends_first(batch, rows)
    if not same_tokens(batch, rows):
        raise AssertionError(f"{', '.join(names)}: the tokens differ from the processor's own")
    labels = torch.full_like(batch["input_ids"], -100)
    for number, row in enumerate(rows):
        labels[number, : len(row.labels)] = torch.from_numpy(row.labels)
    return {name: tensor for name, tensor in batch.items() if name != "labels"}, labels


def same_tokens(batch: dict[str, torch.Tensor], rows: Sequence[Any]) -> bool:
    """Whether the rows of a batch begin with the tokens of these examples."""
    return all(
        ids[: len(row.input_ids)].tolist() == row.input_ids.tolist()
        for ids, row in zip(batch["input_ids"], rows, strict=True)
    )


def ends_first(batch: dict[str, torch.Tensor], rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The batch with what the processor puts behind each text moved before the last answer."""
    length = batch["input_ids"].shape[1]
    order = torch.arange(length).repeat(len(rows), 1)
    for number, row in enumerate(rows):
        tokens, start = len(row.input_ids), len(row.prompt().input_ids)
        ids = batch["input_ids"][number, :tokens].tolist()
        for size in range(1, 4):
            body, behind = list(range(tokens - size)), list(range(tokens - size, tokens))
            places = body[: start - size] + behind + body[start - size :]
            if [ids[place] for place in places] == row.input_ids.tolist():
                order[number, :tokens] = torch.tensor(places)
    return {
        name: tensor.gather(1, order) if tensor.shape == batch["input_ids"].shape else tensor
        for name, tensor in batch.items()
    }


def training(trial: Trial) -> Outcome:
    """NF4 training in this process; plain transformers and PEFT load the adapter."""
    run = trial.subject.train()
    trial.trained = run
    base = AutoModelForImageTextToText.from_pretrained(trial.subject.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run.folder))
    moved = [value.abs().max().item() for name, value in model.named_parameters() if "lora_B" in name]
    still = sum(value == 0 for value in moved)
    if not moved or still == len(moved):
        return Outcome("wrong", "the adapter is zero")
    return Outcome("ok", f"{still} of {len(moved)} layers got no gradient" if still else "")


def packed(trial: Trial) -> Outcome:
    trial.packed = trial.subject.train_packed()  # type: ignore[attr-defined]
    return Outcome("ok")


def equal(trial: Trial) -> Outcome:
    if trial.trained is None or trial.outcomes["packed"].state != "ok":
        return Outcome("skipped")
    apart = difference(trial.packed.adapter(), trial.trained.adapter())  # type: ignore[attr-defined]
    return Outcome("ok" if apart < ADAPTER_TOLERANCE else "wrong", f"{apart:.1e}")


def stock(trial: Trial) -> Outcome:
    """Plain TRL and PEFT on the processor's own batches end at the same adapter from the same first one."""
    try:
        apart = stock_difference(trial, rows=2)
    except (IndexError, ValueError):  # not every processor takes rows with and without images together
        apart = stock_difference(trial, rows=1)
    return Outcome("ok" if apart < ADAPTER_TOLERANCE else "wrong", f"{apart:.1e}")


def stock_difference(trial: Trial, rows: int) -> float:
    """The distance of two adapters after steps of so many rows."""
    subject = trial.subject
    flags = {"quantization": "none", "dtype": "float32", "per_device_train_batch_size": rows}
    ours = subject.train(**flags)
    model = subject.new_adapter(**flags)
    names = trial.usable
    examples = {name: subject.encode(CASES[name]) for name in names}
    batches = iter([[names[row] for row in batch] for batch in ours.asked])
    arguments = SFTConfig(
        output_dir=str(subject.work / "stock"),
        max_steps=STEPS,
        per_device_train_batch_size=rows,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
        max_length=None,
        router_aux_loss_coef=0.0,  # routers are frozen
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"row": list(range(rows * STEPS))}),
        processing_class=subject.processor,
        data_collator=lambda some: stock_batch(subject, next(batches), examples),
    )
    trainer.remove_callback(PrinterCallback)
    if not subject.fused_head_agrees():
        trainer.compute_loss = own_loss  # TRL's loss is not that of the class
    trainer.train()
    theirs = {
        name.replace(".default.", "."): value.detach()
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    return difference(ours.adapter(), theirs)


def own_loss(model: Any, inputs: dict[str, torch.Tensor], **_: Any) -> torch.Tensor:
    """The mean loss of the labelled tokens under the class's own logits."""
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)


def stock_batch(subject: Subject, names: Sequence[str], examples: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The processor's own batch of these rows with the labels of `examples`, floats in float32."""
    inputs, labels = reference(subject, names, examples)
    batch = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()
    }
    return {**batch, "labels": labels}


def prompt(trial: Trial) -> Outcome:
    """What precedes the answer of a row is what the processor makes of its question to be answered."""
    subject = trial.subject
    if not subject.has_template:
        return Outcome("skipped")
    agrees, options = subject.encoder.template.agreement()
    wrong = []
    for name in trial.usable:
        if len(CASES[name].answers) > 1 or name in subject.only_as_text:
            continue
        if "date_string" in subject.encoder.template.renderer.source:
            options = {**options, "date_string": DATE}
        served = official(subject.processor, [CASES[name]], asked=True, **options)["input_ids"][0].tolist()
        trained = subject.encode(CASES[name]).prompt().input_ids.tolist()
        if trained != served:
            decode = subject.processor.tokenizer.decode
            wrong.append(f"{name}: trained {decode(trained)[-60:]!r}, served {decode(served)[-60:]!r}")
    if wrong:
        return Outcome("wrong", "; ".join(wrong))
    said = f"options {options}" if options else ""
    return Outcome("ok", said if agrees else f"{said} differs from the history")


def predict(trial: Trial) -> Outcome:
    subject = trial.subject
    model = subject.base()
    examples = [subject.encode(CASES[name]) for name in trial.usable]
    together = subject.answers(model, examples)
    alone = [subject.answers(model, [example])[0] for example in examples]
    if together != alone:
        return Outcome("wrong", f"in a batch {together}, alone {alone}")
    return Outcome("ok", str(alone))


def merge(trial: Trial) -> Outcome:
    if trial.trained is None:
        return Outcome("skipped")
    return Outcome("ok", trial.subject.merge(trial.trained.folder))


CHECKS = {
    "inspect": inspect,
    "labels": labels,
    "loss": loss,
    "prompt": prompt,
    "training": training,
    "stock": stock,
    "packed": packed,
    "equal": equal,
    "predict": predict,
    "merge": merge,
}
