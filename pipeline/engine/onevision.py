"""LLaVA-OneVision's processor without its half for videos, which does not load without torchvision.

Imports transformers, so it is imported where a processor is loaded only.
"""

from typing import Any

from transformers import LlavaOnevisionProcessor


class ImagesOnly(LlavaOnevisionProcessor):  # type: ignore[misc]  # transformers is not typed
    """transformers reads off the names of these parameters which parts a processor has."""

    def __init__(  # noqa: PLR0913
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            None,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
        )
