"""`predict.py`: images and rows are answered in order, each once, also by a run that was ended half-way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from vlmtune import storage
from vlmtune.cli.adapter_options import parse_predict
from vlmtune.cli.commands import prediction_line
from vlmtune.errors import ConfigError, DataError, ModelError
from vlmtune.evaluation import prediction_parts
from vlmtune.evaluation.predict import PredictResult, predict_rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_ray")


def run(*options: Any) -> PredictResult:
    return predict_rows(parse_predict([str(option) for option in options], "", "predict"))


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_image_is_answered_once_though_the_run_was_ended(
    adapters: dict[str, Path],
    mall: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = (
        "--adapter",
        adapters["llava"],
        "--data_path",
        mall / "frames",
        "--question",
        "How many?",
        "--max_new_tokens",
        3,
    )
    out = tmp_path / "out"
    monkeypatch.setattr(prediction_parts, "ROWS_PER_PART", 5)
    written = []

    def write(path: str, text: str, original: Any = storage.write_text) -> None:
        if len(written) == 3:  # predict.yaml and two parts: the run ends with rows that are in no part
            raise KeyboardInterrupt
        written.append(path)
        original(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_text", write)
        with pytest.raises(KeyboardInterrupt):
            run(*options, "--output_dir", out)
    parts = [out / "parts" / name for name in ("000000-000000000004.jsonl", "000000-000000000009.jsonl")]
    assert sorted((out / "parts").iterdir()) == parts
    before = [line for part in parts for line in lines_of(part)]
    with pytest.raises(
        ConfigError,
        match=rf"--output_dir {out}: holds predictions that were begun with another question; choose",
    ):
        run(*options, "--output_dir", out, "--question", "Who?")

    capsys.readouterr()
    resumed = run(*options, "--output_dir", out)
    assert prediction_line(resumed) == f"Answers   {out}/predictions.jsonl: 24 rows"
    assert "resuming: answers that are already written are kept" in capsys.readouterr().out
    rows = lines_of(out / "predictions.jsonl")
    assert [row["source"] for row in rows] == [str(path) for path in sorted((mall / "frames").iterdir())]
    assert resumed.predictions()["answer"].tolist() == [row["answer"] for row in rows]
    assert rows[:10] == before
    assert all(
        row["question"] == "How many?" and row["reference"] is None and row["error"] is None for row in rows
    )
    assert {path.name for path in out.iterdir()} == {"predict.yaml", "predictions.jsonl"}
    with pytest.raises(
        ConfigError, match="holds a finished run; choose another folder, or replace it with --overwrite"
    ):
        run(*options, "--output_dir", out)


def test_rows_with_and_without_answers_and_bad_ones_stay_in_their_order(
    adapters: dict[str, Path], mall: Path, tmp_path: Path
) -> None:
    rows = [
        {"instruction": "How many?", "image": "frames/seq_000001.jpg"},
        {"instruction": "What is a beam?", "output": "A member."},
        {"instruction": "How many?", "image": "frames/none.jpg"},
        {"messages": [{"role": "user", "content": "And a column?"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"text": 1}\n')
    result = run(
        *(
            "--adapter",
            adapters["mllama"],
            "--data_path",
            tmp_path / "rows.jsonl",
            "--image_root",
            mall,
            "--output_dir",
            tmp_path / "out",
        ),
        *("--format", "parquet", "--max_new_tokens", 3, "--use_cpu", "--per_device_eval_batch_size", 2),
    )
    assert (
        prediction_line(result)
        == f"Answers   {tmp_path}/out/predictions.parquet: 5 rows; 2 could not be answered, see their error"
    )
    found = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    assert [row["source"] for row in found] == [f"{tmp_path}/rows.jsonl:{number}" for number in range(1, 6)]
    assert [row["question"] for row in found] == ["How many?", "What is a beam?", None, "And a column?", None]
    assert [row["reference"] for row in found] == [None, "A member.", None, None, None]
    assert [row["answer"] is None for row in found] == [False, False, True, False, True]
    assert "there is no such file" in found[2]["error"]
    assert found[0]["images"] == [f"{mall}/frames/seq_000001.jpg"]
    assert "no known row format" in found[4]["error"]


def test_bad_input_is_one_plain_line_and_nothing_is_written(
    adapters: dict[str, Path], mall: Path, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[Any], type[Exception], str]] = [
        ([], ConfigError, "--data_path is missing"),
        (["--data_path", tmp_path / "empty", "--question", "?"], DataError, "there is no image"),
        (["--data_path", tmp_path / "empty"], DataError, "empty holds nothing"),
        (["--data_path", mall / "frames"], ConfigError, "--question is missing"),
        (
            ["--data_path", mall / "frames", "--question", "?", "--format", "csv"],
            ConfigError,
            "--format: invalid choice: 'csv'",
        ),
        (["--data_path", mall, "--adapter", tmp_path / "empty"], ModelError, "empty is not an adapter"),
        (
            ["--data_path", mall, "--model_name_or_path", models / "mllama"],
            ModelError,
            "does not fit the base",
        ),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            run("--adapter", adapters["llava"], "--output_dir", tmp_path / "out", *options)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
@pytest.mark.timeout(580)
def test_a_killed_process_goes_on(adapters: dict[str, Path], mall: Path, tmp_path: Path) -> None:
    for number in range(20):
        for frame in (mall / "frames").iterdir():
            (tmp_path / "images" / str(number)).mkdir(parents=True, exist_ok=True)
            os.link(frame, tmp_path / "images" / str(number) / frame.name)
    program = [
        sys.executable,
        str(ROOT / "ray_jobs" / "predict.py"),
        "--adapter",
        str(adapters["llava"]),
        "--data_path",
        "images",
    ]
    program += ["--question", "How many?", "--output_dir", "out", "--max_new_tokens", "32", "--use_cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        started = psutil.Popen(program, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    while not list((tmp_path / "out").glob("parts/*.jsonl")):
        assert started.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    children = started.children(recursive=True)
    started.send_signal(signal.SIGKILL)
    started.wait()
    for process in psutil.wait_procs(children, timeout=10)[1]:
        process.kill()
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resuming: answers that are already written are kept" in done.stdout
    rows = lines_of(tmp_path / "out" / "predictions.jsonl")
    assert [row["source"] for row in rows] == sorted(
        str(path) for path in (tmp_path / "images").rglob("*.jpg")
    )
