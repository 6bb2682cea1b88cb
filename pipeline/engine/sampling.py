"""The next token of each row: transformers' logits processors, then the likeliest or a drawn one.

Rows with the same settings go through the processors together. What is drawn depends on the row's
logits and its own noise (`noise.py`), so that neighbours and their order do not matter.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.engine.request import Decoding
from pipeline.engine.said import Said
from pipeline.engine.transfer import sent

Chosen = tuple[torch.Tensor, list[list[float]]]
Likeliest = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Chooser:
    """Chooses for all rows of a step; the host waits for the device once.

    `choose_likeliest`: what torch compiles of `likeliest`; null for that itself.
    """

    def __init__(
        self,
        *,
        eos: Collection[int],
        device: torch.device,
        choose_likeliest: Likeliest | None = None,
    ) -> None:
        self._eos, self._device = sorted(eos), device
        self._likeliest = choose_likeliest or likeliest
        self._processors = functools.cache(self._made)

    def choose(self, logits: torch.Tensor, saids: Sequence[Said]) -> Chosen:
        """From [rows, vocabulary]: tokens [rows] on the device; on the host both them and their
        log-probabilities under the model, whatever the settings."""
        if all(said.is_greedy for said in saids):
            tokens, logprobs = self._likeliest(logits)
        else:
            exact = logits.float()
            tokens = self._chosen(exact, saids)
            logprobs = exact.gather(-1, tokens[:, None])[:, 0] - exact.logsumexp(-1)
        # float64 carries a token id exactly.
        return tokens, torch.stack([tokens.double(), logprobs.double()]).T.tolist()

    def _chosen(self, logits: torch.Tensor, saids: Sequence[Said]) -> torch.Tensor:
        groups: dict[tuple[Decoding, bool], list[int]] = defaultdict(list)
        for number, said in enumerate(saids):
            groups[said.decoding, said.is_early].append(number)
        tokens = torch.empty(len(saids), dtype=torch.long, device=self._device)
        for (decoding, is_early), numbers in groups.items():
            places = sent(torch.tensor(numbers), self._device)
            group = [saids[number] for number in numbers]
            known = self._known(group, decoding, vocabulary=logits.shape[-1])
            scores = self._allowed(group, decoding, logits[places])
            scores = self._processors(decoding, is_early)(known, scores)
            if decoding.temperature:
                uniforms = torch.tensor([said.uniform for said in group], dtype=torch.float64)
                tokens[places] = drawn(scores, sent(uniforms, self._device))
            else:
                tokens[places] = scores.argmax(-1)
        return tokens

    def _allowed(
        self, saids: Sequence[Said], decoding: Decoding, scores: torch.Tensor
    ) -> torch.Tensor:
        """The scores [rows, vocabulary] of the tokens that a grammar allows, if there is one."""
        if decoding.grammar is None:
            return scores
        bits = decoding.grammar.allowed([said.matcher for said in saids])
        words = sent(torch.from_numpy(bits), self._device)
        each = torch.arange(32, device=self._device, dtype=torch.int32)
        allowed = (words[:, :, None] >> each & 1).bool().flatten(1)[:, : scores.shape[-1]]
        return scores.masked_fill(~allowed, float("-inf"))

    def _known(self, saids: Sequence[Said], decoding: Decoding, *, vocabulary: int) -> torch.Tensor:
        """[rows, tokens]: what may not be repeated, padded with an id that no token has."""
        if decoding.repetition_penalty == 1.0:
            return torch.empty(len(saids), 0, dtype=torch.long, device=self._device)
        known = [said.known for said in saids]
        padded = np.full((len(known), max(map(len, known))), vocabulary)
        for row, ids in zip(padded, known, strict=True):
            row[: len(ids)] = ids
        return sent(torch.from_numpy(padded), self._device)

    def _made(self, decoding: Decoding, is_early: bool) -> LogitsProcessorList:
        """In the order in which `generate` has them."""
        found = LogitsProcessorList()
        if decoding.repetition_penalty != 1.0:
            found.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
        if is_early and self._eos:
            found.append(SuppressTokensLogitsProcessor(self._eos, device=self._device))
        if decoding.temperature:
            if decoding.temperature != 1.0:
                found.append(TemperatureLogitsWarper(float(decoding.temperature)))
            if decoding.top_k:
                found.append(TopKLogitsWarper(decoding.top_k))
            if decoding.top_p < 1.0:
                found.append(TopPLogitsWarper(decoding.top_p))
        return found


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From [rows, vocabulary] tokens [rows], and their log-probabilities float32 [rows]."""
    exact = logits.float()
    best, tokens = exact.max(-1)
    return tokens, -(exact - best[:, None]).exp().sum(-1).log()


def drawn(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """From [rows, vocabulary] and float64 [rows] in [0, 1): the tokens [rows] at which the sum of
    the probabilities, in the order of ids, first exceeds the number."""
    sums = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    bounds = uniforms[:, None] * sums[:, -1:]
    tokens = torch.searchsorted(sums, bounds, right=True)[:, 0]
    # Broken logits have no sums; their log-probability will tell.
    return tokens.clamp_(max=scores.shape[-1] - 1)
