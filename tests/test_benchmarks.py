"""The benchmarks' two sides run on tiny models, so that they do not break on a GPU first."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_kit import values_of

from vlmtune.data.store import Store
from vlmtune.demo.models import write_model
from vlmtune.progress import duration_text

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import eta
import scaling
import search
import search_contenders
import search_curves
import search_quality
import search_replay
import search_tasks
import train_step

IN_FLOAT32 = {"quantization": "none", "dtype": "float32", "bf16": "false", "gradient_checkpointing": "auto"}


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_both_sides_of_train_step_train_alike(family: str, tmp_path: Path):
    write_model(family, tmp_path)
    plain = {"bits": None, "dtype": "float32", "checkpointing": False, "same_start": True}
    case: dict[str, Any] = {
        "batch": 2,
        "tokens": 128,
        "image": True,
        "varied": True,
        "dropout": 0,
        "plain": plain,
        "ours": IN_FLOAT32,
    }
    steps = train_step.WARM_UP + 2
    expected = train_step.plain(str(tmp_path), case, steps)["losses"]
    assert train_step.ours(str(tmp_path), case, steps)["losses"] == pytest.approx(expected, rel=1e-3)


def test_the_search_benchmark_trains_its_curves(stores: dict[str, Store], models: Path, tmp_path: Path):
    values = values_of(stores["mall llava"], models / "llava", eval_steps=0.5)
    numbered = [(number, search_tasks.runs()[number]) for number in (0, 7)]
    file = tmp_path / "curves.jsonl"
    search_tasks.train_part(numbered, values, stores["mall llava"], file, "counting", at_once=2)
    assert search_curves.pack(file, tmp_path / "curves.json.gz") == 2
    curves = search_curves.unpack(tmp_path / "curves.json.gz")
    assert all(run["task"] == "counting" and len(run["eval_loss"]) == 2 for run in curves)
    trained = [{name: run[name] for name in numbered[0][1]} for run in curves]
    assert sorted(map(str, trained)) == sorted(str(run) for _, run in numbered)


def made_up_runs() -> list[dict[str, Any]]:
    """Runs of one task whose loss is least at a rate of 5e-3, less with all layers, noise included."""
    random = np.random.default_rng(0)
    made = []
    for run in search_tasks.runs():
        apart = np.log(run["learning_rate"] * run["lora_alpha"] / run["lora_r"] / 2) - np.log(5e-3)
        least = 1 + 0.2 * apart**2 + 0.1 * (run["targets"] == "attention")
        falling = 1 + np.exp(-np.arange(1, 9) * run["share"])
        losses = least * falling * np.exp(random.normal(0, 0.01, 8))
        made.append({"task": "counting", **run, "eval_loss": losses.tolist()})
    return made


def test_curves_at_other_points_follow_from_those_that_were_trained():
    task = search_curves.fit(made_up_runs())
    values = {**search_tasks.NAMED["recipe"], "learning_rate": 5e-3}
    assert task.curve(values)[-1] == pytest.approx(1.0, abs=0.12)
    assert task.curve({**values, "learning_rate": 3e-4})[-1] == pytest.approx(2.6, rel=0.2)
    left_out, spread = task.error
    assert left_out < spread / 3
    assert task.curve(values, noise=3)[-1] != task.curve(values)[-1]


def test_a_replayed_search_of_the_default_beats_the_one_before(monkeypatch: pytest.MonkeyPatch):
    """One cell of the table, on the public table of final losses, with fewer seeds."""
    at = {"trials": 16, "compute": math.inf, "at_once": 16}
    before, ours = (
        [search_contenders.regret("public table", label, **at, seed=seed) for seed in range(12)]
        for label in (search_contenders.BEFORE, search_contenders.OURS)
    )
    assert np.mean([regret for regret, _ in ours]) < np.mean([regret for regret, _ in before])
    assert all(by_model == 0 for _, by_model in ours), "all begin before one has ended"
    alone = {**at, "at_once": 1}
    assert search_contenders.regret("public table", search_contenders.OURS, **alone, seed=0)[1] == 16 - 10


def test_a_replayed_search_stops_trials_early_and_a_portfolio_comes_from_other_tasks():
    """One cell on learning curves, 51 points of the task with few rows."""
    at = {"trials": 16, "compute": math.inf, "at_once": 4}
    name = "few rows, tied"
    random = [search_contenders.regret(name, "random", **at, seed=seed)[0] for seed in range(20)]
    ours = [search_contenders.regret(name, search_contenders.OURS, **at, seed=seed)[0] for seed in range(20)]
    assert 0 <= np.mean(ours) < np.mean(random) < 0.2
    (problem,) = search_contenders.problems()[name]
    search = search_replay.Search(problem, search_contenders.CONTENDERS["random"], seed=0)
    outcome = search.run(at_once=16, trials=16, compute=math.inf)
    assert search.scheduler.stopped
    assert outcome.compute < 16 * search_tasks.EVALUATIONS
    first, *_ = search_contenders.portfolio(name, 0, 3)
    assert first.keys() == problem.space.distributions.keys()


def test_the_table_of_replayed_searches_compares_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [
        {"problem": "a", "contender": name, "trials": 16, "compute": None, "at_once": 4, "regrets": regrets}
        for name, regrets in (("before", [0.2, 0.4]), ("after", [0.1, 0.2]), ("alpha apart", [-0.1, 0.0]))
    ]
    file = tmp_path / "cells.jsonl"
    file.write_text("".join(json.dumps({**line, "by_model": 2.0}) + "\n" for line in lines))
    search_quality.print_table(file, "before")
    rows = capsys.readouterr().out.splitlines()
    assert "16 trials, 4 at once" in rows[1]
    assert rows[-3] == "| before | 30.0% |  | 3.0 | 2.0 |"
    assert rows[-2] == "| after | 15.0% | 0.50 (0.50 to 0.50) | 2.0 | 2.0 |"
    assert rows[-1] == "| alpha apart | -5.0% | below | 1.0 | 2.0 |"


def test_ways_to_search_are_left_out_where_they_do_not_apply():
    short, alpha, hyperband = (
        search_contenders.CONTENDERS[name]
        for name in (
            "guided, short runs of 1/4 first",
            "guided, then TPE, rsLoRA with alpha of 8",
            "guided, then TPE, Hyperband of 3 brackets",
        )
    )
    found = {
        name: [search_contenders.applies(one, name) for one in (short, alpha, hyperband)]
        for name in ("text, tied", "text, wide", "public table")
    }
    assert found == {
        "text, tied": [True, True, True],
        "text, wide": [True, False, True],
        "public table": [False, False, False],
    }


def test_hyperband_draws_its_brackets_by_the_seed_and_rslora_scales_by_the_root_of_the_rank():
    at = {"trials": 8, "compute": math.inf, "at_once": 4}
    way = "guided, then TPE, Hyperband of 3 brackets"
    first, again = (search_contenders.regret("text, tied", way, **at, seed=3) for _ in range(2))
    assert first == again
    (problem,) = search_contenders.problems()["text, tied"]
    rslora = problem.with_alpha({"lora_alpha": 8, "use_rslora": True})
    assert rslora.point({"learning_rate": 1e-3, "lora_r": 16})["lora_alpha"] == 8 * 4
    assert list(rslora.space.names) == ["learning_rate", "lora_r"]


def test_results_of_several_calls_become_a_table_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shared = {
        "text": False,
        "set": [],
        "pixels": False,
        "side": "ours",
        "peak_gb": 60.0,
        "share_of_matmul": 0.75,
        "trials": 16,
    }
    results = [
        ("plain", 1, 450.0),
        ("packed", 1, 30.0),
        ("plain", 8, 90.0),
        ("packed", 8, 30.0),
        ("packed", 2, 30.0),
    ]
    files = []
    for number, (mode, batch, seconds) in enumerate(results):
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text(json.dumps({**shared, "mode": mode, "batch": batch, "ms_a_row": seconds}) + "\n")
    search.table([str(file) for file in files], str(tmp_path / "figure.svg"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" GB")[2].strip() for line in lines] == ["15.00x plain", "3.00x plain", ""]
    figure = (tmp_path / "figure.svg").read_text()
    assert figure.count("<circle") == 2
    assert "15.0 at 640" in figure


def test_times_that_are_left_are_read_as_they_are_printed() -> None:
    for seconds in (1, 89, 91, 3000, 7260, 200_000):
        line = f"12/16 trials, best 0.013, about {duration_text(seconds)} left"
        assert eta.seconds_left(line) == pytest.approx(seconds, rel=0.35 if seconds == 91 else 0.02)
    assert eta.seconds_left("step 1/2  eval_loss 0.3") is None
    assert eta.ratios([0.0, 10.0], [30.0, 10.0], 20.0) == [1.5, 1.0]


@pytest.mark.timeout(580)
def test_the_scaling_benchmark_runs_a_search_on_two_engines_and_on_one(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """On engines of a CPU each, whose times mean nothing beside other work."""
    file = tmp_path / "scaling.jsonl"
    command = ["scaling.py", str(models / "llava"), "--gpus", "1", "2", "--parts", "search", "--trials", "16"]
    command += [
        "--search_rows",
        "20",
        "--tokens",
        "128",
        "--set",
        "torch_compile=false",
        "lora_r=4",
        "self_check=false",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(file)])
    scaling.main()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["part"], row["gpus"], row["ended"]) for row in rows] == [
        ("search", 1, 16),
        ("search", 2, 16),
    ]
    assert all(row["cpu_s"]["driver"] > 0 and row["peak_host_gb"] > 0 for row in rows)
    assert "on each of 2 CPUs" in capfd.readouterr().err
    scaling.main()
    assert "ms a row" not in capfd.readouterr().out, "a part that is in the file is not run again"
    scaling.table(file, str(tmp_path / "scaling.svg"))
    assert "| llava | search | 2 |" in capfd.readouterr().out
    assert (tmp_path / "scaling.svg").read_text().startswith("<svg")
