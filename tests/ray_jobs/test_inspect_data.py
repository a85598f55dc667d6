"""`inspect_data.py` as a person runs it: what it prints and writes, its exit codes, and that it needs
neither weights nor network."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmtune.config.parse import parse
from vlmtune.session import prepare_rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def weightless(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with its processor and tokenizer, and nothing else."""
    folder = tmp_path_factory.mktemp("weightless")
    for path in (models / "llava").iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "generation_config.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of a server in place of the Hub, and the paths that are requested of it."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        do_GET = do_HEAD = do_POST = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def run(*arguments: str, cwd: Path, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "ray_jobs" / "inspect_data.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=800,
    )


def test_it_reports_without_weights_or_network_and_warms_training(
    mall: Path, weightless: Path, tmp_path: Path, hub: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, requests = hub
    config = tmp_path / "x.yaml"
    config.write_text(
        f"data_path: {mall}\nmodel_name_or_path: {weightless}\noutput_dir: out\nmax_length: 128\n"
        "search_space:\n  max_length: {choice: [24, 128]}\n"
    )
    done = run(
        "--config", "x.yaml", cwd=tmp_path, cache=tmp_path / "cache", HF_ENDPOINT=address, HF_HUB_OFFLINE="0"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert requests == []
    first, *lines = done.stdout.splitlines()
    assert first == "Loading …"
    assert len(lines) <= 45
    assert max(map(len, lines[:-1])) <= 100  # the last line is a path
    rows = "Rows      48 rows, 96 turns, 48 images (24 different; JPEG)   frames folder"
    assert any(line.startswith(rows) for line in lines)
    assert any(line.startswith("Note      max_length 24 will not be searched") for line in lines)
    assert "Verdict   ready; 6 test rows cannot tell much" in lines
    folder = tmp_path / "out-preflight"
    assert lines[-1] == f"Report    {folder}/preflight.html and preflight.json"
    assert not (tmp_path / "out").exists()
    report = json.loads((folder / "preflight.json").read_text())
    assert (report["ready"], report["rows"], report["split"]) == (
        True,
        48,
        {"train": 36, "eval": 6, "test": 6},
    )
    assert "data:image/jpeg;base64," in (folder / "preflight.html").read_text()

    # Training finds what was prepared here: nothing is read again, so no Ray is needed either.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted((tmp_path / "cache").rglob("*"))
    assert prepare_rows(parse(["--config", str(config)])).meta.rows == 48
    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_bad_rows_are_all_shown_and_exit_with_2(mall: Path, weightless: Path, tmp_path: Path) -> None:
    rows = [
        {"image": f"frames/seq_{number:06d}.jpg", "instruction": "How many?", "output": str(number)}
        for number in range(1, 13)
    ]
    rows += [{"image": "frames/none.jpg", "instruction": "How many?", "output": "1"}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (
        "--data_path",
        str(data),
        "--image_root",
        str(mall),
        "--model_name_or_path",
        str(weightless),
        "--output_dir",
        "here",
    )
    done = run(*arguments, cwd=tmp_path, cache=tmp_path / "cache")
    assert done.returncode == 2
    assert f"image {mall}/frames/none.jpg: there is no such file"[:80] in done.stdout
    assert "Verdict   1 of 13 rows are bad; --on_bad_row skip continues without them" in done.stdout
    report = json.loads((tmp_path / "here" / "preflight.json").read_text())
    assert (report["ready"], report["bad_rows"], report["rows"]) == (False, 1, 12)
    assert (tmp_path / "here" / "preflight.html").is_file()


def test_what_cannot_be_read_at_all_is_one_line_and_2(weightless: Path, tmp_path: Path) -> None:
    done = run(
        "--data_path",
        "nowhere.jsonl",
        "--model_name_or_path",
        str(weightless),
        cwd=tmp_path,
        cache=tmp_path / "cache",
    )
    assert done.returncode == 2
    assert done.stderr == "error: nowhere.jsonl: no such file or folder\n"
    assert list(tmp_path.iterdir()) == []
