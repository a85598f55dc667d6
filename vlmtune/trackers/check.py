"""Check, before a run starts, that the services of `report_to` can be used."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from vlmtune.errors import ConfigError
from vlmtune.library_errors import LIBRARY_ERRORS, first_line
from vlmtune.shown_text import redacted
from vlmtune.storage import scheme
from vlmtune.trackers.services import FOLDER, mlflow_client, mlflow_experiment, quiet_mlflow

INSTALL = {
    "wandb": "pip install 'vlmtune[wandb]'",
    "mlflow": "pip install 'vlmtune[mlflow]'",
    "trackio": "pip install 'vlmtune[trackio]'",
}


def check_installed(services: list[str] | None) -> None:
    """Raises ConfigError if the package of a service is not installed. Imports none of them."""
    for name in services or ():
        if name in INSTALL and find_spec(name) is None:
            raise ConfigError(f"--report_to {name}: its package is not installed; {INSTALL[name]}")


def check_services(services: list[str] | None, output_dir: str) -> None:
    """Check that each service accepts runs. Creates nothing.

    Args:
        output_dir: absolute path or URI of the output folder, which need not exist.

    Raises:
        ConfigError: a package is missing, nobody is logged in, or a server does not answer.
    """
    check_installed(services)
    if "wandb" in (services or ()):
        _check_wandb()
    if "mlflow" in (services or ()):
        _check_mlflow(output_dir)


def _check_wandb() -> None:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    import wandb

    if not wandb.login(prompt=False):
        raise ConfigError(
            "--report_to wandb: nobody is logged in; run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline"
        )


def _check_mlflow(output_dir: str) -> None:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        with _plain_errors(f"MLFLOW_TRACKING_URI={redacted(uri)}"):
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default, 7, takes minutes
            mlflow_client(output_dir).search_experiments(max_results=1)
    elif scheme(output_dir):
        raise ConfigError(
            f"--report_to mlflow: its file cannot be in {output_dir}; set MLFLOW_TRACKING_URI to a server"
        )
    elif find_spec("sqlalchemy") is None or find_spec("alembic") is None:
        raise ConfigError(f"--report_to mlflow: its file needs more packages; {INSTALL['mlflow']}")


def make_experiment(services: list[str] | None, output_dir: str) -> None:
    """Create MLflow's experiment, if `services` has MLflow, before several trials would create it at once.

    Raises:
        ConfigError: MLflow refuses the experiment.
    """
    if "mlflow" in (services or ()):
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            Path(output_dir, FOLDER).mkdir(exist_ok=True)
        with _plain_errors(output_dir):
            mlflow_experiment(mlflow_client(output_dir), output_dir)


@contextmanager
def _plain_errors(where: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    quiet_mlflow()
    try:
        yield
    except (MlflowException, *LIBRARY_ERRORS) as error:
        raise ConfigError(f"--report_to mlflow: {where} cannot be used: {first_line(error)}") from error
