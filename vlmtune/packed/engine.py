"""Many trials train over one frozen base: between two passes trials join and leave, and each goes its own
way through its own rows.

A round gives every trial one micro-batch. Their rows go through the base together, as `passes.cut_passes`
joins them; each trial then
updates its adapter when its own step is complete, and is evaluated when its own schedule says so.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from vlmtune.config.settings import Settings
from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.examples import read_examples
from vlmtune.data.split import EVAL
from vlmtune.data.store import Store
from vlmtune.errors import DoesNotFitError
from vlmtune.evaluation.objective import Objective, cached
from vlmtune.model.memory import is_out_of_memory
from vlmtune.model.mllama import pictured_layers
from vlmtune.packed.build import check_packable, packed_model
from vlmtune.packed.checkpoint_folder import save_checkpoint
from vlmtune.packed.layers import Target
from vlmtune.packed.messages import TrialReport
from vlmtune.packed.packed_model import PassResult
from vlmtune.packed.passes import PassRow, bucket_length
from vlmtune.packed.slot import Slot
from vlmtune.packed.worker_shard import SINGLE_WORKER, WorkerShard
from vlmtune.training.report import EVALUATION
from vlmtune.training.setup import adapter_config, operations

EVALUATED_AT_ONCE = 64  # rows of the evaluation set that are in memory at once
WRITERS = 4  # checkpoints at once: a trial's last report waits for its own
# checkpoints of a trial, each of which keeps adapter and averages in memory: a slower disk holds training up
UNWRITTEN = 2
NO_ROW_FITS = "out of GPU memory with one row: give a smaller --max_length or --lora_r, or --quantization nf4"
CACHED_BYTES = 2 * 2**30  # of examples that were read: all trials want the same rows


class Engine:
    """The base and the trials on it. One thread calls `round` again and again, and `join` and `leave`
    between rounds.

    Args:
        values: settings that all trials share.
        trials: how many shall train at once, and `rank`: the highest rank among them, for the plan of
        memory; `self.trials`: how many can.
        deliver: takes a trial's reports by its id, in order: the last one from another thread.
        shard: this process's part, where several train the same trials; the first one delivers and writes.
        largest: settings that ask for at least the memory of every trial, to plan for where it is there.

    Raises:
        DoesNotFitError: not even one row at a time would fit in the GPU's memory.
    """

    def __init__(
        self,
        values: dict[str, Any],
        store: Store,
        *,
        trials: int,
        rank: int,
        deliver: Callable[[str, TrialReport], None],
        note: Callable[[str], None],
        shard: WorkerShard = SINGLE_WORKER,
        largest: dict[str, Any] | None = None,
    ) -> None:
        self.shard = shard
        settings = Settings.from_flags(values)
        self.store, self.deliver, self.metric = store, deliver, settings.search.metric
        self.objective = Objective.of(settings)
        self.early_stopping = settings.search.early_stopping != "none"
        planned = Settings.from_flags(largest) if largest is not None else None
        self.model, self.trials = packed_model(settings, store, trials, rank, note, planned)
        self.operations = operations(self.model.base.get_decoder())
        self.empty = settings.model.ref.outline()
        self.pictured = pictured_layers(self.empty)
        self.processor = settings.model.ref.processor()
        self.slots: dict[str, Slot] = {}
        self.round_seconds = 0.0  # of the last one's training
        self.folders: dict[str, str] = {}
        self.examples = ExampleCache(store)
        self.writer = ThreadPoolExecutor(WRITERS, thread_name_prefix="checkpoints")
        self.saving = Lock()  # the processor is one for all
        self.writing: list[Future[None]] = []
        self.writes: dict[str, deque[Future[None]]] = defaultdict(
            partial(deque, maxlen=UNWRITTEN)
        )  # the latest of each trial

    def slot(
        self,
        trial_id: str,
        values: dict[str, Any],
        *,
        runs_dir: str | None,
        checkpoint: str | None,
        **rest: Any,
    ) -> Slot:
        """A trial that is ready to `join`. Takes a second or less, and may be called from any thread.

        Raises:
            ConfigError: its values cannot be trained packed.
            DataError: a row for training does not fit its `max_length`.
            ModelError: its target modules match nothing.
        """
        settings = Settings.from_flags(values)
        check_packable(settings)
        names, config = adapter_config(settings, self.empty)
        targets = [self._target(name) for name in names]
        return Slot(
            trial_id,
            values,
            self.store,
            targets,
            config,
            runs_dir=runs_dir,
            checkpoint=checkpoint,
            shard=self.shard,
            **rest,
        )

    def join(self, slot: Slot, folder: str) -> None:
        """Let a trial take part from the next round on; its checkpoints go to `folder`. One that finds no
        memory ends as infeasible."""
        slot.meter.operations = self.operations
        before = self.model.layout
        try:
            slot.lay_out(
                slot.whole, torch.device("cpu")
            )  # what does not even fit alone must not change the others' layout
            if anew := self.model.fit(slot.targets, slot.rank):
                for other in self.slots.values():
                    other.lay_out(self.model.layout, self.model.device)
            slot.lay_out(self.model.layout, self.model.device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.model.use(before)
            for other in self.slots.values():
                if other.layout is not before:
                    other.lay_out(before, self.model.device)
            self._end(slot, self._infeasible())
            return
        self.slots[slot.trial_id], self.folders[slot.trial_id] = slot, folder
        if self.shard.rank == 0:
            for one in self.slots.values() if anew else [slot]:
                self.writer.submit(
                    one.reserve
                )  # what fails there fails again, and is told, where the checkpoint is taken

    def leave(self, trial_id: str) -> None:
        """Let a trial go; nothing happens where it has gone already."""
        slot = self.slots.pop(trial_id, None)
        if slot is not None:
            slot.meter.close()

    def round(self, parked: Container[str] = ()) -> bool:
        """One micro-batch of every trial but the parked ones; returns whether there was one."""
        started = time.monotonic()
        self._raise_of_writer()
        slots = [slot for slot in self.slots.values() if slot.trial_id not in parked]
        if not slots:
            self._read_logs()
            return False
        reading = time.monotonic()
        examples = self.examples.get([row for slot in slots for row in slot.step_rows()])
        waited = time.monotonic() - reading
        rows = {slot: slot.rows(examples) for slot in slots}
        self.examples.prefetch([row for slot in slots for row in slot.coming_rows()])
        found = self.model.add_gradients([row for mine in rows.values() for row in mine], Slot.add_gradient)
        self._read_logs()  # of the round before, while the device works on this one
        self._end_too_large(found)
        for slot, mine in rows.items():
            if slot.trial_id in self.slots:
                slot.end_micro_batch(mine, found.rows)
        evaluated = [slot for slot in slots if slot.control.should_evaluate]
        if evaluated:
            self._read_logs()
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)  # what it still has to do is training
        self._share_time(rows, time.monotonic() - started, waited)
        self._evaluate([slot for slot in evaluated if slot.trial_id in self.slots])
        return True

    def settle(self, trial_id: str) -> None:
        """Wait for the checkpoints of a trial that has left; may be called from any thread."""
        for write in list(self.writes[trial_id]):
            write.exception()  # raised in the next round

    def close(self) -> None:
        """Write what is left to be written."""
        self.writer.shutdown()
        self._raise_of_writer()

    def _target(self, name: str) -> Target:
        layer = self.empty.get_submodule(name)
        return Target(name, layer.in_features, layer.out_features, pictured=name in self.pictured)

    def _share_time(self, rows: dict[Slot, list[PassRow]], seconds: float, waited: float) -> None:
        """Charge every trial for its share of a round, by tokens, so that the seconds of all trials add up
        to the device's."""
        self.round_seconds = seconds
        tokens = {
            slot: sum(bucket_length(len(row.example.input_ids)) for row in mine)
            for slot, mine in rows.items()
        }
        for slot, count in tokens.items():
            part = count / max(sum(tokens.values()), 1)  # of several workers, one may have no row in a round
            slot.charged += seconds * part
            slot.meter.waited += waited * part

    def _read_logs(self) -> None:
        """Log what the round before has left; a trial whose numbers are none any more ends here, alone."""
        for slot in list(self.slots.values()):
            if not slot.read_log():
                metrics = {"eval_loss": math.nan, "eval_seconds": 0.0, self.metric: math.nan}
                self._end(slot, {**slot.report(metrics), EVALUATION: slot.evaluation})

    def _evaluate(self, slots: Sequence[Slot]) -> None:
        """Evaluate trials on all evaluation rows at full length, together, and report each with a
        checkpoint."""
        if not slots:
            return
        started = time.monotonic()
        total = {slot: torch.zeros(2, dtype=torch.float64, device=self.model.device) for slot in slots}
        every = [int(row) for row in self.store.rows_of(EVAL)]
        mine = every[self.shard.rank :: self.shard.world]
        for first in range(0, len(mine), EVALUATED_AT_ONCE):
            part = mine[first : first + EVALUATED_AT_ONCE]
            examples = self.examples.get(part)
            rows = {slot: [slot.row(row, examples[row]) for row in part] for slot in slots}
            found = self.model.losses([row for mine in rows.values() for row in mine])
            self._end_too_large(found)
            slots = [slot for slot in slots if slot not in found.too_large]
            for slot in slots:
                labelled = sum(int((row.example.labels >= 0).sum()) for row in rows[slot])
                total[slot][0] += torch.stack([found.rows[id(row)][0] for row in rows[slot]]).double().sum()
                total[slot][1] += labelled
        sums = {slot: self.shard.all_reduce_sum(total[slot]).tolist() for slot in slots}
        answered = {slot: self._answer(slot, every) for slot in slots}
        seconds = time.monotonic() - started
        reports = {}
        for slot in slots:
            loss, labelled = sums[slot]
            reports[slot] = self._report(
                slot, {"eval_loss": loss / labelled, **answered[slot], "eval_seconds": seconds / len(slots)}
            )
        for slot, report in reports.items():
            self._keep(slot, report)

    def _answer(self, slot: Slot, rows: Sequence[int]) -> dict[str, float]:
        """The metric of a trial's answers, where the search is for one."""
        if self.objective is None or slot.optimizer is None:
            return {}
        read = cached(self.examples.get(rows))
        with self.model.selected(slot.optimizer.flat, slot.scaling) as model:
            rank, world = self.shard.rank, self.shard.world
            return self.objective.measure(
                model, self.processor, self.store, read, last=slot.ended, rank=rank, world=world
            )

    def _report(self, slot: Slot, metrics: dict[str, float]) -> TrialReport:
        """Report a trial's evaluation, unless it is the last one, which waits for its checkpoint: that is
        what remains.

        The search decides about a trial while checkpoints are taken and written, so that one that is stopped
        hardly trains on; what an
        engine that died has not written it trains, and reports, once more.
        """
        slot.control.should_evaluate = False
        report = TrialReport(
            {**slot.report(metrics), EVALUATION: slot.evaluation, "checkpoint_path": self._folder(slot)},
            slot.ended,
        )
        if self.shard.rank == 0 and not report.last:
            self.deliver(slot.trial_id, report)
        return report

    def _keep(self, slot: Slot, report: TrialReport) -> None:
        """Take a checkpoint of a trial that was evaluated; it is written while the next rounds run."""
        if self.shard.rank == 0:
            write = slot.save(self._save_processor)
            self._submit(slot.trial_id, partial(self._write, slot, write, self._folder(slot), report))
        if slot.ended:
            self.leave(slot.trial_id)

    def _folder(self, slot: Slot) -> str:
        return f"{self.folders[slot.trial_id]}/checkpoint-{slot.state.global_step}"

    def _write(self, slot: Slot, write: Callable[[Path], None], folder: str, report: TrialReport) -> None:
        save_checkpoint(write, folder, report.metrics)
        slot.publish_runs()
        if report.last:
            self.deliver(slot.trial_id, report)

    def _save_processor(self, folder: Path) -> None:
        with self.saving:
            self.processor.save_pretrained(str(folder))

    def _end_too_large(self, found: PassResult) -> None:
        for slot in found.too_large:
            if slot.trial_id in self.slots:  # else its numbers have ended it just now
                self._end(slot, self._infeasible())

    def _infeasible(self) -> dict[str, Any]:
        if self.shard.world > 1:  # the others would wait for ever for its part of the step
            raise DoesNotFitError(NO_ROW_FITS)
        return {self.metric: math.nan, "infeasible": True, EVALUATION: 0}

    def _end(self, slot: Slot, metrics: dict[str, Any]) -> None:
        """Evict a trial with its last report."""
        self.leave(slot.trial_id)
        self._submit(slot.trial_id, partial(self.deliver, slot.trial_id, TrialReport(metrics, True)))

    def _submit(self, trial_id: str, work: Callable[[], None]) -> None:
        """Let a thread do what is left of a trial's report, after that of the one before."""
        writes = self.writes[trial_id]
        before = list(writes)[
            -1:
        ]  # handed in earlier, so it is under way already and cannot wait for this one
        if len(writes) == UNWRITTEN:
            writes[0].exception()

        def run() -> None:
            for write in before:
                write.result()
            work()

        writes.append(self.writer.submit(run))
        self.writing.append(writes[-1])

    def _raise_of_writer(self) -> None:
        for done in [future for future in self.writing if future.done()]:
            self.writing.remove(done)
            done.result()


class ExampleCache:
    """Examples that were read from a store, the latest of them in memory; the next ones are read ahead in a
    thread."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.kept: OrderedDict[int, EncodedExample] = OrderedDict()
        self.size = 0
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self.ahead: Future[None] | None = None

    def get(self, rows: Sequence[int]) -> dict[int, EncodedExample]:
        """The examples of these rows, by the store's number."""
        if self.ahead is not None:
            self.ahead.result()
            self.ahead = None
        wanted = list(dict.fromkeys(rows))
        self._read(wanted)
        found = {row: self.kept[row] for row in wanted}
        for row in wanted:
            self.kept.move_to_end(row)
        while self.size > CACHED_BYTES and len(self.kept) > len(wanted):
            self.size -= _bytes(self.kept.popitem(last=False)[1])
        return found

    def prefetch(self, rows: Sequence[int]) -> None:
        """Read these rows now, beside other work; `get` waits for it."""
        self.ahead = self.reader.submit(self._read, list(dict.fromkeys(rows)))

    def _read(self, rows: Sequence[int]) -> None:
        missing = [row for row in rows if row not in self.kept]
        for row, example in zip(missing, read_examples(self.store, missing), strict=True):
            self.kept[row] = example
            self.size += _bytes(example)


def _bytes(example: EncodedExample) -> int:
    return int(
        example.input_ids.nbytes
        + example.kinds.nbytes
        + sum(tensor.nbytes for tensor in example.tensors.values())
    )
