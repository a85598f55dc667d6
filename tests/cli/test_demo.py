"""The demo's files, as an installed wheel writes them."""

from pathlib import Path

import pytest

from vlmtune.cli.demo import demo

ROOT = Path(__file__).parents[2]


def test_the_package_has_the_shipped_configs() -> None:
    shipped = sorted((ROOT / "configs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        copy = ROOT / "vlmtune" / "demo" / "configs" / path.name
        assert copy.read_text() == path.read_text(), f"cp {path} {copy}"


def test_the_files_are_written_once_and_the_next_command_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    for _ in range(2):
        demo(["--output_dir", str(folder), "--files_only"])
    assert (folder / "llava" / "config.json").is_file() and (folder / "mall" / "labels.csv").is_file()
    assert (folder / "configs" / "demo.yaml").is_file()
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == (
        f"Next      vlmtune tune --config {folder}/configs/demo.yaml --data_path {folder}/mall "
        f"--model_name_or_path {folder}/llava"
    )
