"""What a checkpoint's processor makes of images and questions: whether the model can read it."""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from jobs.findings import Finding
from jobs.subject import Subject
from jobs.workload import LOOKED_AT, Workload
from pipeline.engine.family import ImageTokens
from pipeline.engine.load import processor_repairs
from pipeline.engine.look import features_of, mismatch
from pipeline.engine.pixels import ProcessorResize, resize_of, resized
from pipeline.engine.request import Branch, ImagePixels
from pipeline.tokenise import Tokeniser
from schemas.job import ModelSpec

QUESTIONS = (
    "What is this?",
    "Describe the image in one sentence.",
    "Is there anything red in it? Answer yes or no.",
    "How many things are to be seen, and which of them is the largest one of all?",
    "Where was this taken, at what time of the day and of the year, in what kind of weather, and "
    "how can one tell all that from what is to be seen?",
)
QUESTIONS_OF = (1, 2, 3, 5)
"""On each image: a lone one and several are packed differently."""
SIZES = (LOOKED_AT, (640, 480), (480, 640), (1000, 300))
"""Width and height of images that are cut into tiles."""
_ALSO_OF_THE_MODEL = ("vision_feature_select_strategy", "vision_aspect_ratio")
"""Settings that stand in processor_config.json and in config.json."""
FEWEST_TOKENS, MOST_TOKENS = 3, 16
"""Of an answer."""


def look_over(spec: ModelSpec, subject: Subject) -> Iterator[Finding]:
    """Raises PromptError where a question cannot be put to the model."""
    yield from _repaired(spec)
    yield _image_tokens(subject)
    yield _pixels(subject)
    yield from _text(spec, subject)


def _repaired(spec: ModelSpec) -> Iterator[Finding]:
    for repair in processor_repairs(spec):
        yield Finding(
            "processor",
            "mended",
            f"repaired: {repair}. With the file as it is, an image would take another number of "
            "places in a prompt than the model fills. Lavaflow answers as if the file were right; "
            f"for other programs, write {repair.key}: {repair.now!r} into it",
        )


def _image_tokens(subject: Subject) -> Finding:
    about, counted = "image tokens", ImageTokens(subject.processor)
    height, width = subject.image_shape[-3:-1]
    places = []
    for size in [LOOKED_AT] if counted.fixed is not None else SIZES:
        n_tokens = counted.of(size)
        try:
            n_features = _features(subject, size)
        except (ValueError, RuntimeError) as error:
            return Finding(
                about,
                "wrong",
                f"the processor makes images of {width} x {height} pixels, which the model does "
                f"not take: {error}. Bring size and crop_size of the image processor in line with "
                "vision_config.image_size of config.json",
            )
        if n_tokens != n_features:
            return Finding(
                about,
                "wrong",
                f"an image of {size[0]} x {size[1]} pixels takes {n_tokens} places in a prompt, "
                f"but the model has {n_features} pieces of it to put there: every question would "
                "be a failed row (TokenFeatureMismatch). "
                + (_culprits(subject) or str(mismatch(n_tokens, n_features))),
            )
        places.append(f"{n_tokens} at {size[0]} x {size[1]} pixels")
    if counted.fixed is not None:
        told = f"an image is resized to {width} x {height} pixels and takes {n_tokens} places"
    else:
        told = (
            f"an image is cut into tiles of {width} x {height} pixels and takes, with its size, "
            f"more or fewer places ({', '.join(places)})"
        )
    return Finding(about, "ok", f"{told} in a prompt, as many as the model fills")


@torch.inference_mode()
def _features(subject: Subject, size: tuple[int, int]) -> int:
    """How many the model makes of one image."""
    blank = ImagePixels(resized(subject.processor, Image.new("RGB", size)), "blank", size)
    table = torch.from_numpy(subject.table).to(subject.model.device)
    return sum(map(len, features_of(subject.model, [blank], table)))


def _culprits(subject: Subject) -> str:
    """What processor and model say differently of how an image is cut up."""
    processor, config = subject.processor, subject.model.config
    vision = config.vision_config
    pairs = {
        key: (getattr(processor, key), ours)
        for key, ours in (
            ("num_image_tokens", (vision.image_size // vision.patch_size) ** 2),
            *((key, getattr(config, key, None)) for key in _ALSO_OF_THE_MODEL),
        )
        if hasattr(processor, key) and ours is not None
    }
    return "; ".join(
        f"{key} is {theirs!r} in processor_config.json, but {ours!r} in config.json, which the "
        f"weights were made for: set it to {ours!r} in processor_config.json"
        for key, (theirs, ours) in pairs.items()
        if theirs != ours
    )


def _pixels(subject: Subject) -> Finding:
    kind = type(subject.processor.image_processor).__name__
    by_pillow = not isinstance(resize_of(subject.processor), ProcessorResize)
    how = "by Pillow alone, bit for bit as" if by_pillow else "by"
    return Finding("pixels", "ok", f"images are resized {how} transformers' {kind}")


def _text(spec: ModelSpec, subject: Subject) -> Iterator[Finding]:
    processor, tokenizer = subject.processor, subject.processor.tokenizer
    tokeniser = Tokeniser(spec, processor)
    prompt = tokeniser.render(QUESTIONS[0])
    tokeniser.check(tokeniser.ids(prompt, (subject.tokens_per_image,)), max_new_tokens=MOST_TOKENS)
    shown = f"a question becomes {prompt!r}"
    if processor.chat_template:
        yield Finding("chat template", "ok", shown)
    else:
        yield Finding(
            "chat template",
            "mended",
            f"the checkpoint brings none; LLaVA-1.5's is used, and {shown}. If the model was "
            "trained on another, put it into chat_template.jinja",
        )
    if tokenizer.bos_token and prompt.startswith(tokenizer.bos_token):
        told = f"the template writes {tokenizer.bos_token}, and so would the tokenizer: one is used"
        yield Finding("start token", "mended", told)
    if not subject.end_tokens:
        yield Finding(
            "end token",
            "note",
            "neither generation_config.json nor the tokenizer names one: no answer ends by itself, "
            "each is as long as generate.max_new_tokens allows",
        )


def mixed_work(spec: ModelSpec, subject: Subject, images: list[np.ndarray]) -> Workload:
    """Few and many questions on an image, of all lengths, with answers of all lengths."""
    tokeniser = Tokeniser(spec, subject.processor)
    image_token = subject.model.config.image_token_id
    places = (subject.tokens_per_image,)
    asked = [tuple(tokeniser.ids(tokeniser.render(text), places)) for text in QUESTIONS]
    end = max(place for place, token in enumerate(asked[0]) if token == image_token) + 1
    branches = [
        [
            Branch(asked[n][end:], FEWEST_TOKENS + (5 * n + 3 * image) % (MOST_TOKENS - 2))
            for n in range(count)
        ]
        for image, count in zip(range(len(images)), QUESTIONS_OF, strict=True)
    ]
    return Workload("vqa", images, asked[0][:end], branches)
