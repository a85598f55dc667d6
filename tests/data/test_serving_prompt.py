"""What serving must set is found in the template."""

from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.chat_template import ChatTemplate
from vlmtune.data.serving_prompt import serving_notes
from vlmtune.image_resolution import ImageResolution
from vlmtune.model_ref import ModelRef

THINKS = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}
{%- if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% else %}<think>
{% endif %}{% endif -%}"""
PLAIN = THINKS[: THINKS.index("{% if enable_thinking is")] + "{% endif -%}"
DATED = "{{ strftime_now('%d %b %Y') }}" + PLAIN


def notes(model: Path, template: str | None) -> list[str]:
    processor: Any = ModelRef(str(model)).processor()
    processor.chat_template = template
    return serving_notes(ChatTemplate(processor), ImageResolution())


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (PLAIN, []),
        (THINKS, ['chat_template_kwargs {"enable_thinking": false}', "in another way"]),
        (DATED, ["today's date"]),
        (None, ["ships no chat template"]),
    ],
)
def test_notes_of_a_template(models: Path, template: str | None, words: list[str]) -> None:
    found = notes(models / "llava", template)
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))
