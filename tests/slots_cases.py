"""Tiny models for the slots engine, and what `generate` says to each of them alone, unpadded."""

import copy
import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

from transformers import MistralConfig, Qwen2Config

from pipeline.engine.kv import shape_of
from pipeline.engine.pixels import pixel_table
from pipeline.engine.request import Request
from pipeline.engine.slots import SlotsEngine
from tests.engine_cases import EOS, alone, cases_of, check, request_of
from tests.models import tiny_model, tiny_processor

IMAGES, QUESTIONS = 4, 12
SHAPES: dict[str, dict[str, Any]] = {
    "Llama": {"seed": 0},
    "Llama, other heads": {
        "seed": 2,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
    },
    "Qwen2": {
        "seed": 0,
        "kind": Qwen2Config,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
    },
    "Mistral, a window": {
        "seed": 2,
        "kind": MistralConfig,
        "sliding_window": 24,
        "head_dim": 24,
    },
}


class Known:
    """A model, and what it says to each case alone."""

    def __init__(self, shape: str) -> None:
        self.shape, self.processor = SHAPES[shape], tiny_processor()
        self.model = tiny_model(**self.shape)
        self.cases = cases_of(IMAGES, QUESTIONS)
        self.expected = [alone(self.model, self.processor, case) for case in self.cases]

    def engine(self, *, slots: float = 32.0, model: Any = None, **options: Any) -> SlotsEngine:
        """With a budget for about so many prompts."""
        model = copy.deepcopy(self.model) if model is None else model
        shape = shape_of(model.config.get_text_config(), dtype=model.dtype, device=model.device)
        return SlotsEngine(
            model,
            eos_token_ids=EOS,
            table=pixel_table(self.processor),
            kv_budget_bytes=int(slots * 96 * shape.token_bytes),
            **options,
        )

    def requests(self, groups: Sequence[Sequence[int]]) -> list[Request]:
        return [request_of(self.processor, *(self.cases[i] for i in group)) for group in groups]

    def check(self, engine: SlotsEngine, groups: Sequence[Sequence[int]]) -> None:
        outcomes = engine.submit(self.requests(groups))
        for group, answers in zip(groups, outcomes, strict=True):
            for i, answer in zip(group, answers, strict=True):
                check(answer, self.expected[i])


@functools.cache
def known_of(shape: str) -> Known:
    return Known(shape)


def groups_of(counts: Sequence[int], rng: random.Random) -> list[list[int]]:
    """So many questions about an image each; which ones, and in which order, is drawn."""
    return [
        [image + IMAGES * n for n in rng.sample(range(QUESTIONS), count)]
        for image, count in zip(itertools.cycle(range(IMAGES)), counts)
    ]
