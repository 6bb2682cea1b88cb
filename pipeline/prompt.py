"""A question and what came before it, as the messages that a chat template takes.

Pure: knows neither a tokenizer nor a template engine. The image goes first in the first message of
the user, where LLaVA was trained to see it.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.sources.base import Turn
from schemas.errors import ImageTokenInText

IMAGE_TOKEN = "<image>"

LLAVA_1_5_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set texts = message.content | selectattr('type', 'equalto', 'text') -%}"
    "{%- set text = texts | map(attribute='text') | join(' ') -%}"
    "{%- if message.role == 'system' -%}{{ text + ' ' }}"
    "{%- elif message.role == 'assistant' -%}{{ 'ASSISTANT: ' + text + '</s>' }}"
    "{%- else -%}{{ 'USER: ' }}"
    "{%- for part in message.content if part.type == 'image' -%}{{ '<image>\n' }}{%- endfor -%}"
    "{{ text + ' ' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
"""LLaVA-1.5's documented format, for checkpoints that bring no chat template:
`{system} USER: <image>\\n{question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT:`."""


def messages_for(
    question: str,
    *,
    system: str | None = None,
    conversation: Sequence[Turn] = (),
    image_token: str = IMAGE_TOKEN,
) -> list[dict[str, Any]]:
    """Messages for `apply_chat_template`: system text, the earlier turns, then the question.

    System texts (the spec's, then the row's) become one message at the start. An image token at
    either end of the conversation's first user turn is where LLaVA's data marks the image; it is
    dropped, since the image is placed there anyway. Raises ImageTokenInText for any other.
    """
    systems = [t.content for t in conversation if t.role == "system"]
    turns = [t for t in conversation if t.role != "system"]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is not None:
        turns[first] = Turn("user", _without_mark(turns[first].content, image_token))
    texts = [*([system] if system else []), *systems]
    said = [*([Turn("system", "\n".join(texts))] if texts else []), *turns, Turn("user", question)]
    for turn in said:
        if image_token in turn.content:
            raise ImageTokenInText(
                f"the {turn.role}'s text {_excerpt(turn.content)!r} contains {image_token}, which "
                "stands for an image: remove it from the text"
            )
    messages: list[dict[str, Any]] = [
        {"role": turn.role, "content": [{"type": "text", "text": turn.content}]} for turn in said
    ]
    asked = next(message for message in messages if message["role"] == "user")
    asked["content"].insert(0, {"type": "image"})
    return messages


def _without_mark(text: str, image_token: str) -> str:
    if text.startswith(image_token):
        return text.removeprefix(image_token).removeprefix("\n")
    if text.endswith(image_token):
        return text.removesuffix(image_token).removesuffix("\n")
    return text


def _excerpt(text: str, longest: int = 80) -> str:
    return text if len(text) <= longest else text[:longest] + "..."
