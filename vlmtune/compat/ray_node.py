"""Ray 2.60.0: the addresses and the processes of a Ray that this process starts."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import ray_constants, worker


def control_processes() -> dict[str, int]:
    """Process ids of the GCS and the raylet that this process has started, by Ray's names for them.

    Empty if this process has joined a Ray that was already running. Private:
    `ray._private.worker._global_node`, whose `all_processes` has them. Ray has no public call that tells
    whether the cluster still runs and that returns if it does not.
    """
    node = worker._global_node
    if node is None:
        return {}
    names = {
        ray_constants.PROCESS_TYPE_GCS_SERVER: "GCS",
        ray_constants.PROCESS_TYPE_RAYLET: "raylet",
    }
    return {
        names[kind]: infos[0].process.pid
        for kind, infos in node.all_processes.items()
        if kind in names and infos
    }


@contextmanager
def loopback_addresses() -> Iterator[None]:
    """Let a Ray that `ray.init` starts in the block listen on loopback alone.

    Private: `ray_constants.ENABLE_RAY_CLUSTER`, False on macOS and Windows, where every process of Ray
    then binds to 127.0.0.1. On Linux Ray would listen on all interfaces: it replaces a loopback
    `_node_ip_address`, and reads the variable RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER when it is imported.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
