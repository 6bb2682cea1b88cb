"""Whether choosing an answer is as good as giving one, on easy-VQA's test split.

    python -m benchmarks.choices [--images N]

Asks the embedded model each question twice, through the steps of a job without Ray: freely, and
with easy-VQA's 13 answers as `choices`. Prints one JSON object with the share of right answers of
both; its exit status is 1 where choosing is the worse.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from pipeline.encode import Encode
from pipeline.generate import Generate
from schemas.job import JobSpec
from schemas.tables import SAMPLE, table_of
from tools.easy_vqa_data import LabelledImage, load_split

IMAGES_AT_ONCE = 16


def answers() -> list[str]:
    """The 13 that there are, of the training split."""
    return sorted({answer for image in load_split("train") for _, answer in image.questions})


def asked(images: Sequence[LabelledImage], ask: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of the answer table, image by image."""
    job = JobSpec.model_validate(
        {
            "source": {"format": "images", "path": "easy-vqa"},
            "ask": [{"from": "questions", **ask}],
            "output": {"path": "nowhere"},
            "model": {"device": "cpu", "dtype": "float32"},
        }
    )
    encode, generate = Encode(job, {}), Generate(job, {}, run_id="benchmark")
    for start in range(0, len(images), IMAGES_AT_ONCE):
        rows = [row_of(image) for image in images[start : start + IMAGES_AT_ONCE]]
        yield from generate(encode(table_of(rows, SAMPLE))).to_pylist()


def row_of(image: LabelledImage) -> dict[str, Any]:
    questions = [{"id": f"q{n}", "question": text} for n, (text, _) in enumerate(image.questions)]
    line = {"source_index": 0, "units": ["questions"], "questions": questions}
    content = image.path.read_bytes()
    return {
        "source_uri": str(image.image_id),
        "shard_identity": hashlib.sha256(content).hexdigest(),
        "image": content,
        "lines": [line],
    }


def compare(images: Sequence[LabelledImage]) -> dict[str, Any]:
    wanted = [answer for image in images for _, answer in image.questions]
    free = [row["answer"] for row in asked(images, {})]
    chosen = list(asked(images, {"choices": answers()}))
    probs = [[each["prob"] for each in row["choice_probs"]] for row in chosen]
    return {
        "benchmark": "embedded model, easy-VQA test: free answers and its answers as choices",
        "questions": len(wanted),
        "choices": len(answers()),
        "right": {
            "free": share(free, wanted),
            "chosen": share([row["answer"] for row in chosen], wanted),
        },
        "largest_distance_of_a_sum_from_1": max(abs(sum(each) - 1) for each in probs),
        "versions": {name: version(name) for name in ("easy-vqa", "torch", "transformers")},
    }


def share(found: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=None, help="only the first N images")
    figures = compare(load_split("test")[: parser.parse_args().images])
    print(json.dumps(figures, indent=2))
    raise SystemExit(1 if figures["right"]["chosen"] < figures["right"]["free"] else 0)


if __name__ == "__main__":
    main()
