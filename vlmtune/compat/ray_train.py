"""Ray Train 2.60.0: its own errors apart from ours."""

from ray.train.v2._internal.exceptions import RayTrainError


def is_worker_loss(failure: BaseException) -> bool:
    """Whether Ray Train itself lost a worker (its process or node), rather than our code raising in it.

    Private: `RayTrainError`, the base of Ray Train's health errors. The public `WorkerGroupError` holds both
    kinds of failures, and only the first is worth a restart.
    """
    return isinstance(failure, RayTrainError)
