"""Validates the model in training on held-out images of easy-VQA's training split."""

from __future__ import annotations

from collections import Counter

import torch

from tools.easy_vqa_data import LabelledImage
from tools.embedded_learner import COLOUR_NAMES, Learner
from tools.questions import KINDS, kind_of
from tools.shapes import SHAPES
from tools.training_batches import VALIDATION_BATCH, VALIDATION_REQUEST, Asker, untouched


@torch.no_grad()
def validate(learner: Learner, asker: Asker, images: list[LabelledImage]) -> dict[str, float]:
    """The share of answers right in every token, by kind of question."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for number, (examples, batch) in enumerate(asker.whole(images)):
        start = number * VALIDATION_BATCH
        logits, due = learner.read(learner.see(examples), batch)
        wrong = logits.argmax(-1) != due
        rows, columns = batch.learned[:, 1:].nonzero(as_tuple=True)
        missed = {
            (int(row), int(branch))
            for row, branch in zip(
                rows[wrong], batch.branches[rows, columns + 1][wrong], strict=True
            )
        }
        for row, image in enumerate(images[start : start + len(examples)]):
            questions = [question for question, _ in image.questions]
            for branch, question in enumerate([*questions, VALIDATION_REQUEST], start=1):
                kind = kind_of(question)
                asked[kind] += 1
                right[kind] += (row, branch) not in missed
    shares = {kind: right[kind] / asked[kind] for kind in KINDS}
    answers = sum(asked.values()) - asked["caption"]
    return {**shares, "questions": (sum(right.values()) - right["caption"]) / answers}


@torch.no_grad()
def sight_accuracy(learner: Learner, images: list[LabelledImage]) -> float:
    """The share of images whose touched patches tell, together, the right shape and colour."""
    examples = [untouched(image) for image in images]
    right = 0
    for example, features in zip(examples, learner.see(examples), strict=True):
        seen = features[torch.from_numpy(example.patches)]
        shape = SHAPES[int(learner.shape_head(seen).softmax(-1).sum(0).argmax())]
        colour = COLOUR_NAMES[int(learner.colour_head(seen).softmax(-1).sum(0).argmax())]
        right += (shape, colour) == (example.shape, example.colour)
    return right / len(examples)
