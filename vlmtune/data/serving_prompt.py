"""Notes on how to serve a model so that its prompt is the one of training.

In training, each last answer follows the template's own generation prompt. If the template has options,
contains the date, or renders past answers differently, a server needs settings for that, which these notes
name.
"""

from __future__ import annotations

import json

from vlmtune.data.chat_template import ChatTemplate
from vlmtune.data.template_rendering import FIXED_DATE, EncodeError
from vlmtune.image_resolution import ImageResolution, tile_limit

BUILTIN_EXAMPLE = "USER: <image>\nQUESTION ASSISTANT:"


def serving_notes(template: ChatTemplate, resolution: ImageResolution) -> list[str]:
    """Lines for the person who serves an adapter of this model; empty if a server needs no settings.

    Args:
        resolution: the limits of the image resolution that the template's processor has.
    """
    notes = _resolution_notes(template, resolution)
    if template.processor.chat_template is None and template.processor.tokenizer.chat_template is None:
        prompt = BUILTIN_EXAMPLE.replace("<image>", template.renderer.image_token)
        notes.append(f"the base ships no chat template; this folder has the one of training: {prompt!r}")
    try:
        agrees, options = template.agreement()
        plain, trained = template.generation_prompt({}), template.generation_prompt(options)
    except EncodeError:  # every row is bad for the same reason, and reports it
        return notes
    if options and plain != trained:
        values = json.dumps(options)
        notes.append(
            f"answers are trained behind {_ending(trained)!r}: serve with chat_template_kwargs {values} "
            f"(vLLM: --default-chat-template-kwargs '{values}'), or the model sees {_ending(plain)!r}"
        )
    if not agrees:
        notes.append(
            f"the template shows past answers in another way than it asks for one: trained is what it asks "
            f"with, {_ending(trained)!r}, which servers use"
        )
    if template.renderer.has_date:
        notes.append(
            f"the template writes today's date; rows have {FIXED_DATE:%d %b %Y}: serve with "
            f'chat_template_kwargs {{"date_string": "{FIXED_DATE:%d %b %Y}"}}'
        )
    return notes


def _resolution_notes(template: ChatTemplate, resolution: ImageResolution) -> list[str]:
    if not resolution:
        return []
    limits = {name: value for name, value in vars(resolution).items() if value is not None}
    if "max_image_tiles" in limits:
        limits[str(tile_limit(template.processor))] = limits.pop("max_image_tiles")
    return [
        f"images have {resolution}, as the adapter's processor has and the base's has not; serve with it "
        f"(vLLM: --mm-processor-kwargs '{json.dumps(limits)}')"
    ]


def _ending(prompt: str) -> str:
    """The last characters of a prompt, enough to tell two apart."""
    return prompt[-48:]
