"""The language or script of texts."""

import pytest

from vlmtune.data.languages import script_of, script_of_questions


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("How many?", "Latin script"),
        ("사람이 몇 명 있습니까? OK", "Korean"),
        ("何人いますか", "Japanese"),
        ("有几个人", "Chinese characters"),
        ("Сколько?", "Cyrillic script"),
        ("12?", "no letters"),
    ],
)
def test_scripts(text: str, script: str) -> None:
    assert script_of(text) == script


def test_the_users_turns_decide() -> None:
    def turn(role: str, text: str) -> dict[str, object]:
        return {"role": role, "content": [{"type": "image"}, {"type": "text", "text": text}]}

    turns = [turn("system", "Answer in English"), turn("user", "몇 명?"), turn("assistant", "three people")]
    assert script_of_questions(turns) == "Korean"
    assert script_of_questions([]) == "no letters"
