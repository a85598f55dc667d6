"""The command `python -m vlmtune.demo`."""

from pathlib import Path

import pytest

from vlmtune.demo.__main__ import main


def test_the_command_writes_what_is_missing_and_keeps_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output_dir", str(tmp_path / "demo")]
    assert main(arguments) == 0
    written = capsys.readouterr().out
    assert [line.split(": ")[1].split()[0] for line in written.splitlines()] == ["wrote", "wrote", "wrote"]
    files = [path for path in (tmp_path / "demo").rglob("*") if path.is_file()]
    times = {path: path.stat().st_mtime_ns for path in files}
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("already there") == 3
    assert times == {path: path.stat().st_mtime_ns for path in files}
    (tmp_path / "demo" / "mall" / "labels.csv").unlink()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("already there") == 2
    assert (tmp_path / "demo" / "mall" / "labels.csv").exists()


def test_the_command_says_plainly_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("a file")
    assert main(["--output_dir", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(file) in error and "--output_dir" in error
    with pytest.raises(SystemExit, match="2"):
        main(["--family", "gpt"])
