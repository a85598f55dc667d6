"""Checks that need no heavy library, so that a mistake is reported in less than a second."""

from pathlib import Path

from vlmtune import output
from vlmtune.config.settings import Settings
from vlmtune.errors import ConfigError, DataError
from vlmtune.storage import scheme
from vlmtune.trackers.check import check_installed

DEMO_MODEL = "demo/llava"  # of configs/demo.yaml
DATA_SUFFIXES = {".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".tar", ".txt", ".zip"}


def check_paths(settings: Settings) -> None:
    """Raises a UserError if data or model do not exist, or a tracker is not installed.

    Only local paths are checked; a name that may be on the Hub is accepted.
    """
    check_installed(settings.training.report_to)
    evaluation = ("--eval_data_path ", settings.data.eval_data_path)
    for flag, path in (*(("", path) for path in settings.data.paths), evaluation):
        if path is not None and not scheme(path) and looks_local(path) and not Path(path).exists():
            raise DataError(f"{flag}{path.rstrip('/') or path}: no such file or folder")
    model = settings.model.model_name_or_path
    if model == DEMO_MODEL and not Path(model).exists():
        raise ConfigError(f"{model} is not there: `vlmtune demo --files_only` writes it in seconds")
    if model is not None and looks_local(model) and not Path(model).exists():
        raise ConfigError(
            f"{model} is not there: no such folder, and no name of a model on the Hub (OWNER/MODEL)"
        )


def check_output(folder: str, *, overwrite: bool, kind: output.FolderKind = output.RUN) -> None:
    """Raises ConfigError if a local output folder is not free."""
    if not scheme(folder):
        output.check_free(str(Path(folder).absolute()), overwrite=overwrite, kind=kind)


def looks_local(path: str) -> bool:
    """Whether a name can only be a local path, not a name on the Hub (OWNER/NAME)."""
    return (
        path.startswith(("/", "./", "../", "~"))
        or Path(path).suffix.lower() in DATA_SUFFIXES
        or path.rstrip("/").count("/") > 1
    )
