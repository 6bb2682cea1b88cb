"""Measures an embedded checkpoint on easy-VQA, with transformers' own `generate`.

    python -m tools.measure_embedded pipeline/embedded/checkpoint --split test

Every question of the split is asked alone, in left-padded batches, in float32, from the files as
saved; then every image is captioned. A caption is right when the colour and the shape that it names
contradict none of easy-VQA's answers about that image. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.easy_vqa_data import LabelledImage, load_split, load_training
from tools.questions import CAPTION_REQUESTS, caption, kind_of
from tools.shapes import SIDE_PX, jpeg

BATCH = 64
SIZES_PX = {12: "up to 12 px", 16: "13 to 16 px", 24: "17 to 24 px", SIDE_PX: "over 24 px"}
DISTURBANCES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    "jpeg-80": lambda image: jpeg(image, quality=80),
    "nearest-256": lambda image: image.resize((256, 256), Image.Resampling.NEAREST),
    "bicubic-256": lambda image: image.resize((256, 256), Image.Resampling.BICUBIC),
    "bicubic-256-jpeg-80": lambda image: jpeg(
        image.resize((256, 256), Image.Resampling.BICUBIC), quality=80
    ),
}


class Answerer:
    """A checkpoint, asked in batches."""

    def __init__(self, folder: Path) -> None:
        self.processor = LlavaProcessor.from_pretrained(folder, backend="pil")
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()

    def answer(self, images: list[Image.Image], questions: list[str]) -> list[str]:
        """One answer to each question about each image."""
        prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
        inputs = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        output = self.model.generate(**inputs)
        fresh = output[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.batch_decode(fresh, skip_special_tokens=True)
        return [answer.strip() for answer in answers]


def size_class(image: Image.Image) -> str:
    """The class of the shape's longer side, of a 64-pixel image."""
    pixels = np.asarray(image).astype(int)
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    background = np.median(corners, axis=0)
    rows, columns = (np.abs(pixels - background).sum(-1) > 60).nonzero()
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    return next(name for limit, name in SIZES_PX.items() if side <= limit)


def measure(
    answerer: Answerer,
    labelled: list[LabelledImage],
    disturb: Callable[[Image.Image], Image.Image],
    requests: tuple[str, ...],
) -> dict[str, object]:
    """Counts of right and asked, by kind of question and by size of shape."""
    originals = {i.image_id: Image.open(i.path).convert("RGB") for i in labelled}
    images = {image_id: disturb(image) for image_id, image in originals.items()}
    tasks: list[tuple[LabelledImage, str, set[str]]] = []
    for image in labelled:
        tasks += [(image, question, {answer}) for question, answer in image.questions]
        captions = {caption(colour, shape) for colour in image.colours for shape in image.shapes}
        tasks += [(image, request, captions) for request in requests]
    tasks.sort(key=lambda task: len(task[1]))
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    wrong: list[list[object]] = []
    for start in range(0, len(tasks), BATCH):
        part = tasks[start : start + BATCH]
        answers = answerer.answer(
            [images[image.image_id] for image, _, _ in part], [question for _, question, _ in part]
        )
        for (image, question, accepted), given in zip(part, answers, strict=True):
            kind = kind_of(question)
            size = size_class(originals[image.image_id])
            whole = "caption" if kind == "caption" else "questions"
            for name in dict.fromkeys((whole, kind, f"{whole}, shape {size}")):
                counts[name][0] += given in accepted
                counts[name][1] += 1
            if given not in accepted:
                wrong.append([image.image_id, question, sorted(accepted), given])
    return {
        "shares": {name: round(right / of, 5) for name, (right, of) in sorted(counts.items())},
        "counts": dict(sorted(counts.items())),
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--split", choices=("validation", "test"), required=True)
    parser.add_argument("--disturb", choices=tuple(DISTURBANCES), default="none")
    parser.add_argument("--every-caption-request", action="store_true")
    parser.add_argument("--show-wrong", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    labelled = load_split("test") if options.split == "test" else load_training()[1]
    requests = CAPTION_REQUESTS if options.every_caption_request else ("Describe the image.",)
    figures = measure(
        Answerer(options.checkpoint), labelled, DISTURBANCES[options.disturb], requests
    )
    figures["wrong"] = figures["wrong"][: options.show_wrong]
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
