"""What a question asks of the engine, and what the engine's outcomes say in the answer table.

One `Asking` for each entry of the spec's `ask`. A question is one branch for each of its samples,
or one for each of its choices.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.engine.grammar import JsonGrammar
from pipeline.engine.noise import noise_key
from pipeline.engine.request import GREEDY, Answer, Branch, Decoding, Outcome, Score
from pipeline.engine.stops import StopStrings
from schemas.ask import Ask
from schemas.errors import RowError
from schemas.job import JobSpec
from schemas.tables import error_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = Mapping[str, Any]
"""A PROMPT struct."""
Columns = dict[str, Any]


@dataclass(frozen=True)
class Vocabulary:
    """What the model's tokens are. `size`: of its logits."""

    tokenizer: "PreTrainedTokenizerBase"
    size: int
    eos: Sequence[int]


class Asking:
    """How one entry of `ask` is asked. Raises SpecError for stop strings that cannot be written,
    and schemas that cannot be kept to."""

    def __init__(self, job: JobSpec, ask: Ask, words: Vocabulary) -> None:
        tokenizer = self._tokenizer = words.tokenizer
        self._choices, self._length_normalise = ask.choices, ask.length_normalise
        self._samples = job.samples(ask)
        self._seed = job.generate.seed
        wanted = job.decoding(ask)
        self._decoding = Decoding(
            temperature=wanted.temperature,
            top_p=wanted.top_p if wanted.temperature else GREEDY.top_p,
            top_k=wanted.top_k if wanted.temperature else GREEDY.top_k,
            repetition_penalty=wanted.repetition_penalty,
            min_new_tokens=wanted.min_new_tokens,
            stop=StopStrings(wanted.stop, tokenizer) if wanted.stop else None,
            grammar=_grammar(ask, words),
        )

    @property
    def samples(self) -> range:
        """The numbers of the answers that each question has."""
        return range(self._samples)

    def branches(
        self, prompt: Prompt, place: Sequence[object], *, start: int, samples: Iterable[int]
    ) -> list[Branch]:
        """The prompt's tokens from `start` on. `place`: shard and row, which decide the noise."""
        if prompt["choices"] is not None:
            shared = prompt["token_ids"][start : prompt["choices"]["shared_tokens"]]
            given = prompt["choices"]["token_ids"]
            return [Branch((*shared, *ids), 1, scored=len(ids)) for ids in given]
        ids, longest = tuple(prompt["token_ids"][start:]), prompt["max_new_tokens"]
        identity = [self._seed, *place, prompt["question_id"], prompt["turn"]]
        is_drawn = bool(self._decoding.temperature)
        keys = [noise_key([*identity, number]) if is_drawn else 0 for number in samples]
        return [Branch(ids, longest, self._decoding, noise_key=key) for key in keys]

    def answers(self, prompt: Prompt, outcomes: Sequence[Outcome]) -> Iterator[Columns]:
        """The columns of each answer."""
        if prompt["choices"] is not None:
            yield self._chosen(outcomes)
        else:
            yield from map(self._said, outcomes)

    def _said(self, outcome: Outcome) -> Columns:
        if not isinstance(outcome, Answer):
            return _failed(outcome)
        ids = list(outcome.token_ids)
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        stop = self._decoding.stop
        return {
            "answer": (text if stop is None else stop.cut(text)).strip(),
            "status": "ok",
            "finish_reason": outcome.finish_reason,
            "output_tokens": outcome.output_tokens,
            "mean_logprob": outcome.mean_logprob,
        }

    def _chosen(self, outcomes: Sequence[Outcome]) -> Columns:
        scores = [outcome for outcome in outcomes if isinstance(outcome, Score)]
        for outcome in outcomes:
            if not isinstance(outcome, Score):
                return _failed(outcome)
        assert self._choices is not None
        probs = probabilities(scores, length_normalise=self._length_normalise)
        best = max(range(len(probs)), key=probs.__getitem__)
        return {
            "answer": self._choices[best],
            "status": "ok",
            "finish_reason": "choice",
            "output_tokens": scores[best].output_tokens,
            "mean_logprob": scores[best].logprob / scores[best].output_tokens,
            "choice_probs": [
                {"choice": choice, "prob": prob}
                for choice, prob in zip(self._choices, probs, strict=True)
            ],
        }


def _grammar(ask: Ask, words: Vocabulary) -> JsonGrammar | None:
    if ask.json_schema is None:
        return None
    return JsonGrammar(ask.json_schema, words.tokenizer, vocabulary=words.size, eos=words.eos)


def probabilities(scores: Iterable[Score], *, length_normalise: bool) -> list[float]:
    """Of given answers, as if there were no others."""
    logs = [s.logprob / s.output_tokens if length_normalise else s.logprob for s in scores]
    weights = [math.exp(each - max(logs)) for each in logs]
    return [weight / sum(weights) for weight in weights]


def unasked(prompt: Prompt) -> Columns:
    """Of an answer that the model is not asked for."""
    return _error_columns(prompt["status"], prompt["error"])


def _failed(outcome: Outcome) -> Columns:
    assert isinstance(outcome, RowError)
    return _error_columns("failed", error_of(outcome))


def _error_columns(status: str, error: Mapping[str, str] | None) -> Columns:
    said = error or {}
    return {
        "status": status,
        "error_stage": said.get("stage"),
        "error_class": said.get("class"),
        "error_message": said.get("message"),
    }
