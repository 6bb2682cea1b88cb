"""An answer in the making: the tokens so far, and what ends it."""

import functools
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.engine.noise import Noise
from pipeline.engine.request import GREEDY, Answer, Branch, Decoding
from pipeline.engine.stops import StopStrings
from schemas.errors import IncompleteJson, NonFiniteLogits

if TYPE_CHECKING:
    from llguidance import LLMatcher

Ended = Answer | IncompleteJson | NonFiniteLogits


class Said:
    """`prefix`: token ids in front of the branch. `count`: tokens that the model has given, the end
    token included. `is_greedy`: whether the likeliest token is always the next one.
    """

    def __init__(self, prefix: Sequence[int], branch: Branch) -> None:
        self._prefix, self._branch = prefix, branch
        self.is_greedy = branch.decoding == GREEDY
        self.tokens: list[int] = []
        self.count = 0
        self._logprob = 0.0

    @property
    def decoding(self) -> Decoding:
        return self._branch.decoding

    @property
    def is_early(self) -> bool:
        """Whether it may not end yet."""
        if self.decoding.grammar is not None and not self.matcher.is_accepting():
            return True
        return self.count < self.decoding.min_new_tokens

    @property
    def prompt_tokens(self) -> int:
        return len(self._prefix) + len(self._branch.token_ids)

    @functools.cached_property
    def _noise(self) -> Noise:
        return Noise(self._branch.noise_key)

    @property
    def uniform(self) -> float:
        """Of the next token, however often it is asked for."""
        return self._noise[self.count]

    @functools.cached_property
    def _in_prompt(self) -> np.ndarray:
        return np.unique([*self._prefix, *self._branch.token_ids])

    @property
    def known(self) -> np.ndarray:
        """Every token of prompt and answer, some of them more than once."""
        return np.concatenate([self._in_prompt, np.array(self.tokens, dtype=np.int64)])

    @functools.cached_property
    def matcher(self) -> "LLMatcher":
        """Of an answer that has a grammar."""
        assert self.decoding.grammar is not None
        return self.decoding.grammar.matcher()

    def latest(self, count: int) -> list[int]:
        """The last tokens of prompt and answer, or all there are."""
        if len(self.tokens) >= count:
            return self.tokens[-count:]
        return [*self._prefix, *self._branch.token_ids, *self.tokens][-count:]

    def add(self, token: int, logprob: float, *, is_end: bool) -> NonFiniteLogits | None:
        """One more token. A log-probability that is no number is how broken logits show."""
        if not math.isfinite(logprob):
            return not_finite(after=self.count)
        self._logprob += logprob
        self.count += 1
        if not is_end:
            self.tokens.append(token)
            if self.decoding.grammar is not None:
                self.matcher.consume_token(token)
        return None

    def answer(self, *, is_over: bool) -> Answer | IncompleteJson | None:
        """The answer, if it is over or as long as it may be."""
        if self.decoding.grammar is not None:
            is_over = is_over or self.matcher.is_stopped()
        if not is_over and self.count < self._branch.max_new_tokens:
            return None
        if self.decoding.grammar is not None and not self.matcher.is_accepting():
            return IncompleteJson(
                f"the answer was not complete after {self.count} tokens: raise max_new_tokens, or "
                "bound the schema's texts and lists (maxLength, maxItems)"
            )
        return Answer(
            token_ids=tuple(self.tokens),
            finish_reason="stop" if is_over else "length",
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.count,
            mean_logprob=self._logprob / self.count,
        )


def take(
    saids: Sequence[Said], chosen: Sequence[Sequence[float]], *, eos: Collection[int]
) -> list[Ended | None]:
    """One more (token, log-probability) for each; gives the outcome with the last one."""
    outcomes: list[Ended | None] = []
    stoppable: list[int] = []
    for number, (said, (token, logprob)) in enumerate(zip(saids, chosen, strict=True)):
        is_end = int(token) in eos
        outcomes.append(said.add(int(token), logprob, is_end=is_end))
        if outcomes[number] is None:
            if said.decoding.stop and not is_end:
                stoppable.append(number)
            else:
                outcomes[number] = said.answer(is_over=is_end)
    stopped = _stopped([saids[number] for number in stoppable])
    for number, is_over in zip(stoppable, stopped, strict=True):
        outcomes[number] = saids[number].answer(is_over=is_over)
    return outcomes


def _stopped(saids: Sequence[Said]) -> list[bool]:
    """Whether the latest token of each completes one of its stop strings."""
    alike: dict[tuple[StopStrings, int], list[int]] = defaultdict(list)
    latest = []
    for number, said in enumerate(saids):
        assert said.decoding.stop is not None
        latest.append(said.latest(said.decoding.stop.most_tokens))
        alike[said.decoding.stop, len(latest[-1])].append(number)
    found = [False] * len(saids)
    for (stop, _), numbers in alike.items():
        are_done = stop.ended([latest[number] for number in numbers])
        for number, is_done in zip(numbers, are_done, strict=True):
            found[number] = is_done
    return found


def not_finite(*, after: int) -> NonFiniteLogits:
    return NonFiniteLogits(
        f"the model's logits were NaN or infinite after {after} tokens of the answer: "
        "try model.dtype float32 or bfloat16"
    )
