"""Whether answers depend on the batch: the engine against transformers' `generate`.

    python -m benchmarks.exactness [--images N]

Asks easy-VQA's test questions of the embedded model in float32 three times: through the engine with
room for one image and a few questions at a time, with room for all that come at once, and through
`generate` on each single unpadded prompt. Prints one JSON object with the number of prompts whose
tokens are equal, and every difference; its exit status is 1 where there is any.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image

from pipeline.engine.load import load_model, load_processor
from pipeline.engine.pixels import pixel_table, resized
from pipeline.engine.request import Answer, Branch, ImagePixels, Prefix, Request
from pipeline.engine.slots import SlotsEngine
from schemas.job import ModelSpec
from tools.easy_vqa_data import LabelledImage, load_split

MAX_NEW_TOKENS = 16
IMAGES_PER_CALL = 16
SPEC = ModelSpec(dtype="float32", device="cpu")
NARROW_BYTES, WIDE_BYTES = 2**20, 2**29
Tokens = tuple[int, ...]


class Bench:
    """One model, asked in several ways."""

    def __init__(self, spec: ModelSpec = SPEC) -> None:
        self.spec = spec
        self.processor: Any = load_processor(spec)
        self.model: Any = load_model(spec, torch.device("cpu"))
        self.table = pixel_table(self.processor)

    def engine(self, images: Sequence[LabelledImage], *, budget: int) -> list[Tokens]:
        """Each question's tokens, all questions of an image in one request."""
        engine = SlotsEngine(
            load_model(self.spec, torch.device("cpu")),
            eos_token_ids=[self.model.generation_config.eos_token_id],
            table=self.table,
            kv_budget_bytes=budget,
        )
        tokens: list[Tokens] = []
        for start in range(0, len(images), IMAGES_PER_CALL):
            requests = [self.request(image) for image in images[start : start + IMAGES_PER_CALL]]
            for outcomes in engine.submit(requests):
                for outcome in outcomes:
                    assert isinstance(outcome, Answer), outcome
                    tokens.append(tuple(outcome.token_ids))
        return tokens

    def request(self, image: LabelledImage) -> Request:
        picture = picture_of(image)
        ids = [inputs["input_ids"][0] for inputs in self.inputs(image, picture)]
        split = max(n for n, token in enumerate(ids[0]) if token == self.processor.image_token_id)
        pixels = ImagePixels(
            resized(self.processor, picture), hashlib.sha256(image.path.read_bytes()).hexdigest()
        )
        branches = [Branch(prompt[split + 1 :], MAX_NEW_TOKENS) for prompt in ids]
        return Request(Prefix(ids[0][: split + 1], [pixels]), branches)

    @torch.inference_mode()
    def generate(self, images: Sequence[LabelledImage]) -> Iterator[Tokens]:
        """Each question's tokens as transformers gives them for that prompt alone."""
        end = self.model.generation_config.eos_token_id
        for image in images:
            for inputs in self.inputs(image, picture_of(image), return_tensors="pt"):
                ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
                new = ids[0, inputs["input_ids"].shape[1] :].tolist()
                yield tuple(new[:-1] if new[-1] == end else new)

    def inputs(
        self, image: LabelledImage, picture: Image.Image, **options: Any
    ) -> Iterator[dict[str, Any]]:
        for question, _ in image.questions:
            prompt = f"USER: <image>\n{question} ASSISTANT:"
            yield self.processor(text=prompt, images=picture, **options)


def picture_of(image: LabelledImage) -> Image.Image:
    with Image.open(image.path) as opened:
        return opened.convert("RGB")


def compare(images: Sequence[LabelledImage]) -> dict[str, Any]:
    bench = Bench()
    narrow = bench.engine(images, budget=NARROW_BYTES)
    wide = bench.engine(images, budget=WIDE_BYTES)
    single = list(bench.generate(images))
    differences = [
        {"prompt": n, "narrow": a, "wide": b, "generate": c}
        for n, (a, b, c) in enumerate(zip(narrow, wide, single, strict=True))
        if not a == b == c
    ]
    return {
        "benchmark": "engine with little and with much room against transformers generate, float32",
        "prompts": len(single),
        "equal": len(single) - len(differences),
        "differences": differences,
        "versions": {name: version(name) for name in ("easy-vqa", "torch", "transformers")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=None, help="only the first N images")
    figures = compare(load_split("test")[: parser.parse_args().images])
    print(json.dumps(figures, indent=2))
    raise SystemExit(1 if figures["differences"] else 0)


if __name__ == "__main__":
    main()
