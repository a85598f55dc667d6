"""Ray 2.60.0: the processes of the Ray that this process has started."""

from ray._private import ray_constants, worker


def control_processes() -> dict[str, int]:
    """Process ids of the GCS and the raylet that this process has started, by Ray's names for them.

    Empty where it has joined a Ray that was there. Private: `ray._private.worker._global_node`, whose
    `all_processes` has them. Ray has no call for "does my cluster still live" that returns when it does not.
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
