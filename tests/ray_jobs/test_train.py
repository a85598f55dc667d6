"""`ray_jobs/train.py` as a command, and everything that can be wrong with what it is given."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import yaml
from peft import PeftModel
from PIL import Image
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmtune
from vlmtune.cluster import connect
from vlmtune.config.parse import parse
from vlmtune.demo.instructions import write_instructions
from vlmtune.errors import ConfigError, DataError, ModelError, ResourceError, UserError

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"(Data {6}|Adapter {3}|Curves {4}|Trained {3}|Next {6}| {10})\S|step \d+/\d+  (loss|eval_loss) \d"
)
ADAPTER = "adapter_model.safetensors"


def environment(**more: str) -> dict[str, str]:
    """That of a command: no Ray to join, and sums in one order, so that two runs agree to the last bit."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", RAY_JOB_CONFIG_JSON_ENV_VAR)
    }
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def command(folder: Path, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`python ray_jobs/train.py` with these options, in `folder`."""
    program = [sys.executable, str(ROOT / "ray_jobs" / "train.py"), *options]
    return subprocess.run(
        program, cwd=folder, env=environment(**more), capture_output=True, text=True, check=False
    )


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def older(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder where a training script without a config file ran, with a tiny model in place of its own; and
    what it said."""
    folder = tmp_path_factory.mktemp("older")
    write_instructions(folder / "data.jsonl")
    options = "--data_path data.jsonl --output_dir out --per_device_train_batch_size 2"
    options += " --gradient_accumulation_steps 2"
    options += f" --max_seq_length 512 --num_train_epochs 3 --model_name_or_path {models / 'mllama'}"
    return folder, command(folder, *options.split())


@pytest.mark.timeout(900)
def test_the_older_command_runs_and_says_what_a_person_needs(
    older: tuple[Path, subprocess.CompletedProcess[str]],
):
    folder, done = older
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert first == "Loading …"
    assert [line for line in lines if not LINE.match(line)] == []
    assert lines[0] == f"Data      {folder}/data.jsonl: 60 rows (48 train, 6 eval, 6 test), up to 69 tokens"
    evaluate = f"python ray_jobs/eval.py --adapter {folder}/out --compare_base --output_dir {folder}/out-eval"
    assert re.fullmatch(r"Trained   [\d,]+ of [\d,]+ parameters \([\d.]+ %\), on the CPU", lines[-4])
    assert lines[-3:] == [
        f"Adapter   {folder}/out",
        f"Curves    tensorboard --logdir {folder}/out/runs",
        f"Next      {evaluate}",
    ]
    assert [line.split("  ")[0] for line in lines if "eval_loss" in line] == [
        f"step {step}/36" for step in (9, 18, 27, 36)
    ]


def test_the_output_is_laid_out_as_promised(
    older: tuple[Path, subprocess.CompletedProcess[str]], models: Path
):
    folder, done = older
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {
        *(
            "adapter_config.json",
            ADAPTER,
            "processor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ),
        *("config.yaml", "metrics.json", "README.md", "runs", "checkpoints"),
    }
    assert [path.name for path in folder.iterdir() if path.name not in ("data.jsonl", "out")] == []
    assert yaml.safe_load((out / "config.yaml").read_text()) == {
        "data_path": str(folder / "data.jsonl"),
        "output_dir": "out",
        "model_name_or_path": str(models / "mllama"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_length": 512,
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["step"] == metrics["max_steps"] == 36
    assert f"step 36/36  eval_loss {metrics['eval_loss']:.4f}" in done.stdout
    assert {
        "seconds",
        "tokens_per_second",
        "rows_per_second",
        "peak_memory",
        "data_wait_fraction",
        "train_loss",
    } < metrics.keys()
    assert metrics["tokens_per_second"] > 0
    assert list((out / "runs").glob("events.out.tfevents.*"))
    assert list((out / "checkpoints").glob("train/checkpoint_*/optimizer.pt"))


def test_the_adapter_works_in_plain_transformers_and_peft(
    older: tuple[Path, subprocess.CompletedProcess[str]], models: Path, mall: Path
):
    out = older[0] / "out"
    processor = AutoProcessor.from_pretrained(out)
    question = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "How many people are there?"}],
        }
    ]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    with Image.open(mall / "frames" / "seq_000001.jpg") as image:
        inputs = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
    base = AutoModelForImageTextToText.from_pretrained(models / "mllama").eval()
    with torch.no_grad():
        before = base(**inputs).logits
        model = PeftModel.from_pretrained(base, out).eval()
        assert (model(**inputs).logits - before).abs().max() > 1e-4
        assert (
            model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1]
            == inputs["input_ids"].shape[1] + 3
        )


@pytest.mark.timeout(900)
def test_config_yaml_repeats_the_run_from_anywhere(
    older: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
):
    out = older[0] / "out"
    before = content(out)
    done = command(
        tmp_path, "--config", str(out / "config.yaml"), "--output_dir", "again", "--num_workers", "0"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines()[1:] if not LINE.match(line)] == []
    assert (tmp_path / "again" / ADAPTER).read_bytes() == (out / ADAPTER).read_bytes()
    assert content(out) == before


def test_the_older_command_without_its_model_says_how_to_get_it(tmp_path: Path):
    write_instructions(tmp_path / "data.jsonl")
    options = "--data_path data.jsonl --output_dir out --per_device_train_batch_size 2"
    options += " --gradient_accumulation_steps 2"
    done = command(
        tmp_path,
        *options.split(),
        "--max_seq_length",
        "512",
        "--num_train_epochs",
        "3",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "hub"),
    )
    assert (done.returncode, done.stdout) == (2, "Loading …\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: meta-llama/Llama-3.2-11B-Vision-Instruct is neither a folder nor in the local cache"
    )
    assert (
        "accept its licence on https://huggingface.co/meta-llama/Llama-3.2-11B-Vision-Instruct "
        "and log in with `hf auth login`" in line
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_with_resume(models: Path, mall: Path, tmp_path: Path):
    options = [
        "--data_path",
        str(mall),
        "--model_name_or_path",
        str(models / "llava"),
        "--quantization",
        "nf4",
        "--num_workers",
        "0",
    ]
    options += [
        "--output_dir",
        "out",
        "--max_steps",
        "400",
        "--eval_steps",
        "20",
        "--per_device_train_batch_size",
        "2",
    ]
    program = [sys.executable, str(ROOT / "ray_jobs" / "train.py"), *options]
    with (tmp_path / "log").open("w") as log:
        started = psutil.Popen(program, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
    while not list((tmp_path / "out" / "checkpoints").glob("checkpoint-*/report.json")):
        assert started.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    children = started.children(recursive=True)
    started.kill()
    started.wait()
    _, alive = psutil.wait_procs(
        children, timeout=10
    )  # all of Ray ends with what started it, but two of its agents take a minute
    for process in alive:
        process.kill()
    assert not (tmp_path / "out" / "metrics.json").exists()

    done = command(tmp_path, "--resume", "out")
    assert (done.returncode, done.stderr) == (0, "")
    steps = [
        int(line.split()[1].partition("/")[0]) for line in done.stdout.splitlines() if "eval_loss" in line
    ]
    assert steps == list(range(steps[0], 401, 20))
    assert steps[0] > 20
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["step"] == 400
    with pytest.raises(
        ConfigError, match=rf"--resume {tmp_path}/out: this run has ended, nothing is left to do"
    ):
        vlmtune.train(parse(["--resume", str(tmp_path / "out")]))


# From here on in this process, with one Ray for all: a start costs seconds.


@pytest.fixture(scope="module")
def joined(cache: None) -> Iterator[None]:
    connect()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # quicker on tiny tensors, and sums in one order
    yield
    torch.set_num_threads(threads)
    ray.shutdown()


Train = Callable[..., Path]


@pytest.fixture
def train(joined: None, models: Path, mall: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs a quick training in this process and in `tmp_path`, of the tiny LLaVA on `mall` unless told
    otherwise."""
    monkeypatch.chdir(tmp_path)

    def run_it(
        *options: str, progress: Callable[[dict[str, Any]], None] | None = None, **values: Any
    ) -> Path:
        quick = {
            "data_path": mall,
            "model_name_or_path": models / "llava",
            "quantization": "nf4",
            "output_dir": "out",
            "num_workers": 0,
        }
        quick |= {"max_steps": 2, "use_cpu": True, "eval_strategy": "no"}
        given = {name: value for name, value in {**quick, **values}.items() if value is not None}
        arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        return Path(vlmtune.train(parse([*arguments, *options]), progress=progress).folder)

    return run_it


def jsonl(path: Path, *rows: Any) -> Path:
    """A JSONL file; rows that are text are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def good_rows(number: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"What is number {row}?", "input": "", "output": f"It is {row}."}
        for row in range(number)
    ]


def bad_mall(mall: Path, folder: Path, *, messages: str | None = None, row: str = "") -> Path:
    shutil.copytree(mall, folder)
    if messages is not None:
        (folder / "messages.txt").write_text(messages)
    with (folder / "labels.csv").open("a") as file:
        file.write(row)
    return folder


def make_no_json(folder: Path, mall: Path) -> Path:
    return jsonl(folder / "d.jsonl", *good_rows(3), '{"instruction": "a", "output": ')


def make_number(folder: Path, mall: Path) -> Path:
    return jsonl(folder / "d.jsonl", *good_rows(3), {"instruction": "a", "input": "", "output": True})


def make_without_image(folder: Path, mall: Path) -> Path:
    return jsonl(folder / "d.jsonl", *good_rows(3), {"instruction": "a", "output": "b", "image": "gone.jpg"})


def make_broken_image(folder: Path, mall: Path) -> Path:
    (folder / "broken.jpg").write_bytes((mall / "frames" / "seq_000001.jpg").read_bytes()[:300])
    return jsonl(
        folder / "d.jsonl", *good_rows(3), {"instruction": "a", "output": "b", "image": "broken.jpg"}
    )


def make_without_column(folder: Path, mall: Path) -> Path:
    return bad_mall(mall, folder / "m", messages="USER: How many?\nASSISTANT: {people}\n")


def make_without_frame(folder: Path, mall: Path) -> Path:
    return bad_mall(mall, folder / "m", row="99,3,north_hall\n")


def make_unknown(folder: Path, mall: Path) -> Path:
    (folder / "d.xlsx").write_bytes(b"PK\x03\x04")
    return folder / "d.xlsx"


def make_all_bad(folder: Path, mall: Path) -> Path:
    return jsonl(folder / "d.jsonl", *[{"instruction": "a", "input": "", "output": None}] * 3)


BAD_DATA = [
    (lambda folder, mall: folder / "absent.jsonl", {}, r"absent\.jsonl"),
    (make_unknown, {}, r"d\.xlsx"),
    (make_no_json, {}, r"d\.jsonl:4: .*\(1 of 4 rows are bad; --on_bad_row skip continues without them\)"),
    (make_number, {}, r"d\.jsonl:4: .*output"),
    (make_without_image, {}, r"d\.jsonl:4: .*gone\.jpg"),
    (make_broken_image, {}, r"d\.jsonl:4: .*broken\.jpg"),
    (make_without_column, {}, r"messages\.txt.*people"),
    (make_without_frame, {}, r"labels\.csv.*99"),
    (make_all_bad, {"on_bad_row": "skip"}, r"no usable row"),
    (lambda folder, mall: jsonl(folder / "d.jsonl", *good_rows(2)), {}, r"leave no row for train"),
    (
        lambda folder, mall: jsonl(folder / "d.jsonl", *good_rows(1)),
        {"test_fraction": 0},
        r"leave no row for train",
    ),
    (
        lambda folder, mall: mall,
        {"max_length": 8},
        r"36 of 36 .* do not fit max_length 8 .*--max_length \d+ keeps all rows whole, "
        r"\d+ keeps a word of each answer",
    ),
    (
        lambda folder, mall: mall,
        {"max_length": 8, "on_long_row": "skip"},
        r"36 of 36 training rows do not fit max_length 8 ",
    ),
]
BAD_OPTIONS: list[tuple[dict[str, Any], type[UserError], str]] = [
    ({"learning_rat": 1}, ConfigError, r"--learning_rat: .*learning_rate"),
    ({"lora_r": 8.5}, ConfigError, r"lora_r"),
    ({"data_path": None}, ConfigError, r"--data_path: no data is given"),
    ({"eval_fraction": 0}, ConfigError, r"--eval_fraction 0 leaves no row to evaluate on"),
    ({"model_name_or_path": "./absent"}, ModelError, r"\./absent is not there"),
    (
        {"lora_target_modules": "r_proj"},
        ModelError,
        r"lora_target_modules: no linear layer is called 'r_proj'",
    ),
    ({"num_workers": 500}, ResourceError, r"--num_workers 500: this cluster's \d+ CPUs have room for \d+"),
    (
        {"output_dir": "s3://bucket/out?region=eu-west-1"},
        ConfigError,
        r"--num_workers 0 writes to a local folder",
    ),
    (
        {"output_dir": "nowhere://bucket/out"},
        ConfigError,
        r"--output_dir nowhere://bucket/out: cannot be opened",
    ),
    ({"resume": "absent"}, ConfigError, r"absent: no run is there"),
]


def test_a_run_that_is_not_there_cannot_be_resumed(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--resume .*absent: no run is there"):
        vlmtune.train(parse(["--resume", str(tmp_path / "absent")]))


@pytest.mark.parametrize(("make", "options", "message"), BAD_DATA)
def test_bad_data_is_named_and_an_earlier_run_is_kept(
    train: Train,
    mall: Path,
    tmp_path: Path,
    make: Callable[[Path, Path], Path],
    options: dict[str, Any],
    message: str,
):
    (tmp_path / "files").mkdir()
    data = make(tmp_path / "files", mall)
    with pytest.raises(DataError, match=message) as caught:
        train(data_path=data, output_dir="new", **options)
    assert "\n" not in str(caught.value)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("of an earlier run")
    (tmp_path / "out" / "metrics.json").write_text("of an earlier run")
    with pytest.raises(DataError, match=message):
        train(data_path=data, overwrite=True, **options)
    assert content(tmp_path / "out") == dict.fromkeys(("config.yaml", "metrics.json"), b"of an earlier run")
    assert {path.name for path in tmp_path.iterdir()} == {"files", "out"}


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options_are_named_and_nothing_is_written(
    train: Train, tmp_path: Path, options: dict[str, Any], error: type[UserError], message: str
):
    with pytest.raises(error, match=message) as caught:
        train(**options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_in_a_ray_job_the_output_needs_an_absolute_place(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    with pytest.raises(
        ConfigError, match="--output_dir out: inside a Ray job give an absolute path or a URI"
    ):
        train()
    with pytest.raises(
        ConfigError, match="--storage_path shared: inside a Ray job give an absolute path or a URI"
    ):
        train(storage_path="shared")
    assert train(storage_path=tmp_path / "shared") == tmp_path / "shared" / "out"
    assert (tmp_path / "shared" / "out" / ADAPTER).is_file()
    assert (tmp_path / "shared" / "prepared").is_dir()


def test_a_finished_run_is_replaced_only_when_asked_and_only_by_a_run_that_can_start(
    train: Train, tmp_path: Path
):
    out = train(max_steps=1)
    before = content(out)
    with pytest.raises(
        ConfigError,
        match=rf"--output_dir {out}: holds a finished run; choose another folder, or .*--overwrite",
    ):
        train()
    for mistake in (
        {"lora_target_modules": "r_proj"},
        {"max_length": 8},
        {"data_path": "absent.jsonl"},
        {"num_workers": 500},
    ):
        with pytest.raises(UserError):
            train(overwrite=True, **mistake)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(
        ConfigError,
        match=r"holds notes\.txt, which no run of vlmtune wrote; move it, or choose another folder",
    ):
        train(overwrite=True)
    (out / "notes.txt").unlink()
    assert content(out) == before
    assert train(overwrite=True) == out
    assert json.loads((out / "metrics.json").read_text())["step"] == 2
    assert "overwrite" not in (out / "config.yaml").read_text()


def test_a_foreign_folder_is_never_touched(train: Train, tmp_path: Path):
    (tmp_path / "out" / "photos").mkdir(parents=True)
    (tmp_path / "out" / "photos" / "1.jpg").write_bytes(b"mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(
            ConfigError, match="is not empty and holds no run of vlmtune; choose another folder"
        ):
            train(**options)
    assert content(tmp_path / "out") == {"photos/1.jpg": b"mine"}


def test_bad_and_long_rows_are_left_out_and_counted(
    train: Train, mall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [
        {**row, "image": f"{mall}/frames/seq_{index + 1:06d}.jpg"} if index < 2 else row
        for index, row in enumerate(good_rows(12))
    ]
    data = jsonl(tmp_path / "d.jsonl", *rows, {"instruction": "a", "input": "", "output": True})
    held_out = jsonl(tmp_path / "e.jsonl", *good_rows(14)[12:])
    options = {
        "data_path": data,
        "eval_data_path": held_out,
        "image_root": mall / "frames",
        "test_fraction": 0,
        "max_steps": -1,
    }
    out = train(
        **options,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        max_length=24,
        on_bad_row="skip",
        max_bad_fraction=0.9,
        on_long_row="skip",
    )
    assert json.loads((out / "bad_rows.jsonl").read_text())["source"].endswith("d.jsonl:13")
    printed = capsys.readouterr().out
    assert "14 rows (12 train, 2 eval, 0 test)" in printed
    assert "1 bad rows skipped (bad_rows.jsonl)" in printed
    assert "2 training rows left out: their images do not fit --max_length 24" in printed
    assert json.loads((out / "metrics.json").read_text())["max_steps"] == 10


class StopError(Exception):
    pass


def test_a_run_that_broke_off_goes_on_as_if_it_had_not(
    train: Train, mall: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def break_off(logs: dict[str, float]) -> None:
        if logs["step"] == 5:
            raise StopError

    shutil.copytree(mall, tmp_path / "mall")
    options = {
        "data_path": "mall",
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "lora_dropout": 0.1,
    }
    whole = train(**options)
    with pytest.raises(StopError):
        train(**options, output_dir="broken", progress=break_off)
    with pytest.raises(ConfigError, match=r"holds an unfinished run; .*, or resume it: --resume "):
        train(**options, output_dir="broken")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = vlmtune.train(parse(["--resume", "../broken"])).folder
    weights = [load_file(Path(folder) / ADAPTER) for folder in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    metrics = [
        json.loads((Path(folder) / "metrics.json").read_text())["eval_loss"] for folder in (whole, resumed)
    ]
    assert metrics[0] == metrics[1]


def test_a_run_is_not_resumed_on_other_data(
    train: Train, mall: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def break_off(logs: dict[str, float]) -> None:
        raise StopError

    data = jsonl(tmp_path / "d.jsonl", *good_rows(12))
    with pytest.raises(StopError):
        train(data_path=data, progress=break_off)
    before = content(tmp_path / "out")
    jsonl(data, *good_rows(13))
    with pytest.raises(DataError, match=r"--resume .*out: .*d\.jsonl has changed since this run began"):
        vlmtune.train(parse(["--resume", "out"]))
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(("family", "quantization"), [("llava", "nf4"), ("mllama", "int8")])
def test_images_are_learnt_from(train: Train, models: Path, family: str, quantization: str):
    options = {"model_name_or_path": models / family, "quantization": quantization, "learning_rate": 1e-2}
    out = train(**options, max_steps=20, per_device_train_batch_size=8, lora_target_modules="all-linear")
    state = json.loads((out / "checkpoints" / "checkpoint-20" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


def test_a_csv_and_a_folder_for_each_class_become_adapters(train: Train, mall: Path, tmp_path: Path):
    labels = [line.split(",") for line in (mall / "labels.csv").read_text().splitlines()[1:]]
    lines = ["photo,q,n"]
    for number, count, _ in labels:
        photo = mall / "frames" / f"seq_{int(number):06d}.jpg"
        folder = tmp_path / "classes" / ("few" if int(count) < 5 else "many")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder)
        shutil.copy(photo, tmp_path)
        lines.append(f"{photo.name},How many people are there?,{count}")
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    columns = ("--columns", "image=photo", "question=q", "answer=n")
    table = train(*columns, data_path=tmp_path / "rows.csv", max_steps=1, output_dir="table")
    classes = train(
        data_path=tmp_path / "classes", question="Is it crowded?", max_steps=1, output_dir="classes_out"
    )
    for out in (table, classes):
        assert json.loads((out / "metrics.json").read_text())["step"] == 1
        assert (out / "adapter_model.safetensors").is_file()
