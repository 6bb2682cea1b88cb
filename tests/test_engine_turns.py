"""Questions that follow from answers, against `generate` on each conversation from its start."""

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import MistralConfig, Qwen2Config

from pipeline.engine.request import Answer, Branch, Engine, Outcome, Request, Score
from tests.engine_cases import EOS, Case, Expected, check, continued, engine_for, request_of
from tests.models import SPECIAL, noise_image, tiny_model, tiny_processor

IMAGE, END = SPECIAL.index("<image>"), SPECIAL.index("</s>")
"""An end stands between an answer and the next question."""
WORDS = range(60, 240)
"""Of questions; 250 is left for faults."""
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

    def _next(self, number: int, question: Question, said: Sequence[int]) -> Branch:
        if question.is_quoting:
            return question.branch((*said, *question.words), None, self._guess)
        ids = (*self.branches[number].token_ids, *said, END, *question.words)
        return question.branch(ids, number, self._guess)


def model_of(shape: dict[str, Any]) -> Any:
    """It never says an image token: no text that is asked next would have one."""
    model = tiny_model(**shape)
    bias = torch.zeros(model.lm_head.out_features)
    bias[IMAGE] = -1e4
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

    def engine(self, kind: str, *, room: int = 16) -> Any:
        return engine_for(kind, self.model, self.processor, room=room)

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


@pytest.fixture(scope="module", params=SHAPES)
def known(request: pytest.FixtureRequest) -> Known:
    return known_of(request.param)


@pytest.fixture(scope="module")
def llama() -> Known:
    return known_of("Llama")


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


KINDS = ["plain"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [3, 40])
def test_every_turn_equals_generate_on_the_whole_conversation(
    known: Known, kind: str, room: int
) -> None:
    askings = [*mixed(known, random.Random(room)), *mixed(known, random.Random(0))]
    random.Random(room).shuffle(askings)
    known.check_all(known.engine(kind, room=room), askings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [3, 12])
def test_whatever_follows_from_an_answer_equals_generate(
    known: Known, kind: str, room: int
) -> None:
    rng = random.Random(room)
    askings = [
        Asking(image, [tree(rng, 3) for _ in range(rng.randint(1, 3))])
        for image in (*known.images, *known.images)
    ]
    known.check_all(known.engine(kind, room=room), askings)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_request_raises_when_it_is_to_grow_reaches_who_asked(
    llama: Known, kind: str
) -> None:
    def grow(number: int, outcome: Outcome) -> Sequence[Branch]:
        raise KeyError("no such turn")

    asking = Asking(llama.images[0], [talk(random.Random(0), 2)])
    engine = llama.engine(kind)
    with pytest.raises(KeyError, match="no such turn"):
        engine.submit([Request(asking.prefix, asking.branches, grow)])
    llama.check_all(engine, [asking])
