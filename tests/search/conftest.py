"""A Ray for searches that are run whole."""

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray with two CPUs, and a folder of our own for prepared rows."""
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("WANDB_MODE", "offline")  # of the workers, which have the environment of this moment
        ray.init("local", num_cpus=2, include_dashboard=True, log_to_driver=False)
        yield
        ray.shutdown()
