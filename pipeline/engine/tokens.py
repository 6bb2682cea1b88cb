"""Whether a tokenizer and a model mean the same tokens.

Told from tokenizer.json on the driver, without transformers, and once more of the tokenizer that is
loaded.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.engine.checkpoint import Checkpoint
from pipeline.engine.family import FAMILIES
from schemas.errors import SpecError

USUAL_IMAGE_TOKEN = "<image>"


def check_tokens(checkpoint: Checkpoint) -> None:
    """Raise SpecError for a tokenizer.json that cannot go with the model.

    What transformers makes up while it loads a tokenizer is left to `check_fit`.
    """
    if checkpoint.config.get("model_type") not in FAMILIES:
        return
    stored = checkpoint.read_json("tokenizer.json")
    if not stored:
        return
    settings = checkpoint.read_json("tokenizer_config.json")
    vocabulary = _vocabulary(checkpoint, stored, settings)
    token, is_declared = _image_token(checkpoint, settings)
    if is_declared and token not in vocabulary:
        return
    config = checkpoint.config
    check_fit(
        checkpoint.path,
        vocabulary,
        image_token=token,
        image_token_id=config.get("image_token_index", config.get("image_token_id")),
        embedded=(config.get("text_config") or {}).get("vocab_size"),
    )


def check_fit(
    name: str,
    vocabulary: Mapping[str, int],
    *,
    image_token: str | None,
    image_token_id: int | None,
    embedded: int | None,
) -> None:
    """`image_token`: the processor's; `image_token_id`: the model's. `embedded`: how many tokens it
    embeds. Null: not known."""
    found = None if image_token is None else vocabulary.get(image_token)
    if image_token is not None and found is None:
        raise SpecError(
            f"model {name}: the tokenizer has no token {image_token!r}, which stands for the image "
            f"in a prompt: add it as a special token of id {image_token_id} (image_token_index of "
            "config.json)"
        )
    if found is not None and image_token_id is not None and found != image_token_id:
        raise SpecError(
            f"model {name}: the processor's image token {image_token!r} is {found}, config.json's "
            f"image_token_index {image_token_id}: bring them in line"
        )
    largest = max(vocabulary.values())
    if embedded is not None and largest >= embedded:
        raise SpecError(
            f"model {name}: the tokenizer's largest id is {largest}, but the model embeds only "
            f"{embedded} tokens: resize the embeddings"
        )


def _vocabulary(
    checkpoint: Checkpoint, stored: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, int]:
    """Of all the places where transformers looks for tokens."""
    model = stored.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if not words:
        raise SpecError(f"model {checkpoint.path}: tokenizer.json has no vocabulary: get it again")
    if isinstance(words, list):
        words = {word: number for number, (word, _) in enumerate(words)}
    added = {each["content"]: each["id"] for each in stored.get("added_tokens") or ()}
    decoder = settings.get("added_tokens_decoder") or {}
    declared = {each["content"]: int(number) for number, each in decoder.items()}
    return {**words, **checkpoint.read_json("added_tokens.json"), **added, **declared}


def _image_token(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> tuple[str, bool]:
    """What stands for an image; whether the tokenizer's settings name it."""
    extra = settings.get("extra_special_tokens")
    named = settings.get("image_token") or (isinstance(extra, dict) and extra.get("image_token"))
    token = named or checkpoint.read_json("processor_config.json").get("image_token")
    token = token.get("content") if isinstance(token, dict) else token
    also = [*(settings.get("additional_special_tokens") or ()), *(extra or ())]
    token = str(token or USUAL_IMAGE_TOKEN)
    return token, bool(named) or token in also
