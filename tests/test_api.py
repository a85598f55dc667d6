"""The public API: what `import vlmtune` gives, and what it costs."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import vlmtune
from vlmtune.api import search
from vlmtune.errors import ConfigError

ROOT = Path(__file__).parents[1]
FUNCTIONS = ("search", "train", "evaluate", "predict", "export", "inspect")


def test_importing_vlmtune_imports_no_heavy_library() -> None:
    heavy = ("ray", "torch", "transformers", "pandas")
    code = f"import vlmtune, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_all_that_is_public_is_there_and_documented() -> None:
    assert set(vlmtune.__all__) == {"Settings", *FUNCTIONS}
    for name in FUNCTIONS:
        function = getattr(vlmtune.api, name)
        assert function.__doc__ and "Returns:" in function.__doc__ and "Raises:" in function.__doc__
        parameters = inspect.signature(function).parameters.values()
        assert all(parameter.annotation is not parameter.empty for parameter in parameters)


def test_search_is_a_function_and_a_package() -> None:
    from vlmtune.search.space import Space

    assert vlmtune.search.space.Space is Space
    assert callable(vlmtune.search)
    assert list(inspect.signature(vlmtune.search).parameters) == list(inspect.signature(search).parameters)
    space = {"lora_r": {"choice": []}}
    with pytest.raises(ConfigError, match="search_space"):
        vlmtune.search(
            vlmtune.Settings.from_flags({"model_name_or_path": "owner/base", "search_space": space})
        )


def test_wrong_arguments_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--use_cqu: there is no such option here; did you mean use_cpu\?"):
        vlmtune.evaluate("adapter", tmp_path, use_cqu=True)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="--metrics exact_mach: there is no such metric"):
        vlmtune.evaluate("adapter", tmp_path, metrics=["exact_mach"])
    with pytest.raises(ConfigError, match="--base_only and --compare_base"):
        vlmtune.evaluate("adapter", tmp_path, base_only=True, compare_base=True)
    with pytest.raises(ConfigError, match="--format: 'csv' is not one of jsonl, parquet"):
        vlmtune.predict("adapter", "data", tmp_path, format="csv")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nothing to export"):
        vlmtune.export("adapter", tmp_path)
