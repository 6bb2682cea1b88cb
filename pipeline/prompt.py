"""A question and what came before it, as the messages that a chat template takes.

Pure: knows neither a tokenizer nor a template engine. The images go first in the first message of
the user that is about them, where LLaVA was trained to see one: examples come before.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.formats import IMAGE_TOKEN
from pipeline.sources.base import Turn
from schemas.errors import ImageTokenInText

SEVERAL_IMAGES = (
    "LLaVA was not trained on several images in one prompt; look at some of the answers before you "
    "rely on them"
)


def messages_for(  # noqa: PLR0913 (all but one by name)
    question: str,
    *,
    system: str | None = None,
    conversation: Sequence[Turn] = (),
    shots: Sequence[Turn] = (),
    image_token: str = IMAGE_TOKEN,
    images: int = 1,
) -> list[dict[str, Any]]:
    """Messages for `apply_chat_template`: system text, examples, the earlier turns, the question.

    System texts (the spec's, then the row's) become one message at the start. An image token at
    either end of the conversation's first user turn is where LLaVA's data marks the image; it is
    dropped, one for each of so many `images`, since they are placed there anyway. Raises
    ImageTokenInText for any other.
    """
    systems = [t.content for t in conversation if t.role == "system"]
    turns = [t for t in conversation if t.role != "system"]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is not None:
        text = turns[first].content
        for _ in range(images):
            text = _without_mark(text, image_token)
        turns[first] = Turn("user", text)
    texts = [*([system] if system else []), *systems]
    before = [*([Turn("system", "\n".join(texts))] if texts else []), *shots]
    said = [*before, *turns, Turn("user", question)]
    for turn in said:
        if image_token in turn.content:
            raise ImageTokenInText(
                f"the {turn.role}'s text {_excerpt(turn.content)!r} contains {image_token}, which "
                "stands for an image: remove it from the text"
            )
    messages: list[dict[str, Any]] = [
        {"role": turn.role, "content": [{"type": "text", "text": turn.content}]} for turn in said
    ]
    asked = next(message for message in messages[len(before) :] if message["role"] == "user")
    asked["content"][:0] = [{"type": "image"} for _ in range(images)]
    return messages


def _without_mark(text: str, image_token: str) -> str:
    if text.startswith(image_token):
        return text.removeprefix(image_token).removeprefix("\n")
    if text.endswith(image_token):
        return text.removesuffix(image_token).removesuffix("\n")
    return text


def _excerpt(text: str, longest: int = 80) -> str:
    return text if len(text) <= longest else text[:longest] + "..."
