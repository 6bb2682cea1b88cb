"""The seam between the generate stage and an engine.

A request is what many questions on one image share (the prefix, which holds the image) and a tree
of branches (what each asks). An engine returns one answer for each branch, in order; it may run
them in any way that does not change them. What is asked next may depend on an answer: a request
that grows is told each outcome, and says what follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from pipeline.engine.grammar import JsonGrammar
from pipeline.engine.stops import StopStrings
from schemas.errors import GenerateError, PromptError


@dataclass(frozen=True)
class ImagePixels:
    """One image as the processor resized it: uint8 [H, W, 3], not yet normalised, or cut into
    tiles: [tiles, H, W, 3]. `sha256`: a name that no other pixels have. `size`: width and height of
    the whole image, by which tiles are put together; null where there are none."""

    pixels: np.ndarray
    sha256: str
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Decoding:
    """How the tokens of an answer are chosen, as transformers' `generate` means it.

    With `temperature` 0 the likeliest, else one that is drawn. `min_new_tokens`: before so many
    there is no end token. `stop`: what else ends an answer. `grammar`: what it has to be.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop: StopStrings | None = None
    grammar: JsonGrammar | None = None


GREEDY = Decoding()


@dataclass(frozen=True)
class Branch:
    """Tokens that continue the prefix and end where the model is to answer: one at least that is
    not scored. Raises ValueError.

    `noise_key`: 128 bits that decide what is drawn. `scored`: so many of the last tokens are an
    answer that is given, to be scored (Score) instead of asked for; `max_new_tokens` is 1 then.

    `continues`: the number of a branch of the request whose prompt and answer this one goes on
    from: what of its `token_ids`, which are all of them, begins alike need not be computed again.
    `later_tokens`: about so many will follow in branches that continue this one; a wrong guess
    costs time only.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    decoding: Decoding = GREEDY
    noise_key: int = 0
    scored: int = 0
    continues: int | None = None
    later_tokens: int = 0

    def __post_init__(self) -> None:
        if len(self.token_ids) <= self.scored:
            raise ValueError("a branch needs a token of its own before the answer")


@dataclass(frozen=True)
class Prefix:
    """Token ids up to the last image token at least, and the images that they stand for."""

    token_ids: Sequence[int]
    images: Sequence[ImagePixels] = ()


@dataclass(frozen=True)
class Request:
    """`grow`: called once with the number and the outcome of each branch, by one thread at a time;
    gives the branches that follow. They are numbered behind all there are, and grow in turn.

    It holds up the engine, must not ask it anything, and what it raises is raised by `submit`.
    """

    prefix: Prefix
    branches: Sequence[Branch]
    grow: "Grow | None" = None


@dataclass(frozen=True)
class Answer:
    """What the model said on one branch. `token_ids` is without the end token.

    `mean_logprob`: mean log-probability (nats, temperature 1) of the generated tokens, the end
    token included. `finish_reason`: `stop` at an end token or a stop string, whose tokens are among
    `token_ids`; `length` at the token limit.
    """

    token_ids: Sequence[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    output_tokens: int
    mean_logprob: float


@dataclass(frozen=True)
class Score:
    """What the model thinks of a given answer. `logprob`: the sum over its tokens and an end token,
    `output_tokens` together; where the model knows no end token, over its tokens.
    """

    logprob: float
    prompt_tokens: int
    output_tokens: int


Outcome = Answer | Score | GenerateError | PromptError
Grow = Callable[[int, Outcome], Sequence[Branch]]


class Engine(Protocol):
    """Answers requests. Safe to call from several threads at once."""

    def submit(self, requests: Sequence[Request]) -> Sequence[Sequence[Outcome]]:
        """One outcome for each branch of each request, in the order of their numbers; blocks until
        all are in. Raises what `grow` of one of these requests raises."""
