"""The notebook runs from top to bottom on the demo's base."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "your_own_images.ipynb"


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_it_runs_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "my_adapter" / "adapter_model.safetensors").is_file()
    answers = [
        output["text"].strip()
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stdout" and "print(answer)" in cell["source"]
    ]
    assert any(text.splitlines()[-1] for text in answers)
