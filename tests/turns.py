"""Questions that follow from answers, and what `generate` says to them from their start."""

import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import MistralConfig, Qwen2Config

from pipeline.engine.kv import shape_of
from pipeline.engine.pixels import pixel_table
from pipeline.engine.request import Answer, Branch, Engine, Outcome, Request, Score
from pipeline.engine.slots import SlotsEngine
from tests.engine_cases import EOS, Case, Expected, check, continued, engine_for, request_of
from tests.models import SPECIAL, noise_image, tiny_model, tiny_processor

IMAGE, END = SPECIAL.index("<image>"), SPECIAL.index("</s>")
"""An end stands between an answer and the next question."""
WORDS, BROKEN = range(100, 240), 250
"""Of questions; and what no question has, nor an answer."""
SHAPES: dict[str, dict[str, Any]] = {
    "Llama": {"seed": 0},
    "Qwen2": {"seed": 0, "kind": Qwen2Config, "num_hidden_layers": 3, "num_key_value_heads": 4},
    "Mistral, a window": {
        "seed": 2,
        "kind": MistralConfig,
        "sliding_window": 24,
        "head_dim": 24,
    },
}


@dataclass(frozen=True)
class Question:
    """A question, and those that follow from its answer: in the same conversation, or with the
    answer quoted. `scored`: so many tokens at its end are a given answer."""

    words: Sequence[int]
    longest: int = 5
    follow: Sequence["Question"] = ()
    is_quoting: bool = False
    scored: int = 0

    @property
    def tokens(self) -> int:
        return len(self.words) + self.longest

    @property
    def later_tokens(self) -> int:
        """Of the longest conversation that goes on from here."""
        ahead = (1 + each.tokens + each.later_tokens for each in self.follow if not each.is_quoting)
        return max(ahead, default=0)

    def branch(self, ids: Sequence[int], continues: int | None, guess: Callable[[int], int]) -> Any:
        return Branch(
            ids,
            1 if self.scored else self.longest,
            scored=self.scored,
            continues=continues,
            later_tokens=guess(self.later_tokens),
        )


def right(tokens: int) -> int:
    return tokens


class Asking:
    """Questions about one image. `branches` and `outcomes`: what the engine is told, and tells.

    `guess`: from how many tokens follow, how many the engine is told; `heard`: from what was said,
    what goes into the next prompt.
    """

    def __init__(
        self,
        request: Request,
        questions: Sequence[Question],
        *,
        guess: Callable[[int], int] = right,
        heard: Callable[[Sequence[int]], Sequence[int]] = tuple,
    ) -> None:
        self.prefix, self._guess, self._heard = request.prefix, guess, heard
        self.questions = list(questions)
        self.branches = [each.branch(tuple(each.words), None, guess) for each in questions]
        self.outcomes: dict[int, Outcome] = {}

    @property
    def request(self) -> Request:
        return Request(self.prefix, list(self.branches), self.grow)

    def grow(self, number: int, outcome: Outcome) -> Sequence[Branch]:
        assert number not in self.outcomes
        self.outcomes[number] = outcome
        said = self._heard(outcome.token_ids) if isinstance(outcome, Answer) else ()
        grown = [self._next(number, each, said) for each in self.questions[number].follow]
        self.questions += self.questions[number].follow
        self.branches += grown
        return grown

    @property
    def tokens_read(self) -> int:
        """Each token of a conversation once, but the last that is said, which nobody looks at."""
        return len(self.prefix.token_ids) + sum(map(self._read, range(len(self.branches))))

    def _read(self, number: int) -> int:
        branch, outcome = self.branches[number], self.outcomes[number]
        said = outcome.output_tokens - 1 if isinstance(outcome, Answer) else 0
        return len(branch.token_ids) - self._kept(branch) + said

    def _kept(self, branch: Branch) -> int:
        if branch.continues is None:
            return 0
        parent, outcome = self.branches[branch.continues], self.outcomes[branch.continues]
        assert isinstance(outcome, Answer)
        kept = (*parent.token_ids, *outcome.token_ids)
        kept = kept[: len(parent.token_ids) + outcome.output_tokens - 1]
        pairs = list(zip(kept, branch.token_ids[: -1 - branch.scored], strict=False))
        return next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))

    def _next(self, number: int, question: Question, said: Sequence[int]) -> Branch:
        if question.is_quoting:
            return question.branch((*said, *question.words), None, self._guess)
        ids = (*self.branches[number].token_ids, *said, END, *question.words)
        return question.branch(ids, number, self._guess)


def model_of(shape: dict[str, Any]) -> Any:
    """It never says an image token: no text that is asked next would have one. Nor BROKEN."""
    model = tiny_model(**shape)
    bias = torch.zeros(model.lm_head.out_features)
    bias[[IMAGE, BROKEN]] = -1e4
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


class Known:
    """A model, images, and what `generate` says."""

    def __init__(self, shape: dict[str, Any]) -> None:
        self.model, self.processor = model_of(shape), tiny_processor()
        prompt = "USER: <image>\nyes"
        self.images = [
            request_of(self.processor, Case(noise_image(n), prompt, 1)) for n in range(4)
        ]
        self._pixels = {
            each.prefix.images[0].sha256: self.processor(
                text=prompt, images=noise_image(n), return_tensors="pt"
            )["pixel_values"]
            for n, each in enumerate(self.images)
        }
        self.alone = functools.cache(self._alone)

    def engine(self, kind: str = "slots", *, room: float = 16, **options: Any) -> Any:
        """With a budget for about so many prompts."""
        if kind == "plain":
            return engine_for(kind, self.model, self.processor, room=int(room), eos=EOS)
        model = copy.deepcopy(self.model)
        if (broken := options.pop("broken", None)) is not None:
            with torch.no_grad():
                model.get_input_embeddings().weight[broken] = float("nan")
        text = model.config.get_text_config()
        shape = shape_of(text, dtype=model.dtype, device=model.device)
        table, budget = pixel_table(self.processor), int(room * 96 * shape.token_bytes)
        return SlotsEngine(model, eos_token_ids=EOS, table=table, kv_budget_bytes=budget, **options)

    def _alone(self, sha256: str, ids: tuple[int, ...], longest: int, scored: int) -> Any:
        inputs = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "pixel_values": self._pixels[sha256],
        }
        if not scored:
            return continued(self.model, self.processor, inputs, longest=longest)
        with torch.inference_mode():
            found = self.model(**inputs).logits[0, -1 - scored :].log_softmax(-1)
        given = sum(found[n, token].item() for n, token in enumerate(ids[-scored:]))
        return given + found[-1, list(EOS)].exp().sum().log().item()

    def check(self, asking: Asking, outcomes: Sequence[Outcome]) -> None:
        """Every outcome is the one from scratch, and the request was told of each."""
        assert list(outcomes) == [asking.outcomes[n] for n in range(len(asking.branches))]
        for number, outcome in enumerate(outcomes):
            self.check_one(asking, number, outcome)

    def check_one(self, asking: Asking, number: int, outcome: Outcome) -> None:
        branch, prefix = asking.branches[number], asking.prefix
        ids = (*prefix.token_ids, *branch.token_ids)
        sha256, longest = prefix.images[0].sha256, branch.max_new_tokens
        expected = self.alone(sha256, ids, longest, branch.scored)
        if isinstance(expected, Expected):
            check(outcome, expected)
            assert outcome.prompt_tokens == len(ids)
        else:
            assert isinstance(outcome, Score)
            assert outcome.logprob == pytest.approx(expected, abs=1e-4)

    def check_all(self, engine: Engine, askings: Sequence[Asking]) -> None:
        outcomes = engine.submit([each.request for each in askings])
        for asking, found in zip(askings, outcomes, strict=True):
            self.check(asking, found)


@functools.cache
def known_of(shape: str) -> Known:
    return Known(SHAPES[shape])


def words(rng: random.Random, most: int = 20) -> tuple[int, ...]:
    return tuple(rng.choices(WORDS, k=rng.randint(1, most)))


def talk(rng: random.Random, turns: int) -> Question:
    """A conversation of so many turns."""
    follow = [talk(rng, turns - 1)] if turns > 1 else []
    return Question(words(rng), rng.randint(1, 9), follow)


def tree(rng: random.Random, depth: int) -> Question:
    """Whatever may follow from an answer."""
    follow = [tree(rng, depth - 1) for _ in range(rng.choice([0, 1, 1, 2]))] if depth > 1 else []
    longest, is_quoting = rng.randint(1, 9), rng.random() < 0.3
    found = Question(words(rng), longest, follow, is_quoting)
    if not follow and rng.random() < 0.3:
        return Question((*found.words, *words(rng, 3)), 1, (), is_quoting, scored=1)
    return found


def mixed(known: Known, rng: random.Random, **options: Any) -> Iterator[Asking]:
    """Images with conversations, images with lone questions, and both."""
    counts = [[4], [1], [2, 1, 1, 3], [1, 1, 1], [3, 3], [1], [2], [4, 1]]
    for turns, image in zip(rng.sample(counts, len(counts)), itertools.cycle(known.images)):
        yield Asking(image, [talk(rng, count) for count in turns], **options)
