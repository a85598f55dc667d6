"""Questions about one image to a loaded adapter, and the same by plain transformers and PEFT."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmtune.cli.chat import talk
from vlmtune.config.settings import Settings
from vlmtune.demo.trained import write_trained_llava
from vlmtune.errors import DataError
from vlmtune.evaluation.chat import Chat, one_image
from vlmtune.model.base import load_base
from vlmtune.model.lora import attach, lora_config, save_adapter, target_modules
from vlmtune.model_ref import ModelRef
from vlmtune.training.save import usage_snippet, write_chat_template

ROOT = Path(__file__).parents[2]
QUESTION = "How many cups are there?"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo's base, and an adapter of it that changes its answers a little."""
    folder = tmp_path_factory.mktemp("chat")
    write_trained_llava(folder / "llava")
    ref = ModelRef(str(folder / "llava"))
    base = load_base(ref, quantization="none", dtype="float32", device=torch.device("cpu"))
    targets = target_modules(base, None, lora_vision=False)
    model = attach(base, lora_config(base, r=4, alpha=8, dropout=0.0, target_modules=targets), seed=0)
    save_adapter(model, folder / "adapter")
    settings = Settings.from_flags({"model_name_or_path": str(folder / "llava"), "dtype": "float32"})
    settings.save(folder / "adapter" / "config.yaml")
    ref.processor().save_pretrained(folder / "adapter")
    write_chat_template(str(folder / "adapter"), settings)
    Image.effect_noise((160, 120), 60).convert("RGB").save(folder / "photo.jpg")
    return folder / "llava", folder / "adapter"


def test_the_code_of_the_card_prints_what_chat_answers(
    adapter: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder = adapter
    image = str(folder.parent / "photo.jpg")
    answer = Chat.load(str(folder), 16, use_cpu=True).ask(image, QUESTION)
    assert answer
    exec(usage_snippet(str(base), str(folder), image, QUESTION), {})
    assert capsys.readouterr().out.splitlines()[-1].strip() == answer.strip()


def test_the_code_of_the_docs_is_that_of_the_card() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    image = "demo/mall/frames/seq_000001.jpg"
    question = "How many people are in this picture of the mall?"
    assert code == usage_snippet("demo/llava", "out/demo/best", image, question)


def test_one_image_is_one_file(adapter: tuple[Path, Path]) -> None:
    folder = adapter[1].parent
    assert one_image(str(folder / "photo.jpg")) == str(folder / "photo.jpg")
    for path in (folder, folder / "none.jpg", folder / "adapter" / "config.yaml"):
        with pytest.raises(DataError):
            one_image(str(path))


def test_a_talk_changes_images_and_survives_a_wrong_path(
    adapter: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(adapter[1].parent / "photo.jpg")
    lines = iter(["nowhere.jpg", image, "How many?", image, "And now?", ""])
    talk(lambda path, question: f"{Path(path).name}: {question}", None, lambda _: next(lines))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("--image nowhere.jpg") or "nowhere.jpg" in said[0]
    assert said[1:] == ["photo.jpg: How many?", f"the image is now {image}", "photo.jpg: And now?"]
