"""`tests/` mirrors the modules: `vlmtune/data/split.py` is tested in `tests/data/test_split.py`."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Modules that the tests of another one reach. A folder stands for all of its modules.
TESTED_IN = {
    # One test for each private API: it fails when the API moves.
    "compat/": "test_compat.py",
    "cli/ui.py": "ui/test_server.py",
    "ui/page.py": "ui/test_server.py",
    "ui/loopback.py": "ui/test_server.py",
    "cli/chat.py": "evaluation/test_chat.py",
    "cli/main.py": "cli/test_commands.py",
    "cli/command_parser.py": "cli/test_adapter_options.py",
    # Parts of `RowEncoder` and `collate`, which show in what these return, for 55 families too.
    "data/input_format.py": "data/test_collate.py",
    "model/cross_attention_features.py": "training/test_vision_cache.py",
    "data/find_input_format.py": "data/test_collate.py",
    # Options that are only read through `Settings`.
    "config/options.py": "config/test_settings.py",
    "config/search_options.py": "config/test_settings.py",
    # Code behind a command, which only a whole command reaches.
    "evaluation/evaluate.py": "ray_jobs/test_eval.py",
    "evaluation/export.py": "ray_jobs/test_export.py",
    "evaluation/quantized_merge.py": "ray_jobs/test_export.py",
    "evaluation/predict.py": "ray_jobs/test_predict.py",
    "preflight/inspection.py": "ray_jobs/test_inspect_data.py",
    "single_run.py": "ray_jobs/test_train.py",
    # Calls `check_causal` on a row.
    "evaluation/try_row.py": "model/test_causal.py",
    # Steps of preparing rows, whose result is the store.
    "data/ray_data.py": "data/test_prepare.py",
    # Steps from a file to a row.
    "data/dialogues.py": "data/test_frames.py",
    "data/template_messages.py": "data/test_chat_template.py",
    "data/template_rendering.py": "data/test_chat_template.py",
    "data/template_source.py": "data/test_chat_template.py",
    "data/row_values.py": "data/test_records.py",
    "data/turns.py": "data/test_records.py",
    "data/fragment.py": "data/test_scan.py",
    "data/file_formats/": "data/test_file_formats.py",
    "data/store_writer.py": "data/test_store.py",
    "data/store_meta.py": "data/test_store.py",
    "data/file_kind.py": "data/test_scan.py",
    "data/row_images.py": "data/test_records.py",
    # Parts of functions that are tested as a whole.
    "model/lora_targets.py": "model/test_lora.py",
    "model/tower_output.py": "model/test_vision_features.py",
    "model/decoder_inputs.py": "model/test_vision_features.py",
    # Parts of the demo's drawings and tiny models.
    "demo/drawing.py": "demo/test_mall.py",
    "demo/tiny_tokenizer.py": "demo/test_models.py",
    "demo/toy_kinds.py": "demo/test_toys.py",
    # Needs a GPU: checkpoints that leave it.
    "model/offload.py": "training/test_loop.py",
    # Numbers of the preflight, which its two reports show.
    "preflight/memory.py": "preflight/test_console_report.py",
    "preflight/summary.py": "preflight/test_statistics.py",
    # Parts of a page that only show with the others.
    "search/report/answers.py": "search/report/test_page.py",
    "search/report/charts.py": "search/report/test_page.py",
    "search/report/trial_table.py": "search/report/test_page.py",
    "search/report/coordinates.py": "search/report/test_page.py",
    "search/report/sections.py": "search/report/test_page.py",
    # Steps of a search that only a whole search reaches.
    "search/refit.py": "search/test_run_search.py",
    "search/trial_console.py": "search/test_run_search.py",
    "search/trial_recorder.py": "search/test_tuner.py",
    "search/space_entries.py": "search/test_space.py",
    "search/point_queue.py": "search/test_searcher.py",
    # Parts of the Trainer: only a run shows that they do what TRL does.
    "model/step.py": "training/test_loop.py",
    # Parts of the self-check, which only a run with a fault in it shows.
    "model/acceleration.py": "evaluation/test_check_step.py",
    "model/self_check.py": "evaluation/test_check_step.py",
    "training/step_result.py": "evaluation/test_check_step.py",
    # Shows on models that change with their batch, of which tests/families has one.
    "evaluation/independence.py": "families/test_families.py",
    # What other libraries raise shows where they are called.
    "library_errors.py": "test_model_ref.py",
    "training/adapted_model.py": "training/test_loop.py",
    "training/batches.py": "training/test_loop.py",
    "training/callbacks.py": "training/test_loop.py",
    "training/evaluator.py": "training/test_loop.py",
    "training/isolated.py": "training/test_launch.py",
    "training/step_log.py": "training/test_loop.py",
    "training/step_plan.py": "model/test_memory.py",
    "training/trainer.py": "training/test_loop.py",
    "trackers/services.py": "trackers/test_tracker.py",
}
# Test files that have no module of their name, and what they test.
OF_SEVERAL_MODULES = {
    "data/test_file_formats.py": "file_formats/: every kind of file and folder",
    "notebooks/test_your_own_images.py": "notebooks/your_own_images.ipynb",
    "data/test_prepare_cache.py": "prepare: what the cache holds and when it is used",
    "families/test_families.py": "every module, for 55 model families",
    "model/test_decoder_waits.py": "decoders of current families, with all that makes a step fast",
    "training/test_stock_trl.py": "both runners against plain TRL",
    "ray_jobs/test_kill_and_resume.py": "a search through everything that ends a command",
    "ray_jobs/test_job_submit.py": "the commands as Ray jobs",
    "ui/test_running_search.py": "the page of a search that runs",
    "ray_jobs/test_object_store.py": "a search in an S3-compatible object store",
    "ray_jobs/test_starting_points.py": "every starting point of docs/data.md, from files to an adapter",
    "search/test_packed_search.py": "a search over packed trials",
    "packed/test_packed_resolutions.py": "an engine over rows of several resolutions",
    "test_benchmarks.py": "benchmarks/",
    "test_cluster_yaml.py": "cluster.yaml",
    "test_compat.py": "compat/",
    "test_dockerfile.py": "Dockerfile",
    "test_imports.py": "imports of all modules",
    "test_k8s.py": "k8s/rayjob.yaml",
    "test_mirror.py": "names of test files",
    "test_vocabulary.py": "words and names in all files",
    "training/test_out_of_memory.py": "recovery from want of memory, in all runners",
}


def has_code(module: Path) -> bool:
    """Whether a module defines a function: one that only holds constants or fields has nothing to test."""
    return any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(module.read_text("utf-8"))))


def modules() -> dict[str, Path]:
    """The modules with code by their path below `vlmtune`, such as `data/split.py`."""
    package = ROOT / "vlmtune"
    paths = {path.relative_to(package).as_posix(): path for path in sorted(package.rglob("*.py"))}
    return {name: path for name, path in paths.items() if path.stem != "__init__" and has_code(path)}


def mirror_of(module: str) -> str:
    """The test file of a module's own name, below `tests`."""
    path = Path(module)
    return (path.parent / f"test_{path.stem.strip('_')}.py").as_posix()


def test_every_module_has_a_test_file_of_its_name() -> None:
    missing = [name for name in modules() if not (ROOT / "tests" / mirror_of(name)).exists()]
    assert [name for name in missing if not any(name.startswith(listed) for listed in TESTED_IN)] == []
    assert [listed for listed in TESTED_IN if not any(name.startswith(listed) for name in missing)] == []
    assert [file for file in TESTED_IN.values() if not (ROOT / "tests" / file).exists()] == []


def test_every_test_file_has_a_module_of_its_name() -> None:
    tests = ROOT / "tests"
    names = {path.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")}
    mirrors = {mirror_of(name) for name in modules()}
    commands = {f"ray_jobs/test_{path.stem}.py" for path in (ROOT / "ray_jobs").glob("*.py")}
    assert names - mirrors - commands == set(OF_SEVERAL_MODULES)
