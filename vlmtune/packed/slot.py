"""One trial in an engine: its adapter, how far it has come, and what it records. What `SFTTrainer` would do
for it alone."""

from __future__ import annotations

import json
import math
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy

from vlmtune.config.settings import Settings
from vlmtune.data.encoded_example import EncodedExample, shorten
from vlmtune.data.lengths import fitting_rows
from vlmtune.data.order import MicroBatch, Order
from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.model.lora import initial_a
from vlmtune.model.transfer import AsyncHostCopy, host_buffer
from vlmtune.packed.layers import AdapterLayout, Target
from vlmtune.packed.optim import AdapterOptimizer
from vlmtune.packed.passes import PIXELS, PassRow
from vlmtune.packed.worker_shard import SINGLE_WORKER, WorkerShard
from vlmtune.storage import filesystem
from vlmtune.training.report import Meter, evaluation
from vlmtune.training.setup import training_arguments

ADAPTER, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"
PREFIX = "base_model.model."  # of the layers' names in PEFT's files
COPIES = 3  # of a checkpoint, in numbers an adapter has: itself and AdamW's two averages


@dataclass
class Step:
    """An optimizer step under way: the rows of its micro-batches that have been through, and what they
    gave."""

    labelled: int
    loss: Tensor
    right: Tensor
    pictured: bool = False


class Slot:
    """A trial's training, one micro-batch at a time; the engine runs the rows that it asks for.

    Args:
        targets: the layers that get its adapter.
        checkpoint: a local folder to go on from, at the exact next row.
        shard: of the rows of every step, where several processes train this trial.

    Raises:
        DataError: a row for training does not fit `max_length`, and `on_long_row` is not "skip".
    """

    def __init__(
        self,
        trial_id: str,
        values: dict[str, Any],
        store: Store,
        targets: list[Target],
        lora_config: Any,
        *,
        runs_dir: str | None = None,
        checkpoint: str | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
        shard: WorkerShard = SINGLE_WORKER,
    ) -> None:
        self.shard = shard
        self.trial_id, self.targets, self.lora_config = trial_id, targets, lora_config
        self.settings = settings = Settings.from_flags(values)
        kept = fitting_rows(store, settings.training.max_length, settings.data.on_long_row)
        self.train_rows = store.rows_of(TRAIN)[kept]
        with tempfile.TemporaryDirectory() as nowhere:
            self.args = training_arguments(settings, nowhere, checkpointing=False)
        args = self.args
        self.order = Order(
            rows=len(kept),
            per_device=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            world=shard.world,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        steps = (
            args.max_steps
            if args.max_steps > 0
            else math.ceil(args.num_train_epochs * self.order.steps_per_epoch)
        )
        self.rank = settings.lora.r
        self.names = [target.name for target in targets]
        self.whole = self.layout = AdapterLayout(
            targets, self.rank
        )  # of this adapter alone, in which checkpoints are written
        self.scaling = settings.lora.alpha / (math.sqrt(self.rank) if settings.lora.use_rslora else self.rank)
        self.state, self.control = TrainerState(max_steps=steps), TrainerControl()
        self.state.compute_steps(args, steps)
        self.flow = DefaultFlowCallback()
        self.runs_dir = runs_dir
        # Event files are appended to, which no object store can.
        self.local_runs = (
            tempfile.mkdtemp(prefix="runs-") if runs_dir is not None and "://" in runs_dir else runs_dir
        )
        self.charged = 0.0  # seconds of the device that were this trial's
        self.meter = Meter(self.local_runs, progress, lambda: self.charged)
        self.first: dict[str, tuple[Tensor, Tensor]] | None = None
        self.resumed: dict[str, Any] | None = None
        if checkpoint is not None:
            self.state = TrainerState.load_from_json(f"{checkpoint}/{STATE}")
            self.resumed = torch.load(f"{checkpoint}/{OPTIMIZER}", map_location="cpu", weights_only=True)
            tensors = load_file(f"{checkpoint}/{ADAPTER}")
            halves = [[tensors[f"{PREFIX}{name}.lora_{half}.weight"] for half in "AB"] for name in self.names]
            self.first = {name: (a, b) for name, (a, b) in zip(self.names, halves, strict=True)}
        self.steps = self._steps(self.state.global_step)
        self.next: list[MicroBatch] = next(self.steps, [])  # of the step under way
        self.coming: list[MicroBatch] = next(self.steps, [])  # of the one after it
        self.position = 0  # rows of the step under way that have been through
        self.step: Step | None = None
        self.logged: list[Tensor] = []
        self.since_log = 0
        self.unread: tuple[dict[str, float], AsyncHostCopy] | None = None
        self.optimizer: AdapterOptimizer | None = None
        self.buffers: list[
            list[Tensor]
        ] = []  # for the copies of a checkpoint each, while none is written from them

    # The adapter

    def reserve(self) -> None:
        """Take the memory that the next checkpoint's copies need, in a thread that has time for it."""
        assert self.optimizer is not None
        self.buffers = [[host_buffer(self.optimizer.flat) for _ in range(COPIES)]]

    def _copies(self, flats: list[Tensor]) -> list[Tensor]:
        """Copies on the CPU that have their numbers when the stream has come so far; give them back to
        `buffers` once they are written."""
        buffers = self.buffers.pop() if self.buffers else []
        buffers = [buffer for buffer in buffers if buffer.shape == flats[0].shape]  # else of another layout
        buffers += [host_buffer(flat) for flat in flats[len(buffers) :]]
        for buffer, flat in zip(buffers, flats, strict=False):  # some optimizers keep no two averages
            buffer.copy_(flat.detach(), non_blocking=True)
        return buffers

    def lay_out(self, layout: AdapterLayout, device: torch.device) -> None:
        """Lay the adapter and its optimizer's state out in `layout`: from another layout, from the
        checkpoint, or anew."""
        old = self.optimizer
        before = self.layout if old is not None else self.whole

        def moved(flat: Tensor) -> Tensor:
            return layout.pack(before.unpack(flat, self.names, self.rank), device)

        flat = moved(old.flat) if old is not None else layout.pack(self._first_adapter(), device)
        new = AdapterOptimizer(flat, layout.always, self.args, self.state.max_steps)
        state = self.resumed
        if old is not None:
            state = old.state_dict()
            new.gradient.copy_(moved(old.gradient))
        if state is not None:  # not a new trial
            new.load_state_dict(
                {**state, "flat": {name: moved(average) for name, average in state["flat"].items()}}
            )
        self.layout, self.optimizer = (
            layout,
            new,
        )  # last: where the memory does not suffice, the trial stays as it was

    def _first_adapter(self) -> dict[str, tuple[Tensor, Tensor]]:
        seed, rank = self.args.seed, self.rank
        return self.first or {
            target.name: (
                initial_a(target.name, rank, target.in_features, seed=seed),
                torch.zeros(target.out_features, rank),
            )
            for target in self.targets
        }

    # Training

    @property
    def ended(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def wanted(self) -> list[int]:
        """The store's numbers of the rows of the next micro-batch; none where only other workers have
        some."""
        return self._numbers(self.next[:1])

    def rows(self, examples: dict[int, EncodedExample]) -> list[PassRow]:
        """The rows of the next micro-batch."""
        wanted = self.wanted()
        cut = [shorten(examples[row], self.settings.training.max_length) for row in wanted]
        if self.step is None:
            self.step = self._begin_step(examples)
        self.step.pictured |= any(PIXELS in example.tensors for example in cut)
        self.meter.begin()
        weight = 1 / max(self.step.labelled, 1)
        # By the row's place in the step of all workers, so that it does not depend on their number.
        places = [(self.position + place) * self.shard.world + self.shard.rank for place in range(len(cut))]
        keys = [zlib.crc32(f"{self.args.seed} {self.state.global_step} {place}".encode()) for place in places]
        rows = [
            replace(
                self.row(number, example),
                weight=weight,
                rate=self.settings.lora.dropout,
                key=key,
                dft=self.args.loss_type == "dft",
            )
            for number, example, key in zip(wanted, cut, keys, strict=True)
        ]
        self.position += len(rows)
        return rows

    def row(self, number: int, example: EncodedExample) -> PassRow:
        """A row to be evaluated with the adapter as it is."""
        assert self.optimizer is not None
        return PassRow(
            owner=self, number=number, example=example, adapter=self.optimizer.flat, scaling=self.scaling
        )

    def step_rows(self) -> list[int]:
        """The store's numbers of the rows that are left of the step under way."""
        return self._numbers(self.next)

    def coming_rows(self) -> list[int]:
        """Those of the step after it, to be read ahead."""
        return self._numbers(self.coming)

    def _numbers(self, batches: list[MicroBatch]) -> list[int]:
        return [int(self.train_rows[row]) for batch in batches if not batch.filler for row in batch.rows]

    def add_gradient(self, gradient: Tensor) -> None:
        assert self.optimizer is not None
        self.optimizer.gradient += gradient

    def end_micro_batch(self, rows: list[PassRow], found: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Take the losses of the micro-batch; after the last one of a step, update the adapter."""
        assert self.step is not None and self.optimizer is not None
        self.meter.count(rows=len(rows), tokens=sum(len(row.example.input_ids) for row in rows))
        if rows:
            losses, right = (
                torch.stack(parts) for parts in zip(*(found[id(row)] for row in rows), strict=True)
            )
            self.step.loss = self.step.loss + losses.sum() * rows[0].weight
            self.step.right = self.step.right + right.sum()
        self.next.pop(0)
        if self.next:
            return
        labelled = self._full(self.step.labelled) if self.shard.world == 1 else self._add_up(self.step)
        rate = self.optimizer.learning_rate
        norm = self.optimizer.step(pictured=self.step.pictured)
        self.state.global_step += 1
        done, per_epoch = divmod(self.state.global_step, self.order.steps_per_epoch)
        micro = per_epoch * self.order.accumulation
        self.state.epoch = done + micro / self.order.micro_batches_per_epoch
        self.logged.append(
            torch.stack([self.step.loss.double(), self.step.right.double(), norm.double(), labelled])
        )
        self.control = self.flow.on_step_end(self.args, self.state, self.control)
        if per_epoch == 0:
            self.control = self.flow.on_epoch_end(self.args, self.state, self.control)
        if self.ended and self.args.eval_strategy != IntervalStrategy.EPOCH:
            self.control.should_evaluate = True
        if self.ended and self.args.eval_strategy == IntervalStrategy.EPOCH and per_epoch:
            self.control.should_evaluate = True  # the part of an epoch that a number of steps leaves
        if self.control.should_log:
            numbers = {"learning_rate": rate, "epoch": self.state.epoch, "step": self.state.global_step}
            self.unread = numbers, AsyncHostCopy(torch.stack(self.logged))
            self.logged, self.control.should_log = [], False
        self.step, self.position = None, 0
        self.next, self.coming = self.coming, next(self.steps, [])

    def _add_up(self, step: Step) -> Tensor:
        """Make the gradient and the numbers of a step, which are over this worker's labelled tokens, those
        of all; returns how many."""
        assert self.optimizer is not None
        gradient, own = self.optimizer.gradient, step.labelled
        numbers = torch.stack([self._full(own), step.loss * own, step.right, self._full(step.pictured)]).to(
            gradient.dtype
        )
        gradients, sums = self.shard.all_reduce_sum(torch.cat([gradient * own, numbers])).split(
            [len(gradient), len(numbers)]
        )
        labelled: Tensor
        labelled, loss, step.right, pictured = sums.double().unbind()
        gradient.copy_(gradients / sums[0].clamp(min=1))
        step.loss = loss / labelled.clamp(min=1)
        if self.layout.always < self.layout.size:  # waits for the device
            step.pictured = bool(pictured > 0)
        return labelled

    def read_log(self) -> bool:
        """Log what the last step has left to be logged; returns whether loss and gradient are numbers
        still."""
        if self.unread is None:
            return True
        numbers, on_the_way = self.unread
        self.unread = None
        steps = on_the_way.tolist()
        loss = sum(step[0] for step in steps) / len(steps)
        accuracy = sum(step[1] for step in steps) / max(sum(step[3] for step in steps), 1)
        logs = {"loss": loss, "grad_norm": steps[-1][2], **numbers, "mean_token_accuracy": accuracy}
        self.state.log_history.append(logs)
        self.meter.log(
            {name: value for name, value in logs.items() if name != "step"},
            int(numbers["step"]),
            self.state.max_steps,
        )
        return all(math.isfinite(value) for step in steps for value in step)

    def _begin_step(self, examples: dict[int, EncodedExample]) -> Step:
        limit = self.settings.training.max_length
        labelled = sum(int((shorten(examples[row], limit).labels >= 0).sum()) for row in self.step_rows())
        return Step(labelled, self._full(0), self._full(0))

    def _full(self, value: float) -> Tensor:
        assert self.optimizer is not None
        return torch.full((), float(value), dtype=torch.float64, device=self.optimizer.flat.device)

    def _steps(self, step: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each step from `step` on."""
        while step < self.state.max_steps:
            epoch, within = divmod(step, self.order.steps_per_epoch)
            batches, size = self.order.epoch(epoch, self.shard.rank, within), self.order.accumulation
            left = min(self.order.steps_per_epoch - within, self.state.max_steps - step)
            yield from (batches[first * size : (first + 1) * size] for first in range(left))
            step += left

    # Records

    @property
    def evaluation(self) -> int:
        """Which of the evaluations of the whole run the present one is."""
        epochs = self.args.eval_strategy == IntervalStrategy.EPOCH
        return evaluation(
            vars(self.state) | {"step": self.state.global_step},
            None if epochs else self.settings.training.eval_steps,
        )

    def report(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What is reported with an evaluation's `metrics`."""
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        self.meter.log(metrics, self.state.global_step, self.state.max_steps)
        progress = {
            "step": self.state.global_step,
            "max_steps": self.state.max_steps,
            "epoch": float(self.state.epoch),
        }
        return {**metrics, **progress, **self.meter.summary()}

    def save(self, save_processor: Callable[[Path], None]) -> Callable[[Path], None]:
        """Take what a checkpoint holds as it is now; returns what writes it into a folder, which may be
        called while training goes on."""
        assert self.optimizer is not None
        layout, state = self.layout, self.optimizer.state_dict()
        device = self.optimizer.flat.device
        flats = {**state.pop("flat"), ADAPTER: self.optimizer.flat}
        copies = self._copies(list(flats.values()))  # training goes on while they are under way
        copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        names = list(flats)
        del flats
        progress = json.dumps(asdict(self.state), indent=2)

        def write(folder: Path) -> None:
            if copied is not None:
                copied.synchronize()
            parts = {
                name: layout.unpack(copy, self.names, self.rank)
                for name, copy in zip(names, copies, strict=False)
            }
            adapter = parts.pop(ADAPTER)
            averages = {name: self.whole.pack(part) for name, part in parts.items()}
            self.lora_config.inference_mode = True
            self.lora_config.base_model_name_or_path = self.settings.model.base_model
            self.lora_config.save_pretrained(str(folder))
            tensors = {
                f"{PREFIX}{name}.lora_{half}.weight": tensor
                for name, pair in adapter.items()
                for half, tensor in zip("AB", pair, strict=True)
            }
            save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
            save_processor(folder)
            torch.save({**state, "flat": averages}, folder / OPTIMIZER)
            (folder / STATE).write_text(progress)
            self.buffers.append(copies)

        return write

    def publish_runs(self) -> None:
        """Bring the TensorBoard events to where they belong, if that is no local folder."""
        if self.runs_dir is not None and self.local_runs != self.runs_dir:
            target, inner = filesystem(self.runs_dir)
            target.create_dir(inner, recursive=True)
            pafs.copy_files(self.local_runs, inner, destination_filesystem=target)
