"""Questions about one image to a loaded adapter, and the same by plain transformers and PEFT."""

import re
from pathlib import Path

import pytest

from vlmtune.cli.chat import talk
from vlmtune.errors import DataError
from vlmtune.evaluation.chat import Chat, one_image
from vlmtune.training.save import usage_snippet

ROOT = Path(__file__).parents[2]
QUESTION = "How many cups are there?"


def test_the_code_of_the_card_prints_what_chat_answers(
    demo_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder = demo_adapter.parent / "llava", demo_adapter
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


def test_one_image_is_one_file(demo_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = demo_adapter.parent
    monkeypatch.chdir(folder)
    for path in (str(folder / "photo.jpg"), "photo.jpg", "./photo.jpg", "adapter/../photo.jpg"):
        assert one_image(path) == str(folder / "photo.jpg")
    for path in (folder, folder / "none.jpg", folder / "adapter" / "config.yaml"):
        with pytest.raises(DataError):
            one_image(str(path))


def test_a_talk_changes_images_and_survives_a_wrong_path(
    demo_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(demo_adapter.parent / "photo.jpg")
    lines = iter(["nowhere.jpg", image, "How many?", image, "And now?", ""])
    talk(lambda path, question: f"{Path(path).name}: {question}", None, lambda _: next(lines))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("--image nowhere.jpg") or "nowhere.jpg" in said[0]
    assert said[1:] == ["photo.jpg: How many?", f"the image is now {image}", "photo.jpg: And now?"]
