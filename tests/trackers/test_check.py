"""What is told before a run starts about a service that it cannot use."""

from pathlib import Path

import pytest

from vlmtune.errors import ConfigError
from vlmtune.trackers import check


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check.INSTALL, "no_such_tracker", "pip install 'vlmtune[no_such_tracker]'")
    with pytest.raises(ConfigError, match=r"pip install 'vlmtune\[no_such_tracker\]'"):
        check.check_installed(["tensorboard", "no_such_tracker"])
    check.check_installed(["tensorboard"])
    check.check_installed(None)


@pytest.mark.filterwarnings("ignore")
def test_wandb_without_a_login_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with pytest.raises(ConfigError, match="wandb login"):
        check.check_services(["wandb"], str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check.check_services(["wandb"], str(tmp_path))


def test_mlflow_writes_no_file_into_object_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI to a server"):
        check.check_services(["mlflow"], "s3://bucket/out")
