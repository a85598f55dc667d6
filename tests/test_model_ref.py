"""A model by its name: config, modules and processor, and every way in which they can be absent."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from vlmtune.errors import ModelError
from vlmtune.model_ref import ModelRef, plain_model_errors


def test_config_outline_and_processor_of_a_folder(models: Path):
    ref = ModelRef(str(models / "llava"))
    assert ref.config().model_type == "llava"
    assert type(ref.processor()).__name__ == "LlavaProcessor"
    meta_model = ref.meta_model()
    assert {parameter.device.type for parameter in meta_model.parameters()} == {"meta"}
    assert meta_model.name_or_path == ref.name


def test_a_text_model_is_no_vision_language_model(models: Path, tmp_path: Path):
    LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    for load in (ModelRef.config, ModelRef.meta_model):
        with pytest.raises(ModelError, match=r"is not a vision-language model \(its type is 'llama'\)"):
            load(ModelRef(str(tmp_path)))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models / "llava" / file, tmp_path)
    tokenizer = tmp_path / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "processor_class": None}))
    with pytest.raises(ModelError, match="no vision-language processor there"):
        ModelRef(str(tmp_path)).processor()


def test_a_folder_without_processor(models: Path, tmp_path: Path):
    folder = Path(shutil.copytree(models / "llava", tmp_path / "llava"))
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(ModelError, match=str(folder)):
        ModelRef(str(folder)).processor()


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does for a gated model, one that does not exist, and one without the revision that
    was asked for."""

    def do_GET(self) -> None:
        answers = {
            "gated": (403, "GatedRepo"),
            "absent": (404, "RepoNotFound"),
            "known": (404, "RevisionNotFound"),
        }
        status, code = next(answer for model, answer in answers.items() if f"/someone/{model}" in self.path)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


ASK = """
import sys
from vlmtune.errors import ModelError
from vlmtune.model_ref import ModelRef, plain_model_errors
from vlmtune.model.base import check_model
for name in sys.argv[1:]:
    ref = ModelRef(name, "v9")
    for load in (check_model, ModelRef.processor):
        try:
            load(ref)
        except ModelError as error:
            print(error)
"""


def ask(tmp_path: Path, names: list[str], **environment: str) -> list[str]:
    """What a fresh process, which reads the Hub's address at import, says about the names, two lines each."""
    root = str(Path(__file__).parents[1])
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and not key.lower().endswith("_proxy")
    }
    env = {**inherited, "HF_HOME": str(tmp_path), "PYTHONPATH": root, **environment}
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names], env=env, capture_output=True, text=True, check=True, timeout=120
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(names), done.stdout
    return lines


def test_what_the_hub_refuses(hub: str, tmp_path: Path):
    lines = ask(
        tmp_path, ["someone/gated", "someone/absent", "someone/known", "no/such/folder"], HF_ENDPOINT=hub
    )
    for index, words in enumerate(
        [
            ["someone/gated is gated", "https://huggingface.co/someone/gated", "`hf auth login`", "HF_TOKEN"],
            ["someone/absent is neither a folder nor a model on the Hub", "`hf auth login`"],
            ["someone/known has no revision 'v9'"],
            ["no/such/folder is not there"],
        ]
    ):
        for line in lines[2 * index : 2 * index + 2]:
            assert all(word in line for word in words), line


def test_offline(tmp_path: Path):
    for line in ask(tmp_path, ["someone/model"], HF_HUB_OFFLINE="1"):
        assert "someone/model is neither a folder nor in the local cache" in line
        assert "HF_HUB_OFFLINE" in line


def test_a_torchvision_of_another_torch_is_named(models: Path):
    ref = ModelRef(str(models / "llava"))
    needs = pytest.raises(ModelError, match=r"needs torchvision, which .* belongs to torch \d")
    with needs, plain_model_errors(ref):
        raise RuntimeError("operator torchvision::nms does not exist")
    with (
        pytest.raises(ModelError, match="cannot be loaded: RuntimeError: something"),
        plain_model_errors(ref),
    ):
        raise RuntimeError("something else")
    with pytest.raises(torch.OutOfMemoryError), plain_model_errors(ref):
        raise torch.OutOfMemoryError
