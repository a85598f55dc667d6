"""The Tune Trainable of a packed trial. It takes a hundredth of a CPU and reads an engine's reports.

This process imports neither torch nor transformers: a search starts several of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import tune
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from vlmtune.config.settings import Settings
from vlmtune.errors import UserError
from vlmtune.packed.engine_client import EngineClient
from vlmtune.packed.messages import FAILURE, TRIAL_ID, VALUES, TrialRequest


class PackedTrial(tune.Trainable):
    """One evaluation of the trial is one Tune step."""

    client: EngineClient | None  # from the first step on
    name: str  # of the trial's folders
    values: dict[str, Any]  # its searched values, by flag name
    failure: str | None  # why the trial cannot be trained

    def setup(
        self,
        config: dict[str, Any],
        *,
        settings: Settings | None = None,
        engines: Sequence[ActorHandle[Any]] = (),
        output_dir: str = "",
    ) -> None:
        """Begin a trial.

        Args:
            config: the trial's searched values under VALUES, and its id under TRIAL_ID.
            settings: the settings of the search.
            engines: the engines to choose from.
            output_dir: the output folder of the search.
        """
        self.settings, self.engines = settings or Settings(), list(engines)
        self.output_dir = output_dir
        self._begin(config)

    def step(self) -> dict[str, Any]:
        if self.failure is None:
            try:
                if self.client is None:
                    request = self._request()
                    self.client = EngineClient(
                        self.engines, self.name, lambda engine: engine.join.remote(request)
                    )
                report = self.client.read_report()
            except RayTaskError:
                # An engine failed. Ray makes its error a UserError too, if the cause is one.
                raise
            except UserError as error:
                self.failure = str(error)
            else:
                return {**self.settings.search.unmeasured, **report.metrics, "done": report.last}
        return {FAILURE: self.failure, **self.settings.search.unmeasured, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, so that the search need not start another process."""
        self.cleanup()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        if self.client is not None:
            self.client.leave()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Save nothing: the engine writes the trial's checkpoints, and joining finds them."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None: ...

    def _begin(self, config: dict[str, Any]) -> None:
        """Set the trial's values. Only its first step joins an engine.

        Tune starts a trial again whose process ends in a step, but not one that has yet to begin.
        """
        self.name, self.values = config[TRIAL_ID], config[VALUES]
        self.client, self.failure = None, None

    def _request(self) -> TrialRequest:
        """What the engine needs to know of the trial.

        Raises:
            ConfigError: a searched value is not allowed, by itself or beside the others.
        """
        settings = self.settings.replace(**self.values)
        folder = f"{self.output_dir}/tune/train/{self.name}"
        return TrialRequest(self.name, settings, folder, f"{self.output_dir}/runs/{self.name}")
