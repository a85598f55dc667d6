"""Whole searches with a tiny LLaVA on a Ray with two CPUs. Each takes its time, so that many tests look at
the same one."""

import json
import math
from html import escape
from pathlib import Path
from typing import Any, NoReturn

import optuna
import pyarrow.parquet as pq
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from peft import PeftModel, get_peft_model_state_dict
from ray.train import WorkerGroupError
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.sft_config import SFTConfig

from vlmtune.cluster import Cluster, connect
from vlmtune.config.settings import Settings
from vlmtune.data.cache import USED
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, SearchFailedError
from vlmtune.search import write_results
from vlmtune.search.run_search import announce, run_search
from vlmtune.search.search_result import SearchResult
from vlmtune.search.space import Space
from vlmtune.search.study_file import STUDY_NAME
from vlmtune.search.summary import search_summary
from vlmtune.session import cache_folder, prepare_rows
from vlmtune.single_run import train_adapter

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("machine")]

MEASURED = ["origin", "state", "eval_loss", "steps", "seconds", "tokens_per_second", "peak_memory"]
ENOUGH = 10**12  # a rank whose adapter is larger than any address space


@pytest.fixture(scope="module")
def settings(models: Path, mall: Path, machine: None) -> Settings:
    return Settings.from_flags(
        {
            "data_path": str(mall),
            "model_name_or_path": str(models / "llava"),
            "quantization": "nf4",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_modules": ["q_proj", "v_proj"],
            "learning_rate": 5e-3,
            "max_length": 128,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
        }
    )


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("only a worker may do this: the machine of the driver need not have a GPU")


def files_of(folder: str) -> dict[str, int]:
    """The files of a store with their times, but for the mark that every use of it renews."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != USED)
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


RUNNERS = ["packed", pytest.param("isolated", marks=pytest.mark.heavy)]


@pytest.fixture(scope="module", params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> str:
    """Both ways to run a trial: what a search promises does not depend on it."""
    return str(request.param)


@pytest.fixture(scope="module")
def result(settings: Settings, runner: str, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A search of three trials, two at a time."""
    folder = tmp_path_factory.mktemp("search") / "out"
    space = {
        "lora_r": {"choice": [4, 8]},
        "lora_alpha": {"expr": "2 * lora_r"},
        "learning_rate": {"loguniform": [1e-3, 2e-2]},
        "max_length": {"choice": [128, 256]},
    }
    before = prepare_rows(settings).folder
    made = files_of(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SFTConfig, "__post_init__", refuse)
        patch.setattr(torch.cuda, "_lazy_init", refuse)
        changed = settings.replace(
            output_dir=str(folder), num_samples=3, search_space=space, trial_runner=runner
        )
        result = run_search(changed)
    assert isinstance(result, SearchResult)
    assert files_of(before) == made, "trials share the rows that were prepared before them"
    stores = {entry.name for entry in Path(cache_folder(settings)).iterdir() if entry.is_dir()}
    assert stores == {Path(before).name}
    return result


@pytest.fixture(scope="module")
def found(result: SearchResult) -> tuple[Path, str, list[dict[str, Any]]]:
    """The same: its folder, its summary, its table."""
    rows = pq.read_table(Path(result.folder) / "trials.parquet").to_pylist()
    return Path(result.folder), search_summary(result), rows


def test_the_output_folder_is_laid_out_as_promised(found: tuple[Path, str, list[dict[str, Any]]]) -> None:
    folder, _, rows = found
    assert {entry.name for entry in folder.iterdir()} == {
        "best",
        "trials.parquet",
        "report.html",
        "search.yaml",
        "study.journal",
        "live.json",
        "test_predictions.parquet",
        "test_predictions.csv",
        "test_predictions.html",
        "runs",
        "tune",
    }
    best = {entry.name for entry in (folder / "best").iterdir()}
    assert best >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "processor_config.json",
        "tokenizer.json",
    }
    assert best >= {"config.yaml", "metrics.json", "README.md", "runs"}
    assert {entry.name for entry in (folder / "runs").iterdir()} == {row["trial_id"] for row in rows}
    assert all(list((folder / "runs" / row["trial_id"]).glob("events.out.tfevents.*")) for row in rows)
    assert list((folder / "best" / "runs").glob("events.out.tfevents.*"))


def test_the_table_has_a_row_per_trial(found: tuple[Path, str, list[dict[str, Any]]]) -> None:
    _, _, rows = found
    assert len({row["trial_id"] for row in rows}) == len(rows) == 3
    assert list(rows[0]) == ["trial_id", "lora_r", "lora_alpha", "learning_rate", "max_length", *MEASURED]
    first = {
        name: rows[0][name]
        for name in ("lora_r", "lora_alpha", "learning_rate", "max_length", "state", "steps")
    }
    assert first == {
        "lora_r": 4,
        "lora_alpha": 8,
        "learning_rate": 5e-3,
        "max_length": 128,
        "state": "COMPLETE",
        "steps": 4,
    }
    assert all(row["lora_alpha"] == 2 * row["lora_r"] for row in rows)
    for row in rows:
        assert row["state"] in ("COMPLETE", "PRUNED")
        assert (row["steps"] == 4) == (row["state"] == "COMPLETE")
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in MEASURED[2:])


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return min((row for row in rows if row["state"] == "COMPLETE"), key=lambda row: row["eval_loss"])


def test_the_summary_names_the_best_trial_and_where_things_are(
    found: tuple[Path, str, list[dict[str, Any]]],
) -> None:
    folder, summary, rows = found
    best = best_row(rows)
    lines = summary.splitlines()
    assert lines[1].startswith(
        f"Best      trial {rows.index(best) + 1} of 3: eval_loss {best['eval_loss']:.4g}"
    )
    assert f"(baseline: {rows[0]['eval_loss']:.4g})" in lines[1]
    assert f"Adapter   {folder}/best" in lines
    assert f"Report    {folder}/report.html" in lines
    assert f"Curves    tensorboard --logdir {folder}/runs" in lines
    assert json.loads((folder / "best" / "metrics.json").read_text())["eval_loss"] == best["eval_loss"]


def test_base_baseline_and_best_are_compared_on_test_rows_wherever_they_are_told(
    found: tuple[Path, str, list[dict[str, Any]]], settings: Settings
) -> None:
    folder, summary, rows = found
    test = json.loads((folder / "best" / "metrics.json").read_text())["test"]
    count = len(prepare_rows(settings).rows_of("test"))
    assert (test["rows"], test["of"]) == (count, count)
    assert set(test["models"]) == {"best", "base"} | ({"own"} if best_row(rows) is not rows[0] else set())
    assert set(test["models"]["best"]) == {"exact_match", "mae", "within_1", "number_rate"}
    before, after = (
        f"{100 * test['models'][model]['exact_match']['value']:.1f} %" for model in ("base", "best")
    )
    (line,) = (line for line in summary.splitlines() if line.startswith("Test "))
    assert line.startswith(f"Test      {count} rows that no trial saw: exact match {before} → {after}")
    assert (
        f"| exact match, {count} test rows | {after} (base: {before}) |"
        in (folder / "best" / "README.md").read_text()
    )
    page = (folder / "report.html").read_text()
    assert escape(line.removeprefix("Test      ")) in page
    assert page.count("<figure>") == min(count, 20) == page.count("data:image/jpeg")


def test_best_repeats_alone_with_the_same_loss_at_any_length_that_cuts_nothing(
    found: tuple[Path, str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, _, rows = found
    settings = Settings.load(folder / "best" / "config.yaml").replace(
        num_workers="0", output_dir=str(tmp_path / "alone"), max_length=512
    )
    train_adapter(settings, lambda _: None)
    alone = json.loads((tmp_path / "alone" / "metrics.json").read_text())["eval_loss"]
    assert alone == pytest.approx(best_row(rows)["eval_loss"], rel=1e-5)
    ours, theirs = (
        load_file(path / "adapter_model.safetensors") for path in (folder / "best", tmp_path / "alone")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)


def test_best_loads_with_plain_peft_and_changes_the_answer(
    found: tuple[Path, str, list[dict[str, Any]]], models: Path
) -> None:
    folder, _, _ = found
    base = AutoModelForImageTextToText.from_pretrained(models / "llava")
    inputs = AutoProcessor.from_pretrained(folder / "best")(text="How many people?", return_tensors="pt")
    with torch.no_grad():
        plain = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, folder / "best").eval()(**inputs).logits
    assert (adapted - plain).abs().max() > 1e-3


def test_the_result_holds_the_table_and_loads_the_best_adapter(
    result: SearchResult, found: tuple[Path, str, list[dict[str, Any]]]
) -> None:
    folder, _, rows = found
    assert result.trials.to_dict("records") == rows
    assert result.trials["eval_loss"][result.best_number - 1] == result.metrics["eval_loss"]
    assert result.baseline_trial is not None and result.baseline_trial.trial_id == rows[0]["trial_id"]
    assert (result.report_file, result.table_file) == (f"{folder}/report.html", f"{folder}/trials.parquet")
    model, processor = result.best.load("cpu")
    assert isinstance(model, PeftModel) and not model.training
    saved = load_file(folder / "best" / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    inputs = processor(text="How many people?", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


@pytest.fixture(scope="module", params=RUNNERS)
def grid(
    settings: Settings, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, list[dict[str, Any]], str]:
    """A grid of which one trial trains, one does not fit in memory and two raise, refitted: as above, and
    what was printed."""
    folder = tmp_path_factory.mktemp("grid") / "out"
    space = {
        "lora_r": {"grid": [4, ENOUGH]},
        "lora_target_modules": {"grid": [["q_proj", "v_proj"], ["no_such_proj"]]},
    }
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("vlmtune.console.say", lines.append)
        result = run_search(
            settings.replace(
                output_dir=str(folder),
                search_space=space,
                refit=True,
                report=False,
                max_steps=2,
                trial_runner=request.param,
                more_metrics=["seconds"],
            )
        )
    return (
        folder,
        search_summary(result),
        pq.read_table(folder / "trials.parquet").to_pylist(),
        "\n".join(lines),
    )


def test_a_grid_runs_every_combination_in_order(grid: tuple[Path, str, list[dict[str, Any]], str]) -> None:
    rows = grid[2]
    both = ['["q_proj", "v_proj"]', '["no_such_proj"]']
    assert [(row["lora_r"], row["lora_target_modules"]) for row in rows] == [
        (4, both[0]),
        (4, both[1]),
        (ENOUGH, both[0]),
        (ENOUGH, both[1]),
    ]


def test_a_trial_that_does_not_fit_is_infeasible_and_one_that_raises_failed(
    grid: tuple[Path, str, list[dict[str, Any]], str],
) -> None:
    _, summary, rows, printed = grid
    assert [row["state"] for row in rows] == ["COMPLETE", "FAILED", "INFEASIBLE", "FAILED"]
    assert "Trials    1 complete, 2 failed, 1 infeasible" in summary.splitlines()
    assert not [line for line in summary.splitlines() if line.startswith(("Test", "Report"))], (
        "it was left out"
    )
    failed = [line for line in printed.splitlines() if line.startswith("trial   2  failed")]
    assert len(failed) == 1
    assert "lora_target_modules: no linear layer is called 'no_such_proj'" in failed[0]


def test_several_objectives_are_told_with_their_front(
    grid: tuple[Path, str, list[dict[str, Any]], str],
) -> None:
    _, summary, rows, _ = grid
    assert "Front     trial 1: none is better in all of eval_loss, seconds" in summary.splitlines()
    assert [row["pareto"] for row in rows] == [True, False, False, False]


def test_what_a_search_is_for_is_said_before_it(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = settings.replace(more_metrics=["seconds", "rows_per_second"])
    announce(
        changed,
        Space.parse({"lora_r": {"choice": [4, 8]}}, changed),
        Cluster(dashboard=None, cpus=2, gpus=0, nodes=1),
    )
    assert "objectives: min eval_loss, min seconds, max rows_per_second" in capsys.readouterr().out


def test_refit_trains_the_winner_on_evaluation_rows_too_and_keeps_the_numbers_of_the_search(
    grid: tuple[Path, str, list[dict[str, Any]], str], settings: Settings
) -> None:
    folder, summary, rows, _ = grid
    store = prepare_rows(settings)
    whole = len(store.rows_of("train")) + len(store.rows_of("eval"))
    metrics = json.loads((folder / "best" / "metrics.json").read_text())
    assert metrics["eval_loss"] == rows[0]["eval_loss"]
    assert metrics["refit_rows"] == whole
    assert f"trained once more on the {whole} rows of train and eval" in summary
    searched = max(
        (folder / "tune" / "train" / rows[0]["trial_id"]).glob("checkpoint[_-]*/adapter_model.safetensors"),
        key=lambda file: file.stat().st_mtime,
    )
    before, after = load_file(searched), load_file(folder / "best" / "adapter_model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("crash", [False, True])
def test_a_refit_that_cannot_be_trained_leaves_what_the_search_found(
    settings: Settings, mall: Path, tmp_path: Path, *, crash: bool
) -> None:
    row = {"instruction": "How many?", "output": "two"}
    with_image = row | {"image": next((mall / "frames").iterdir()).name}
    for name, one in (("train", row), ("eval", with_image)):  # whose image does not fit
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(one | {"input": str(number)}) for number in range(4))
        )
    data = {
        "data_path": str(tmp_path / "train.jsonl"),
        "eval_data_path": str(tmp_path / "eval.jsonl"),
        "image_root": str(mall / "frames"),
    }
    space = {"learning_rate": {"loguniform": [1e-4, 1e-2]}}
    changes = {
        "output_dir": str(tmp_path / "out"),
        "test_fraction": 0,
        "max_length": 18,
        "max_steps": 1,
        "num_samples": 1,
        "report": False,
    }

    def crashing(*_: Any) -> NoReturn:
        error = "AcceleratorError: CUDA error: an illegal memory access"
        text = f"Traceback (most recent call last):\n{error}\nCompile with TORCH_USE_CUDA_DSA"
        raise WorkerGroupError(f"[Rank 0 Error Snippet]:\n{text}", {0: RuntimeError()})  # as Ray words it

    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("vlmtune.console.say", lines.append)
        if crash:
            patch.setattr(write_results, "refit", crashing)
        result = run_search(settings.replace(**data, **changes, search_space=space, refit=True))
    reason = (
        "AcceleratorError: CUDA error: an illegal memory access"
        if crash
        else "4 of 8 training rows do not fit max_length 18"
    )
    refit_lines = [line for line in lines if line.startswith("Refit     not done")]
    assert len(refit_lines) == 1
    assert refit_lines[0].startswith(f"Refit     not done, the search's own adapter stays: {reason}")
    assert "Compile" not in refit_lines[0]
    assert result.refit_rows is None and "trained once more" not in search_summary(result)
    assert (tmp_path / "out" / "trials.parquet").is_file()
    assert "refit_rows" not in json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())
    assert (tmp_path / "out" / "best" / "adapter_model.safetensors").is_file()


def test_a_refit_store_trains_on_evaluation_rows_and_never_on_test_rows(settings: Settings) -> None:
    store = prepare_rows(settings)
    whole = Store(store.folder, train_splits=("train", "eval"))
    rows = {split: set(store.rows_of(split).tolist()) for split in ("train", "eval", "test")}
    assert set(whole.rows_of("train").tolist()) == rows["train"] | rows["eval"]
    assert whole.rows_of("test").tolist() == store.rows_of("test").tolist()
    function, arguments = whole.__reduce__()
    assert function(*arguments).rows_of("train").tolist() == whole.rows_of("train").tolist()


def test_a_search_without_a_trial_that_ends_raises_one_reason(settings: Settings, tmp_path: Path) -> None:
    space = {"lora_r": {"choice": [4, 8]}}
    hurried = settings.replace(
        output_dir=str(tmp_path / "out"), num_samples=2, search_space=space, time_budget_s=1
    )
    with pytest.raises(SearchFailedError, match=r"^no trial ran to its end: .*--time_budget_s 1") as caught:
        run_search(hurried)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out" / "trials.parquet").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "eval_los"}, "--metric eval_los: no trial reports it.*did you mean eval_loss"),
        (
            {"metric": "exact_match"},
            "--metric exact_match: higher is better for this metric: add --mode max",
        ),
        ({"more_metrics": ["second"]}, "--more_metrics second: no trial reports it.*did you mean seconds"),
        ({"more_metrics": ["eval_loss"]}, "--more_metrics eval_loss: is an objective already"),
        ({"recipe": {"lora_r": 0}}, "recipe: lora_r: 0 must be at least 1"),
        ({"confirm": "three"}, "--confirm three: must be TRIALSxSEEDS"),
        ({"warm_start": ["nowhere"]}, "--warm_start nowhere: no finished search is there"),
        ({"num_workers": "0"}, "--num_workers 0: a search trains in workers"),
        ({"resume": "nowhere"}, "--resume .*/nowhere: no search is there"),
    ],
)
def test_what_a_search_refuses(
    settings: Settings, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = {"output_dir": str(tmp_path / "out"), "search_space": {"lora_r": {"choice": [4, 8]}}, **changes}
    with pytest.raises(ConfigError, match=message):
        run_search(settings.replace(**given))
    assert not (tmp_path / "out").exists()


def test_a_search_that_has_ended_is_not_resumed(
    found: tuple[Path, str, list[dict[str, Any]]], settings: Settings
) -> None:
    with pytest.raises(ConfigError, match="this search has ended"):
        run_search(settings.replace(resume=str(found[0])))


def test_two_trials_fit_on_two_cpus() -> None:
    cluster = connect()
    assert (cluster.cpus, cluster.fitting_trials(1, False), cluster.fitting_trials(4, False)) == (2, 2, 1)


@pytest.mark.heavy
def test_the_best_trials_of_a_larger_search_are_confirmed_and_the_recipe_runs_beside_it(
    settings: Settings, tmp_path: Path
) -> None:
    recipe = {"learning_rate": 2e-3, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj"]}
    changed = settings.replace(
        output_dir=str(tmp_path / "out"),
        search_space={"learning_rate": {"loguniform": [1e-3, 2e-2]}},
        recipe=recipe,
        num_samples=12,
        max_steps=2,
        trial_runner="packed",
        report=False,
        confirm="2x1",
    )
    result = run_search(changed)
    assert len(result.trials) == 13
    origins = result.trials["origin"].tolist()
    assert origins[:2] == ["baseline", "recipe"] and origins.count("recipe") == 1
    assert result.recipe_trial is not None and result.recipe_trial.values == recipe
    confirmed = result.trials[result.trials["eval_loss_mean"].notna()]
    assert len(confirmed) == 2
    assert result.best_trial.trial_id == confirmed.loc[confirmed["eval_loss_mean"].idxmin(), "trial_id"]
    metrics = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())
    assert len(metrics["confirmed"]["values"]) == 2
    assert metrics["confirmed"]["values"][0] == metrics["eval_loss"] == result.best_trial.metrics["eval_loss"]
    assert any(line.startswith("Confirmed eval_loss") for line in search_summary(result).splitlines())
    study = optuna.load_study(
        study_name=STUDY_NAME, storage=JournalStorage(JournalFileBackend(str(tmp_path / "out/study.journal")))
    )
    assert len(study.trials) == 12, "the recipe is beside the study"
    assert Settings.load(tmp_path / "out" / "best" / "config.yaml").training.seed == settings.training.seed


@pytest.mark.heavy
def test_trackers_have_a_run_for_each_trial(
    settings: Settings, runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both local modes, in the processes that train: an engine's, or a trial's own workers'."""
    from vlmtune.trackers.services import mlflow_client

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    changed = settings.replace(
        output_dir=str(tmp_path / "tracked"),
        num_samples=2,
        search_space={"lora_r": {"choice": [2, 4]}},
        trial_runner=runner,
        early_stopping="none",
        report=False,
        report_to=["wandb", "mlflow"],
    )
    result = run_search(changed)
    folder, rows = Path(result.folder), result.trials
    assert len(rows) == 2
    client = mlflow_client(str(folder))
    experiment = client.get_experiment_by_name("tracked")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == sorted(rows["trial_id"])
    for row in rows.to_dict("records"):
        data = runs[row["trial_id"]].data
        assert data.params["lora_r"] == str(row["lora_r"])
        history = client.get_metric_history(runs[row["trial_id"]].info.run_id, "train/loss")
        assert sorted({one.step for one in history}) == [1, 2, 3, 4]
        assert data.metrics["eval_loss"] == pytest.approx(row["eval_loss"], rel=1e-6)
        run_id = (folder / "trackers" / f"{row['trial_id']}.wandb").read_text()
        assert list((folder / "trackers" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert "wandb" not in {path.name for path in (folder / "best").rglob("*")}
