"""The self-check: compares a model's steps with the plain model on two training rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from vlmtune import __version__, storage
from vlmtune.config.settings import Settings
from vlmtune.data.collate import collate, split_batch
from vlmtune.data.encoded_example import EncodedExample, shorten
from vlmtune.data.examples import read_examples
from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.library_errors import lacks_memory, plain_library_errors
from vlmtune.model.acceleration import Acceleration
from vlmtune.model.lora import initial_a
from vlmtune.model.memory import StepPlan
from vlmtune.model.self_check import Batch, StepComparison, StepResult, attention_has_dropout, plain_result

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
KEY_LETTERS = 16
RANDOM = "self-check left out: the model's attention has dropout, so no two of its steps are equal"
NO_MEMORY = "self-check left out: the plain model's step does not fit in the memory"


@dataclass(frozen=True)
class CheckedRows:
    """Two training rows of unequal length, an image in one of them if any row has one.

    Attributes:
        numbers: numbers of the two rows in the store.
        multiple: the step pads its batches to a multiple of this many tokens.
    """

    numbers: list[int]
    examples: list[EncodedExample]
    store: Store
    multiple: int

    @classmethod
    def choose(cls, store: Store, usable: np.ndarray, max_length: int | None, multiple: int) -> CheckedRows:
        """Choose short rows, so that the plain model has room for them without checkpointing.

        Args:
            usable: the rows of the training split that are trained on.
            multiple: the step pads its batches to a multiple of this many tokens.
        """
        rows = store.rows_of(TRAIN)[usable]
        tokens, images = store.column("tokens"), store.column("image_tokens") > 0
        ordered = rows[np.argsort(tokens[rows], kind="stable")]
        with_image = ordered[images[ordered]]
        first = (with_image if len(with_image) else ordered)[0]
        others = with_image if len(with_image) > 1 else ordered
        longer = others[tokens[others] > tokens[first]]
        # The row at the first quarter of the longer rows: of another length, but seldom long. If there is
        # only one row, it is taken twice.
        second = longer[len(longer) // 4] if len(longer) else others[-1]
        numbers = [int(first), int(second)]
        examples = [shorten(example, max_length) for example in read_examples(store, numbers)]
        return cls(numbers, examples, store, multiple)

    def batch(self, base: Any, examples: Sequence[EncodedExample]) -> Batch:
        """The inputs of the model for some rows, padded as in a step."""
        meta = self.store.meta
        arrays = collate(
            examples,
            pad_token_id=meta.pad_token_id,
            input_format=meta.input_format,
            pad_to_multiple_of=self.multiple,
        )
        tensors = {name: torch.from_numpy(array).to(base.device) for name, array in arrays.items()}
        return meta.input_format.normalize(next(split_batch(tensors, len(examples))), base.dtype)

    def alone(self, base: Any) -> list[Batch]:
        """Each row in a batch of its own, without padding."""
        unpadded = replace(self, multiple=1)
        return [unpadded.batch(base, [example]) for example in self.examples]


@dataclass(frozen=True)
class SelfCheck:
    """Two rows through the model as transformers made it, then through the step as it will run.

    `record_reference` has to come before anything changes the model, `compare_with_reference` when the step
    is ready.

    Attributes:
        file: where its result is stored for later runs.
        initial_a: the LoRA matrix A `[R, D]` of each layer that gets an adapter, by the layer's full name.
        left_out_before: the names of accelerations to leave out, from an earlier run; None without one.
        comparison: compares the step with the plain model; None if an earlier run has done so.
    """

    file: str
    rows: CheckedRows
    initial_a: dict[str, torch.Tensor]
    note: Callable[[str], None]
    left_out_before: list[str] | None
    comparison: StepComparison | None

    @classmethod
    def record_reference(
        cls,
        settings: Settings,
        base: Any,
        targets: Sequence[str],
        rows: CheckedRows,
        plan: StepPlan,
        note: Callable[[str], None],
        dtype: torch.dtype,
        *,
        packed: bool = False,
    ) -> SelfCheck | None:
        """Run the rows through the model as transformers made it, unless an earlier run has done so.

        Args:
            targets: full names of the layers that get an adapter.
            dtype: the dtype in which the step computes.
            packed: whether the step is one of packed trials.

        Returns:
            None if the settings leave the check out, or the plain model does not fit in memory.
        """
        if not settings.training.self_check:
            return None
        if attention_has_dropout(base):
            note(RANDOM)
            return None
        key = _key(settings, base, targets, plan, packed)
        file = f"{rows.store.folder.rpartition('/')[0]}/self_check.{key}.json"
        first_values = {
            name: initial_a(
                name, settings.lora.r, base.get_submodule(name).in_features, seed=settings.training.seed
            ).to(base.device)
            for name in targets
        }
        if storage.exists(file):
            left_out = json.loads(storage.read_text(file))["left_out"]
            return cls(file, rows, first_values, note, left_out, None)
        alone = rows.alone(base)
        try:
            with plain_library_errors(base.name_or_path, "a backward pass through its class"):
                plain = plain_result(base, alone, first_values)
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            note(NO_MEMORY)
            return None
        name = str(settings.model.model_name_or_path)
        return cls(file, rows, first_values, note, None, StepComparison(name, plain, dtype, note))

    def compare_with_reference(
        self, accelerations: Sequence[Acceleration], run: Callable[[Sequence[int]], StepResult]
    ) -> None:
        """Find out which accelerations make the step wrong, and leave them out.

        Args:
            run: runs the rows at these places of `rows` through the step in one batch.

        Raises:
            ModelError: the step is wrong even without accelerations.
        """
        if self.left_out_before is not None:
            for acceleration in accelerations:
                if acceleration.name in self.left_out_before:
                    acceleration.switch(False)
            if self.left_out_before:
                self.note(f"self-check of an earlier run: {' and '.join(self.left_out_before)} left out")
            return
        assert self.comparison is not None
        places = range(len(self.rows.examples))

        def alone() -> StepResult:
            results = [run([place]) for place in places]
            sums = {name: sum(one.gradients[name] for one in results) for name in self.initial_a}
            return StepResult(torch.cat([one.losses for one in results]), sums)  # type: ignore[arg-type]

        try:
            names = self.comparison.verify(accelerations, lambda: run(places), alone)
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            self.note(NO_MEMORY)
            return
        storage.write_json(self.file, {"left_out": names})


def _key(settings: Settings, base: Any, targets: Sequence[str], plan: StepPlan, packed: bool) -> str:
    """A key of everything that the result depends on: model config, step, library versions and device."""
    device = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else "cpu"
    model, training = settings.model, settings.training
    parts = [
        base.config.to_json_string(),
        model.base_quantization,
        str(base.dtype),
        str(model.attn_implementation),
        list(targets),
        [plan.compiled, plan.checkpointing, plan.dequantized, plan.offload, plan.room_for_graphs],
        [training.bf16, training.fp16, training.cuda_graphs],
        settings.lora.use_dora,
        packed,
        device,
        __version__,
        *(version(library) for library in LIBRARIES),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:KEY_LETTERS]
