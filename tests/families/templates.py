"""The chat templates in chat/: short ones that behave as the families' own, each written for these tests.

They keep where a system turn goes, what stands around roles and images, what is stripped, how the generation
prompt ends, whether an empty thought precedes an answer, and what a template cannot take.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "chat"


def chat_template(name: str, **words: str) -> str:
    """The template of a file, each of these `words` in it replaced."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    for word, value in words.items():
        text = text.replace(word, value)
    return text


def chatml(image: str, video: str = "", *, default_system: bool = False) -> str:
    """ChatML with these placeholders of an image and a video."""
    return chat_template("chatml_system" if default_system else "chatml", IMAGE=image, VIDEO=video)
