"""All that the family tests use of vlmtune, in one place and in this process."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import torch
from safetensors.torch import load_file
from trl.trainer.utils import add_fused_lm_head

from families.cases import CASES, Case, official
from vlmtune.config.settings import Settings
from vlmtune.data.cache import find_or_make_store
from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.find_input_format import find_input_format
from vlmtune.data.order import BatchRows
from vlmtune.data.source import DataSource
from vlmtune.data.store import Store
from vlmtune.data.stream import read_batches
from vlmtune.data.template_rendering import FIXED_DATE
from vlmtune.data.tokenize import EncodeError, RowEncoder
from vlmtune.errors import UserError
from vlmtune.evaluation import export
from vlmtune.evaluation.generate import BatchBuilder, end_tokens, generate
from vlmtune.model.base import load_base_for
from vlmtune.model.head import add_positions_argument, fused_head_agrees
from vlmtune.model.lora import attach
from vlmtune.model.memory import StepPlan
from vlmtune.model.step import AcceleratedStep
from vlmtune.model_ref import ModelRef
from vlmtune.packed.engine import Engine
from vlmtune.packed.loss import row_losses
from vlmtune.preflight.memory import gpu_memory
from vlmtune.preflight.statistics import summarize
from vlmtune.training.adapted_model import adapter_config
from vlmtune.training.loop import train

PLAIN = (UserError, EncodeError)  # what a person is told in one line
STEPS = 4
DATE = FIXED_DATE.strftime("%d %b %Y")  # what templates write for today's


@dataclass
class Trained:
    """What a run left behind: its adapter's folder and which rows it was given in which batch."""

    folder: Path
    asked: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter_model.safetensors")


class Subject:
    """One model folder with the rows that it is tried on."""

    def __init__(self, model: Path, rows: tuple[Path, Path], work: Path) -> None:
        self.model, self.work = model, work
        self.train_rows, self.eval_rows = rows
        work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def processor(self) -> Any:
        return ModelRef(str(self.model)).processor()

    @cached_property
    def batches(self) -> BatchBuilder:
        pad = self.processor.tokenizer.pad_token_id
        return BatchBuilder(
            find_input_format(self.processor), self.processor.tokenizer.eos_token_id if pad is None else pad
        )

    @cached_property
    def encoder(self) -> RowEncoder:
        return RowEncoder(self.processor, self.batches.input_format)

    def encode(self, case: Case) -> EncodedExample:
        return self.encoder.encode(case.messages(), case.pixels())

    @property
    def has_template(self) -> bool:
        return bool(self.processor.chat_template or self.processor.tokenizer.chat_template)

    @cached_property
    def only_as_text(self) -> list[str]:
        """The cases that the processor's own chat path does not take, for whatever reason."""
        refused = []
        for name, case in CASES.items():
            try:
                official(self.processor, [case], asked=True)
            except (TypeError, ValueError, jinja2.TemplateError):
                refused.append(name)
        return refused

    @cached_property
    def store(self) -> Store:
        """All rows, to train on; `on_bad_row` skip. Needs a running Ray."""
        source = DataSource(
            str(self.train_rows),
            ModelRef(str(self.model)),
            eval_data_path=str(self.eval_rows),
            test_fraction=0.0,
            on_bad_row="skip",
            max_bad_fraction=1.0,
        )
        return find_or_make_store(source, str(self.work / "cache"))

    def settings(self, **flags: Any) -> Settings:
        base = {
            "model_name_or_path": str(self.model),
            "data_path": str(self.train_rows),
            "eval_data_path": str(self.eval_rows),
            "on_bad_row": "skip",
            "max_bad_fraction": 1.0,
            "quantization": "nf4",
            "use_cpu": True,
            "lr_scheduler_type": "constant",
            "learning_rate": 1e-3,
            "lora_dropout": 0.0,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "max_length": None,
            "max_steps": STEPS,
            "gradient_checkpointing": False,
            "cuda_graphs": False,
        }
        return Settings.from_flags({**base, **flags})

    def inspect(self) -> tuple[Any, str]:
        """The preflight's summary of all rows, and its line on memory."""
        settings = self.settings()
        summary = summarize(self.store, settings, self.processor.tokenizer)
        return summary, gpu_memory(settings, self.store)

    def batch(self, examples: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
        """The rows as the model takes them, in float32."""
        return self.batches.batch(SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32), examples)

    def losses(self, examples: Sequence[EncodedExample], *, quantization: str = "none") -> list[float]:
        """The summed loss of each row, as a training step computes it, rows in one batch."""
        settings = self.settings(quantization=quantization)
        base = load_base_for(settings, torch.device("cpu"))
        AcceleratedStep(base, StepPlan(False, False, 1, False), note=print)
        add_fused_lm_head(base, outputs=("log_probs", "is_top1"))
        add_positions_argument(base)
        base.eval()
        batch = self.batches.batch(base, examples)
        with torch.no_grad():
            return row_losses(base, batch).loss.tolist()

    def train(self, **flags: Any) -> Trained:
        """An isolated run."""
        result = Trained(self.work / f"run-{len(list(self.work.glob('run-*')))}")

        def rows(
            split: str, batches: Sequence[BatchRows], length: int | None
        ) -> Iterator[dict[str, torch.Tensor]]:
            if split == "train":
                result.asked.extend([int(row) for row in batch.rows] for batch in batches)
            yield from read_batches(self.store, split, batches, length)

        def report(metrics: dict[str, Any], folder: str) -> None:
            result.losses.append(metrics["eval_loss"])
            shutil.copytree(folder, result.folder / "adapter", dirs_exist_ok=True)

        def progress(step: dict[str, Any]) -> None:
            if "loss" in step:
                result.losses.append(step["loss"])

        work = str(result.folder)
        train(
            self.settings(**flags),
            self.store,
            read_batches=rows,
            report=report,
            work_dir=work,
            progress=progress,
        )
        result.folder = result.folder / "adapter"
        return result

    def train_packed(self, **flags: Any) -> Trained:
        """The same run in an engine, beside a second trial."""
        folder = self.work / f"packed-{len(list(self.work.glob('packed-*')))}"
        reports: list[Any] = []

        def deliver(name: str, report: Any) -> None:
            if name == "one":
                reports.append(report)

        trials = {
            "one": self.settings(**flags),
            "other": self.settings(**flags, learning_rate=3e-3, lora_r=4),
        }
        engine = Engine(
            trials["one"], self.store, trials=2, max_lora_rank=16, deliver=deliver, note=lambda line: None
        )
        for name, settings in trials.items():
            options = {"folder": f"{folder}/{name}", "checkpoint": None, "on_log": lambda step: None}
            engine.join(engine.slot_factory.make(name, settings, **options))
        while engine.train_round():
            pass
        engine.close()
        last = reports[-1].metrics
        return Trained(Path(last["checkpoint_path"]), losses=[last["eval_loss"]])

    def new_adapter(self, **flags: Any) -> Any:
        """The base with the fresh adapter that training begins with, on plain PEFT layers."""
        settings = self.settings(**flags)
        base = load_base_for(settings, torch.device("cpu"))
        return attach(base, adapter_config(settings, base)[1], seed=settings.training.seed)

    def base(self) -> Any:
        """The base in float32, as evaluation loads it."""
        settings = self.settings(quantization="none", dtype="float32")
        return load_base_for(settings, torch.device("cpu")).eval()

    def fused_head_agrees(self) -> bool:
        base = self.base()
        add_fused_lm_head(base)
        return fused_head_agrees(base)

    def answers(self, model: Any, examples: Sequence[EncodedExample]) -> list[str]:
        ends = end_tokens(model, self.processor)
        return generate(model, self.processor.tokenizer, self.batches, examples, max_new_tokens=8, ends=ends)

    def merge(self, adapter: Path) -> str:
        """Merge into a folder and read it again; the text of how near the two are."""
        folder = self.work / "merged"
        folder.mkdir(exist_ok=True)
        settings = self.settings(quantization="none", dtype="float32")
        return export.merge(settings, str(adapter), str(folder)).text()


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The norm of what differs, relative to the norm of `other`."""
    if one.keys() != other.keys():
        missing = sorted(one.keys() ^ other.keys())
        raise AssertionError(f"{len(missing)} tensors are in one adapter only, for example {missing[0]}")
    flat = [torch.cat([adapter[name].flatten() for name in sorted(adapter)]) for adapter in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())
