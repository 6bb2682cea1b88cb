"""What the model thinks of answers that are given: log-probabilities, without decoding any."""

import math
from collections.abc import Callable, Collection, Sequence

import torch

from pipeline.engine.request import Branch, Score
from pipeline.engine.said import not_finite
from pipeline.engine.transfer import sent
from schemas.errors import NonFiniteLogits

PLACES = 1024
"""Whose logits are there at a time."""


def scores_of(
    branches: Sequence[Branch],
    hidden: torch.Tensor,
    *,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    eos: Collection[int],
    prompt_tokens: Sequence[int],
) -> list[Score | NonFiniteLogits]:
    """A Score for each branch with `scored` tokens. The host waits for the device once.

    `hidden` [places, hidden]: for each branch in turn the states that predict its scored tokens,
    and the last, that predicts the end. `logits_of`: [places, vocabulary] of some of them.
    `prompt_tokens`: of each, its scored tokens left out.
    """
    lengths = torch.tensor([branch.scored + 1 for branch in branches])
    given = [token for branch in branches for token in (*branch.token_ids[-branch.scored :], 0)]
    at_end = torch.zeros(len(given), dtype=torch.bool)
    at_end[lengths.cumsum(0) - 1] = True
    owners = sent(torch.arange(len(branches)).repeat_interleave(lengths), hidden.device)
    tokens, is_end = (sent(each, hidden.device) for each in (torch.tensor(given), at_end))
    last = sent(torch.tensor(sorted(eos), dtype=torch.long), hidden.device)
    logprobs = [
        _logprobs(logits_of(hidden[some]), given=tokens[some], is_end=is_end[some], eos=last)
        for some in (slice(at, at + PLACES) for at in range(0, len(tokens), PLACES))
    ]
    sums = torch.zeros(len(branches), dtype=torch.float64, device=hidden.device)
    found = sums.index_add_(0, owners, torch.cat(logprobs).double()).tolist()
    return [
        Score(logprob, prompt, branch.scored + bool(eos))
        if math.isfinite(logprob)
        else not_finite(after=0)
        for branch, logprob, prompt in zip(branches, found, prompt_tokens, strict=True)
    ]


def _logprobs(
    logits: torch.Tensor, *, given: torch.Tensor, is_end: torch.Tensor, eos: torch.Tensor
) -> torch.Tensor:
    """[places]: of the given token; at an end, of any of the end tokens."""
    logits = logits.float()
    whole = logits.logsumexp(-1)
    of_token = logits.gather(-1, given[:, None])[:, 0] - whole
    if not len(eos):
        return of_token.masked_fill(is_end, 0.0)
    return torch.where(is_end, logits[:, eos].logsumexp(-1) - whole, of_token)
