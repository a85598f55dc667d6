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

from families.cases import CASES, official, row_loss
from families.common import Family
from families.kit import PLAIN, STEPS, Subject, Trained, difference

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
    expected, wrong = {}, []
    for name, example in examples.items():
        case, ids = CASES[name], torch.from_numpy(example.input_ids.astype("int64"))
        inputs = official(subject.processor, [case], [subject.text(case)])
        if len(inputs["input_ids"][0]) == len(ids) - 1:  # the template does not close the last answer
            inputs = official(subject.processor, [case], [subject.encoder.chat_text(case.messages())])
        if inputs["input_ids"][0, : len(ids)].tolist() != ids.tolist():
            wrong.append(
                f"{name}: {len(ids)} tokens differ from the processor's {inputs['input_ids'].shape[1]}"
            )
            continue
        expected[name] = row_loss(model, inputs, torch.from_numpy(example.labels))
    groups = [[name] for name in expected] + ([list(expected)] if len(expected) > 1 else [])
    for group in groups:
        found = subject.losses([examples[name] for name in group])
        for name, value in zip(group, found, strict=True):
            total, count = expected[name]
            if not abs(value - total) / count <= LOSS_TOLERANCE * max(1.0, total / count):
                where = "alone" if len(group) == 1 else "in a batch"
                if (
                    where == "in a batch"
                    and abs(value - batched(trial, model, group, examples)[name]) / count < 1e-4
                ):
                    continue  # rows of a batch change each other's losses in transformers too
                wrong.append(f"{name} {where}: {value / count:.5f}, transformers {total / count:.5f}")
    return Outcome("wrong", "; ".join(wrong)) if wrong else Outcome("ok")


def batched(trial: Trial, model: Any, names: Sequence[str], examples: dict[str, Any]) -> dict[str, float]:
    """The summed loss of each row in the processor's own batch, under the transformers class."""
    batch = stock_batch(trial.subject, names, examples)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[:, :-1].double().transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:], ignore_index=-100, reduction="none")
    return dict(zip(names, losses.sum(1).tolist(), strict=True))


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
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"row": list(range(rows * STEPS))}),
        processing_class=subject.processor,
        data_collator=lambda some: stock_batch(subject, next(batches), examples),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    theirs = {
        name.replace(".default.", "."): value.detach()
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    return difference(ours.adapter(), theirs)


def stock_batch(subject: Subject, names: Sequence[str], examples: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The processor's own batch of these rows, padded on the right, with the labels of `examples`."""
    cases = [CASES[name] for name in names]
    batch = official(subject.processor, cases, [subject.text(case) for case in cases])
    lengths = batch["attention_mask"].sum(1).tolist()
    if any(length < len(examples[name].labels) for name, length in zip(names, lengths, strict=True)):
        # the template does not close the last answer
        batch = official(
            subject.processor, cases, [subject.encoder.chat_text(case.messages()) for case in cases]
        )
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    for row, name in enumerate(names):
        labels = torch.from_numpy(examples[name].labels)
        batch["labels"][row, : len(labels)] = labels
    return batch


def prompt(trial: Trial) -> Outcome:
    """What precedes an answer in training is what the chat template writes when it is asked for one."""
    if trial.subject.text(CASES["single"]) is not None:
        return Outcome("skipped")
    name = next(name for name in ("single", "long", "text") if name in trial.usable)
    trained, served = trial.subject.prompt_texts(CASES[name])
    tails = [text[-40:] for text in served]
    for text, tail in zip(("by default", "without thinking"), tails, strict=True):
        if trained.endswith(tail):
            return Outcome("ok", "" if text == "by default" else text)
    return Outcome("wrong", f"trained {trained[-40:]!r}, served {tails}")


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
