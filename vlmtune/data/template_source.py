"""The chat template of a processor, as text, and the tokens that stand for an image or a video in it."""

from typing import Any

from vlmtune.errors import ModelError

# LLaVA-1.5's format, for models that ship no chat template: images first, then the text of a turn.
BUILTIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{ message['role'].upper() + ': ' }}{%- endif -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{{ ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""


def template_of(processor: Any) -> str:
    """The chat template that rows are rendered with: the processor's own, or the built-in one.

    Raises:
        ModelError: the processor has several templates and none is named 'default', or it has no image token.
    """
    return template_source(processor, image_token_of(processor))


def template_source(processor: Any, image_token: str) -> str:
    template = processor.chat_template or processor.tokenizer.chat_template
    if template is None:
        template = BUILTIN_TEMPLATE.replace("<image>", image_token)
    if isinstance(template, dict):
        if "default" not in template:
            raise ModelError(
                f"the processor has the chat templates {', '.join(template)} and none of the name 'default': "
                "keep the one to use as chat_template.jinja in the model's folder"
            )
        template = template["default"]
    return str(template)


def image_token_of(processor: Any) -> str:
    for owner in (processor, processor.tokenizer):
        token = getattr(owner, "image_token", None)
        if token is not None:
            return str(token)
    raise ModelError(
        f"{type(processor).__name__} has no token that stands for an image in a text: "
        "its model answers to one image alone, not in a conversation, and cannot be tuned here"
    )


def video_token_of(processor: Any) -> str | None:
    """The text that stands for a video; None if the processor does not read videos."""
    if getattr(processor, "video_processor", None) is None:
        return None
    tokens = (getattr(owner, "video_token", None) for owner in (processor, processor.tokenizer))
    return next((str(token) for token in tokens if token is not None), None)
