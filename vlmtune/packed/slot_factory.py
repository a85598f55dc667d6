"""Makes the slots of an engine's trials."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

from vlmtune.config.settings import Settings
from vlmtune.data.store import Store
from vlmtune.packed.layers import TargetLayer
from vlmtune.packed.packable import check_packable
from vlmtune.packed.packed_result import target_layers
from vlmtune.packed.slot import Slot
from vlmtune.packed.worker_shard import WorkerShard
from vlmtune.training.adapted_model import adapter_config


class SlotFactory:
    """Makes slots while other trials train: it finds their target layers in a model without weights.

    Args:
        settings: the settings of the engine.
        flops_per_token: floating-point operations of training on one token.
        shard: this process's part of every trial's rows.
    """

    def __init__(self, settings: Settings, store: Store, flops_per_token: float, shard: WorkerShard) -> None:
        self.store, self.flops_per_token, self.shard = store, flops_per_token, shard
        self.meta_model = settings.model.ref.meta_model()

    def make(self, trial_id: str, settings: Settings, **options: Any) -> Slot:
        """Make a trial ready to join the engine. Takes a second or less; any thread may call it.

        Args:
            options: `folder`, `runs_dir`, `checkpoint` and `on_log` of `Slot`.

        Raises:
            ConfigError: the settings cannot be trained packed.
            DataError: a training row does not fit its `max_length`.
            ModelError: its target modules match nothing.
        """
        check_packable(settings)
        targets, lora_config = self._find_targets(settings)
        return Slot(
            trial_id,
            settings,
            self.store,
            targets,
            lora_config,
            shard=self.shard,
            flops_per_token=self.flops_per_token,
            **options,
        )

    def _find_targets(self, settings: Settings) -> tuple[list[TargetLayer], LoraConfig]:
        names, config = adapter_config(settings, self.meta_model)
        return target_layers(self.meta_model, names), config
