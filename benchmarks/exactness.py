"""Whether answers depend on the batch: the engine against transformers' `generate`.

    python -m benchmarks.exactness [--images N]

Asks easy-VQA's test questions of the embedded model in float32 three times: through the engine in
batches of 1 and of 16, and through `generate` on each single unpadded prompt. Prints one JSON
object with the number of prompts whose tokens are equal, and every difference.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pipeline.embedded import CHECKPOINT
from pipeline.encode import Encode
from pipeline.generate import Generate
from schemas.job import JobSpec
from schemas.tables import SAMPLE, table_of
from tools.easy_vqa_data import LabelledImage, load_split

MAX_NEW_TOKENS = 16
IMAGES_PER_CALL = 16


def job_of(batch_size: int) -> JobSpec:
    return JobSpec.model_validate(
        {
            "source": {"format": "webdataset", "path": "unused"},
            "ask": [{"from": "questions"}],
            "generate": {"max_new_tokens": MAX_NEW_TOKENS},
            "resources": {"generate": {"batch_size": batch_size}},
            "output": {"path": "unused"},
        }
    )


def engine_answers(images: Sequence[LabelledImage], *, batch_size: int) -> list[str]:
    """The answers of all questions, in order, through the prepare and generate stages."""
    job = job_of(batch_size)
    encode, generate = Encode(job, {}), Generate(job, {}, run_id="exactness", threads=None)
    answers: list[str] = []
    for start in range(0, len(images), IMAGES_PER_CALL):
        answered = generate(encode(_samples(images[start : start + IMAGES_PER_CALL])))
        answers += [str(answer) for answer in answered["answer"].to_pylist()]
    return answers


def _samples(images: Sequence[LabelledImage]) -> pa.Table:
    return table_of(
        (
            {
                "source_uri": "easy-vqa",
                "source_index": image.image_id,
                "sample_id": str(image.image_id),
                "units": ["questions"],
                "image": image.path.read_bytes(),
                "questions": [
                    {"id": f"q{n}", "question": question}
                    for n, (question, _) in enumerate(image.questions)
                ],
            }
            for image in images
        ),
        SAMPLE,
    )


@torch.inference_mode()
def generate_answers(images: Sequence[LabelledImage]) -> Iterator[str]:
    """transformers' `generate` on each prompt alone, without padding."""
    processor = LlavaProcessor.from_pretrained(CHECKPOINT, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    for image in images:
        with Image.open(image.path) as opened:
            picture = opened.convert("RGB")
        for question, _ in image.questions:
            prompt = f"USER: <image>\n{question} ASSISTANT:"
            inputs = processor(text=prompt, images=picture, return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            new = ids[0, inputs["input_ids"].shape[1] :]
            yield processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def compare(images: Sequence[LabelledImage]) -> dict[str, Any]:
    ones = engine_answers(images, batch_size=1)
    sixteens = engine_answers(images, batch_size=16)
    single = list(generate_answers(images))
    differences = [
        {"prompt": n, "batch_1": a, "batch_16": b, "generate": c}
        for n, (a, b, c) in enumerate(zip(ones, sixteens, single, strict=True))
        if not a == b == c
    ]
    return {
        "benchmark": "engine in batches of 1 and 16 against transformers generate, float32",
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
