"""The Tune Trainable of a packed trial. An engine trains the trial; this process reads its reports.

It reserves a hundredth of a CPU, and imports neither torch nor transformers, because a search starts several.
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
    """A packed trial. One Tune step is one evaluation of the trial."""

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
                return {**self.settings.search.unmeasured, **report.metrics, "done": report.final}
        return {FAILURE: self.failure, **self.settings.search.unmeasured, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, so that Tune can use this process again."""
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
        """Set the trial's values. The trial joins an engine in its first step, not here.

        Tune restarts a trial if its process dies in a step, but not if it dies before the first step.
        """
        self.name, self.values = config[TRIAL_ID], config[VALUES]
        self.client, self.failure = None, None

    def _request(self) -> TrialRequest:
        """The trial's request to join an engine.

        Raises:
            ConfigError: a searched value is not allowed, or contradicts another setting.
        """
        settings = self.settings.replace(**self.values)
        folder = f"{self.output_dir}/tune/train/{self.name}"
        return TrialRequest(self.name, settings, folder, f"{self.output_dir}/runs/{self.name}")
