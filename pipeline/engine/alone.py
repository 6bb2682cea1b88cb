"""The slow path: each prompt alone, through the model's own `generate`.

For models of no family of `family.py`. An image is looked at anew for each question. The next token
is chosen inside `generate` by what chooses it in the other engines (`sampling.py`), so that every
setting of `Decoding` holds and what is drawn follows from the row's identity alone. Given answers
are forced, token for token: not every model reads an answer as it reads a prompt.
"""

import math
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

from pipeline.engine.memory import Shortage, does_not_fit, within_memory
from pipeline.engine.placement import home_of
from pipeline.engine.request import Branch, Outcome, Prefix, Request, Score
from pipeline.engine.said import Said, not_finite, take
from pipeline.engine.sampling import Chooser
from pipeline.engine.wholeprocessor import WholeProcessor
from schemas.errors import DeviceOutOfMemory, SpecError, TokenFeatureMismatch


class AloneEngine:
    """Answers requests one prompt at a time. Safe to call from several threads: calls take turns.

    The pixels of an image are the bytes of `WholeProcessor.of_image`. Raises SpecError for a model
    that reads prompts by an encoder: what it is asked is no beginning of its answer.
    """

    def __init__(self, model: Any, *, processor: Any, eos_token_ids: Sequence[int]) -> None:
        if model.config.is_encoder_decoder:
            raise SpecError(
                f"{type(model).__name__} is an encoder with a decoder, which is not supported"
            )
        self._model, self._eos = model, frozenset(eos_token_ids)
        self._whole = WholeProcessor(processor)
        self._chooser = Chooser(eos=self._eos, device=home_of(model))
        self._lock = threading.Lock()
        # What is chosen, and when it is over, is decided here.
        for setting in ("eos_token_id", "temperature", "top_k", "top_p"):
            setattr(model.generation_config, setting, None)

    def submit(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        """One outcome for each branch of each request, in their order."""
        with self._lock, torch.inference_mode():
            return [self._outcomes(request) for request in requests]

    def _outcomes(self, request: Request) -> list[Outcome]:
        outcomes: list[Outcome] = []
        waiting = deque(request.branches)
        while waiting:
            outcomes.append(self._outcome(request.prefix, waiting.popleft()))
            if request.grow is not None:
                waiting += request.grow(len(outcomes) - 1, outcomes[-1])
        return outcomes

    def _outcome(self, prefix: Prefix, branch: Branch) -> Outcome:
        device = self._model.device
        try:
            found = within_memory(lambda: self._answered(prefix, branch), device)
        except ValueError as error:
            # How models say that image tokens and features are not as many.
            return TokenFeatureMismatch(f"the model does not take the prompt: {error}")
        if isinstance(found, Shortage):
            what = f"the row, with {len(prefix.token_ids) + len(branch.token_ids)} tokens,"
            return DeviceOutOfMemory(does_not_fit(what, device, found))
        return found

    def _answered(self, prefix: Prefix, branch: Branch) -> Outcome:
        prompt = [*prefix.token_ids, *branch.token_ids]
        hook: _Asked | _Given
        if branch.scored:
            given = prompt[-branch.scored :]
            prompt = prompt[: -branch.scored]
            hook = _Given(given, self._eos, prompt_tokens=len(prompt))
        else:
            hook = _Asked(Said(prefix.token_ids, branch), self._chooser, self._eos)
        self._model.generate(
            **self._inputs(prompt, prefix),
            do_sample=False,
            max_new_tokens=max(branch.max_new_tokens, branch.scored + 1),
            logits_processor=LogitsProcessorList([hook]),
            stopping_criteria=[_Over(hook)],
        )
        assert hook.outcome is not None
        return hook.outcome

    def _inputs(self, prompt: list[int], prefix: Prefix) -> dict[str, torch.Tensor]:
        if len(prefix.images) != 1:
            raise ValueError(f"{len(prefix.images)} images in a prompt: this engine takes one")
        found = self._whole.inputs(prompt, prefix.images[0].pixels.tobytes())
        device, dtype = home_of(self._model), self._model.dtype
        return {
            name: each.to(device, dtype if each.is_floating_point() else each.dtype)
            for name, each in found.items()
        }


class _Hook(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Sees the logits [1, vocabulary] of each step, and leaves one token to `generate`."""

    outcome: Outcome | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, float("-inf"))
        only[0, self.next(scores.float())] = 0.0
        return only

    def next(self, logits: torch.Tensor) -> int:
        raise NotImplementedError


class _Asked(_Hook):
    def __init__(self, said: Said, chooser: Chooser, eos: frozenset[int]) -> None:
        self._said, self._chooser, self._eos = said, chooser, eos

    def next(self, logits: torch.Tensor) -> int:
        _, chosen = self._chooser.choose(logits, [self._said])
        [self.outcome] = take([self._said], chosen, eos=self._eos)
        return int(chosen[0][0])


class _Given(_Hook):
    """Sums up the log-probabilities of what is forced, and of an end behind it."""

    def __init__(self, given: Sequence[int], eos: frozenset[int], *, prompt_tokens: int) -> None:
        self._waiting, self._eos = list(given), sorted(eos)
        self._about = (prompt_tokens, len(given) + bool(eos))
        self._logprob = 0.0

    def next(self, logits: torch.Tensor) -> int:
        logprobs = logits[0].double().log_softmax(-1)
        if self._waiting:
            token = self._waiting.pop(0)
            self._logprob += float(logprobs[token])
            return token
        if self._eos:
            self._logprob += float(logprobs[self._eos].logsumexp(-1))
        is_finite = math.isfinite(self._logprob)
        self.outcome = Score(self._logprob, *self._about) if is_finite else not_finite(after=0)
        return 0


class _Over(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    def __init__(self, hook: _Hook) -> None:
        self._hook = hook

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([self._hook.outcome is not None], device=input_ids.device)
