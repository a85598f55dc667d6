"""Ray Train 2.60.0: tells errors of Ray Train itself from errors that vlmtune's code raised in a worker."""

from ray.train.v2._internal.exceptions import RayTrainError


def is_worker_loss(failure: BaseException) -> bool:
    """Whether Ray Train lost a worker (its process or node), unlike an error that code in it raised.

    Private: `RayTrainError`, the base of Ray Train's health errors. The public `WorkerGroupError` holds both
    kinds of failures. Only a lost worker is worth a restart.
    """
    return isinstance(failure, RayTrainError)
